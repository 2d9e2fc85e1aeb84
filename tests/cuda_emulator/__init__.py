"""The CUDA kernels on a CPU: see README.md."""

from .build import KernelError, compiler
from .emulator import Declined, emulate, run_launch, run_plan

__all__ = ["Declined", "KernelError", "compiler", "emulate", "run_launch", "run_plan"]
