"""The CUDA backend: kernels that NVRTC compiles at first use, all directions in as few launches as pay.

Planner, variants and kernels: `docs/backends.md`.
"""

from __future__ import annotations

from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from ..problem import Problem
from ..reference import Gradients


def why_not(problem: Problem) -> str | None:
    """Why this backend declines the problem, or None."""
    if problem.device != "cuda":
        return f"it runs on CUDA devices, and the tensors are on {problem.device}"
    if problem.dtype == torch.float64:
        return "float64 runs in the reference"
    return _why_not_here()


@cache
def _why_not_here() -> str | None:
    """What this machine lacks: looked for once."""
    if torch.version.cuda is None:
        built = "ROCm" if torch.version.hip else "the CPU only"
        return f"it needs a PyTorch built for CUDA, and this one is built for {built}"
    if not torch.cuda.is_available():
        return "PyTorch finds no CUDA device"
    from . import plan, toolchain

    newest = max(torch.cuda.get_device_capability(index) for index in range(torch.cuda.device_count()))
    return plan.too_old(newest) if newest < plan.OLDEST else toolchain.why_not()


@cache
def _launch() -> ModuleType:
    """Imported at the first call; an import statement takes its time at every call."""
    from . import launch

    return launch


def propagate(x: Tensor, taps: Tensor, lam: Tensor | None, gate: Tensor | None, problem: Problem) -> Tensor:
    """As `reference.propagate`."""
    return _launch().propagate(x, taps, lam, gate, problem)


def propagate_keeping(
    x: Tensor, taps: Tensor, lam: Tensor | None, gate: Tensor | None, problem: Problem
) -> tuple[Tensor, Tensor]:
    """As `reference.propagate_keeping`; y is the sum of the states as they were rounded."""
    return _launch().propagate_keeping(x, taps, lam, gate, problem)


def propagate_backward(
    dy: Tensor,
    x: Tensor,
    taps: Tensor,
    lam: Tensor | None,
    gate: Tensor | None,
    problem: Problem,
    needs: tuple[bool, bool, bool, bool],
    hidden: Tensor | None = None,
) -> Gradients:
    """As `reference.propagate_backward`."""
    return _launch().propagate_backward(dy, x, taps, lam, gate, problem, needs, hidden)
