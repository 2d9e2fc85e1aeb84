"""From tensors to kernel calls: output memory, operands, scratch and threads."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..problem import Problem, accumulation_dtype
from ..reference import Gradients
from . import backward, forward
from .geometry import Operand
from .plan import Plan, plan
from .threads import run_tasks, thread_count

# A scalar whose type tells a kernel how elements are stored: 16-bit floats travel as integers (see `simd`).
_STORED = {
    torch.float32: np.float32(0),
    torch.float64: np.float64(0),
    torch.bfloat16: np.uint16(0),
    torch.float16: np.int16(0),
}
_LIKE = {torch.float32: np.float32(0), torch.float64: np.float64(0)}
_ABSENT = Operand(0, 0, 0, 0, 0, 0, 0)

UNSHARED = 2**14
"""Elements that PyTorch copies on the thread that asks: it shares out from twice as many on."""


def propagate(x: Tensor, taps: Tensor, lam: Tensor | None, gate: Tensor | None, problem: Problem) -> Tensor:
    """As `reference.propagate`."""
    y = torch.empty_like(x)
    if x.numel() == 0:
        return y
    threads = thread_count()
    plans = plan(problem, threads, x.stride(), backward=False)
    sums = _Sums(y, plans[0])
    operands = (_image(x), _taps(taps), _images(lam), _images(gate), sums.operand)
    wide = accumulation_dtype(x.dtype)
    elements = forward.scratch_size(plans, sums.in_scratch)

    def work(scratch: int, first: int, last: int) -> None:
        forward.forward(
            *operands, plans, sums.in_scratch, scratch, first, last, x.element_size(),
            _STORED[x.dtype], _LIKE[wide],
        )  # fmt: skip

    run_tasks(work, problem.batch * plans[0].blocks * plans[0].splits, threads, elements * wide.itemsize)
    sums.finish(threads)
    return y


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
    dx, dtaps, dlam, dgate = (
        torch.empty_like(tensor) if tensor is not None and needed else None
        for tensor, needed in zip((x, taps, lam, gate), needs, strict=True)
    )
    if x.numel() == 0:
        return dx, dtaps, dlam, dgate
    threads = thread_count()
    plans = plan(problem, threads, x.stride(), backward=True)
    sums = _Sums(dx, plans[0])
    operands = (
        _image(dy), _image(x), _taps(taps), _images(lam), _images(gate),
        sums.operand, _ABSENT if dtaps is None else _taps(dtaps), _images(dlam), _images(dgate),
    )  # fmt: skip
    wide = accumulation_dtype(x.dtype)
    elements = backward.scratch_size(plans, sums.in_scratch)

    def work(scratch: int, first: int, last: int) -> None:
        backward.backward(
            *operands, plans, sums.in_scratch, scratch, first, last, x.element_size(),
            _STORED[x.dtype], _LIKE[wide],
        )  # fmt: skip

    run_tasks(work, problem.batch * plans[0].blocks * plans[0].splits, threads, elements * wide.itemsize)
    sums.finish(threads)
    return dx, dtaps, dlam, dgate


class _Sums:
    """Where the sum over directions is kept until it is rounded into `result`.

    In the result itself if it is wide enough; else in a task's scratch; and if a task is one direction, in
    one wide tensor for each, added here in their order, so that the result does not depend on the cut.
    """

    def __init__(self, result: Tensor | None, cut: Plan) -> None:
        self.result = result
        self.parts: Tensor | None = None
        self.in_scratch = False
        self.operand = _ABSENT
        if result is None:
            return
        wide = accumulation_dtype(result.dtype)
        if cut.splits > 1:
            self.parts = torch.empty((cut.splits, *result.shape), dtype=wide, device="cpu")
            d, b, c, h, w = self.parts.stride()
            self.operand = Operand(self.parts.data_ptr(), b, d, c, 0, h, w)
        else:
            self.in_scratch = result.dtype != wide
            self.operand = _image(result)

    def finish(self, threads: int) -> None:
        """Add the parts and round them, plane by plane."""
        if self.parts is None or self.result is None:
            return
        result, parts = self.result, self.parts.flatten(1, 2)
        channels = result.shape[1]

        def add_planes(_: int, first: int, last: int) -> None:
            # Inference mode belongs to a thread, and without it tensors made in it cannot be written to.
            with torch.inference_mode(result.is_inference()), np.errstate(all="ignore"):
                for index in range(first, last):
                    total, *others = parts[:, index]
                    # NumPy and small copies, because PyTorch's own threads hang in a forked child.
                    for part in others:
                        np.add(total.numpy(), part.numpy(), out=total.numpy())
                    _copy_in_pieces(result[index // channels, index % channels], total)

        run_tasks(add_planes, parts.shape[1], threads, 0)


def _copy_in_pieces(target: Tensor, source: Tensor) -> None:
    """Copy a plane (H, W), converting, in pieces that PyTorch does not share out between its threads."""
    height, width = source.shape
    across = min(width, UNSHARED)
    down = max(1, UNSHARED // across)
    for i in range(0, height, down):
        for j in range(0, width, across):
            target[i : i + down, j : j + across].copy_(source[i : i + down, j : j + across])


def _image(tensor: Tensor) -> Operand:
    """(B, C, H, W)."""
    b, c, h, w = tensor.stride()
    return Operand(tensor.data_ptr(), b, 0, c, 0, h, w)


def _images(tensor: Tensor | None) -> Operand:
    """(B, D, C, H, W), or absent."""
    if tensor is None:
        return _ABSENT
    b, d, c, h, w = tensor.stride()
    return Operand(tensor.data_ptr(), b, d, c, 0, h, w)


def _taps(tensor: Tensor) -> Operand:
    """(B, D, G, 3, H, W)."""
    b, d, g, k, h, w = tensor.stride()
    return Operand(tensor.data_ptr(), b, d, g, k, h, w)
