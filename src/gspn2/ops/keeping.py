"""`propagate_keeping`: the operator that leaves the states of all directions for its backward pass.

It returns them beside y, so that they live in a compiled graph like any other tensor. They are no result: the
caller gets y alone, and nothing is differentiated through them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch

from ..backends import select
from ..backends.keeping import empty_states
from .eager import needs_gradient, plain, refuse_forward_mode, under_transforms
from .propagate import (
    _INDICES,
    _autograd,
    _fold,
    _is_hidden_state,
    _library,
    _problem,
    _Saved,
    propagate,
)

_library.define(
    "propagate_keeping(Tensor x, Tensor taps, Tensor? lam, Tensor? gate, int[] directions, SymInt chunk,"
    " bool normalize, str? backend) -> (Tensor, Tensor)"
)


def propagate_keeping(
    x: Tensor,
    taps: Tensor,
    lam: Tensor | None,
    gate: Tensor | None,
    directions: Sequence[str],
    chunk: int | None,
    normalize: bool,
    backend: str | None,
) -> Tensor:
    """As `propagate`, with h kept where that spares backward anything; else it is `propagate`."""
    indices = _INDICES[tuple(directions)]
    tensors = (x, taps, lam, gate)
    if not _pays(x, gate, indices, backend) or not _is_differentiated(*tensors):
        return propagate(*tensors, directions, chunk, normalize, backend)
    arguments = (*tensors, indices, chunk or 0, normalize, backend)
    if plain(*tensors):
        return _Eager.apply(*arguments)
    refuse_forward_mode(*tensors)
    if under_transforms():
        return _UnderTransforms.apply(*arguments)[0]
    return torch.ops.gspn2.propagate_keeping(*arguments)[0]


def _pays(x: Tensor, gate: Tensor | None, directions: Sequence[int], backend: str | None) -> bool:
    """Does the backend read kept states, and are they not the output itself, which is kept in any case?"""
    reads = x.device.type == "cuda" and x.dtype != torch.float64 and backend != "reference"
    return reads and not _is_hidden_state(x, gate, directions)


def _is_differentiated(*tensors: Tensor | None) -> bool:
    if not under_transforms():
        return needs_gradient(*tensors)
    return torch.is_grad_enabled() and any(tensor is not None and _is_tracked(tensor) for tensor in tensors)


def _is_tracked(tensor: Tensor) -> bool:
    """Is the tensor, or one that it stands for at some level of torch.func, differentiated?"""
    while _functorch.is_functorch_wrapped_tensor(tensor):
        if _functorch.is_gradtrackingtensor(tensor):
            return True
        tensor = _functorch.get_unwrapped(tensor)
    return tensor.requires_grad


def _forward(
    x: Tensor,
    taps: Tensor,
    lam: Tensor | None,
    gate: Tensor | None,
    directions: Sequence[int],
    chunk: int,
    normalize: bool,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    problem = _problem(x, taps, directions, chunk, normalize)
    return select(problem, backend).propagate_keeping(x, taps, lam, gate, problem)


def _forward_fake(
    x: Tensor, taps: Tensor, lam: Tensor | None, gate: Tensor | None, directions: Sequence[int], *_: Any
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), empty_states(x, len(directions))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _save(ctx, inputs, output[1])
    # A gradient of the states, of zeros and as large as they are, would be made for nothing.
    ctx.set_materialize_grads(False)


def _save(ctx: _Saved, inputs: tuple[Any, ...], hidden: Tensor) -> None:
    x, taps, lam, gate, ctx.directions, ctx.chunk, ctx.normalize, ctx.backend = inputs
    ctx.save_for_backward(x, taps, lam, gate, hidden)


def _gradients(ctx: _Saved, dy: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    return (None,) * 8 if dy is None else _autograd(ctx, dy)


class _Eager(torch.autograd.Function):
    """`propagate_keeping` with its derivative, apart from the dispatcher (see `eager`)."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        y, hidden = _forward(*arguments)
        _save(ctx, arguments, hidden)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return _autograd(ctx, dy)


class _UnderTransforms(torch.autograd.Function):
    """`propagate_keeping` with the same derivative, for torch.func."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, Tensor]:
        return torch.ops.gspn2.propagate_keeping(*arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        _setup_context(ctx, inputs, output)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dh: Tensor | None) -> tuple[Tensor | None, ...]:
        return _gradients(ctx, dy, dh)


def _vmap(
    info: Any, in_dims: tuple[int | None, ...], *args: Any
) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
    tensors, folded = _fold(args[:4], in_dims[:4], info.batch_size)
    y, hidden = torch.ops.gspn2.propagate_keeping(*tensors, *args[4:])
    return (y.unflatten(0, folded), hidden.unflatten(0, folded)), (0, 0)


_library.impl("propagate_keeping", _forward, "CompositeExplicitAutograd")
torch.library.register_fake("gspn2::propagate_keeping", _forward_fake, lib=_library)
torch.library.register_autograd(
    "gspn2::propagate_keeping", _gradients, setup_context=_setup_context, lib=_library
)
torch.library.register_vmap("gspn2::propagate_keeping", _vmap, lib=_library)
