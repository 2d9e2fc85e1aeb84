"""What a plan is made from: the problem, how each tensor lies in memory, and the device."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from ..problem import Problem


@dataclass(frozen=True)
class View:
    """One tensor in memory: strides in elements by axis, and the alignment of its first element.

    Args:
        b, d, c, k, h, w: strides of batch, direction, channel (or tap group), tap, row and column; 0 for an
            axis that the tensor does not have.
        alignment: the largest power of two, at most 128, that divides the address in bytes.
    """

    b: int
    d: int
    c: int
    k: int
    h: int
    w: int
    alignment: int = 128

    @staticmethod
    def of(tensor: Tensor) -> View:
        """(B, C, H, W), (B, D, C, H, W) or (B, D, G, 3, H, W)."""
        strides = tensor.stride()
        address = tensor.data_ptr() | 128
        alignment = address & -address
        if tensor.ndim == 4:
            b, c, h, w = strides
            return View(b, 0, c, 0, h, w, alignment)
        if tensor.ndim == 5:
            b, d, c, h, w = strides
            return View(b, d, c, 0, h, w, alignment)
        b, d, c, k, h, w = strides
        return View(b, d, c, k, h, w, alignment)


@dataclass(frozen=True)
class Device:
    """What the planner needs to know of a GPU.

    Args:
        capability: compute capability as (major, minor).
        multiprocessors: their number.
        shared_memory: bytes of shared memory that one block may have.
        cache: bytes of the second-level cache.
    """

    capability: tuple[int, int] = (9, 0)
    multiprocessors: int = 132
    shared_memory: int = 232448
    cache: int = 50 * 2**20


@dataclass(frozen=True)
class Case:
    """One call as the planner sees it: everything but the addresses.

    Args:
        problem: semantics and sizes.
        device: the GPU.
        views: by name "x", "taps", "lam", "gate", "y" or (backward) "dy", "dx", "dtaps", "dlam", "dgate"; a
            tensor that is absent, or a gradient that is not asked for, is missing.
        backward: gradients instead of y.
    """

    problem: Problem
    device: Device
    views: dict[str, View]
    backward: bool = False

    @property
    def itemsize(self) -> int:
        return self.problem.dtype.itemsize


@dataclass(frozen=True)
class Kernel:
    """One compilation: a source file of `kernels`, the function in it, and its macros."""

    source: str
    function: str
    defines: tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class Launch:
    """One kernel launch; `cluster` blocks of the grid run together."""

    kernel: Kernel
    grid: int
    block: int
    shared: int
    cluster: int = 1
    knobs: tuple[int, ...] = ()


@dataclass(frozen=True)
class Plan:
    """What runs, and why.

    Args:
        variant: name of the module of `variants` that made it.
        launches: in order.
        scratch: bytes of each scratch buffer (at most four; not initialised).
        reasons: sentences for people: why this variant, why these numbers.
    """

    variant: str
    launches: tuple[Launch, ...]
    scratch: tuple[int, ...] = ()
    reasons: tuple[str, ...] = field(default=())


def options(case: Case) -> tuple[tuple[str, int], ...]:
    """The macros every kernel is compiled with."""
    import torch

    storage = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}[case.problem.dtype]
    return (
        ("STORAGE", storage),
        ("NORMALIZE", int(case.problem.normalize)),
        ("HAS_LAM", int("lam" in case.views)),
        ("HAS_GATE", int("gate" in case.views)),
    )
