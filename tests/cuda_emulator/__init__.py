"""The CUDA kernels on a CPU: see README.md."""

from .emulator import Declined, KernelError, compiler, emulate, run_launch, run_plan

__all__ = ["Declined", "KernelError", "compiler", "emulate", "run_launch", "run_plan"]
