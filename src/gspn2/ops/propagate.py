"""Registration with PyTorch: schema, kernel entry, fake, autograd and vmap of forward and backward.

A direction travels as its index in `DIRECTIONS`, and no chunk as 0, because schemas have no list of optional
names. The backend is chosen inside the operator, at run time, so that a compiled graph holds no choice.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import permutations
from typing import Any

import torch
from torch import Tensor

from ..backends import DIRECTIONS, Problem, select
from .eager import needs_gradient, plain, plain_gradient, refuse_forward_mode, under_transforms

_INDICES = {
    tuple(DIRECTIONS[index] for index in indices): indices
    for count in range(1, len(DIRECTIONS) + 1)
    for indices in permutations(range(len(DIRECTIONS)), count)
}
"""Every choice of directions, by names, as indices."""

_library = torch.library.Library("gspn2", "DEF")
_library.define(
    "propagate(Tensor x, Tensor taps, Tensor? lam, Tensor? gate, int[] directions, SymInt chunk,"
    " bool normalize, str? backend) -> Tensor"
)
_library.define(
    "propagate_backward(Tensor dy, Tensor x, Tensor taps, Tensor? lam, Tensor? gate, int[] directions,"
    " SymInt chunk, bool normalize, str? backend, bool[] needs, Tensor? hidden=None)"
    " -> (Tensor, Tensor, Tensor, Tensor)"
)


def propagate(
    x: Tensor,
    taps: Tensor,
    lam: Tensor | None,
    gate: Tensor | None,
    directions: Sequence[str],
    chunk: int | None,
    normalize: bool,
    backend: str | None,
) -> Tensor:
    """Call the registered operator, or what it comes to; arguments as checked by `gspn2.functional`."""
    indices = _INDICES[tuple(directions)]
    arguments = (x, taps, lam, gate, indices, chunk or 0, normalize, backend)
    if plain(x, taps, lam, gate):
        return _Eager.apply(*arguments) if needs_gradient(x, taps, lam, gate) else _forward(*arguments)
    refuse_forward_mode(x, taps, lam, gate)
    if under_transforms():
        return _UnderTransforms.apply(*arguments)
    return torch.ops.gspn2.propagate(*arguments)


def _problem(x: Tensor, taps: Tensor, directions: Sequence[int], chunk: int, normalize: bool) -> Problem:
    return _problem_of(x.shape, taps.shape[2], tuple(directions), chunk, normalize, x.dtype, x.device)


@lru_cache(maxsize=1024)
def _problem_of(
    shape: tuple[int, int, int, int],
    groups: int,
    directions: tuple[int, ...],
    chunk: int,
    normalize: bool,
    dtype: torch.dtype,
    device: torch.device,
) -> Problem:
    names = tuple(DIRECTIONS[index] for index in directions)
    return Problem(names, chunk or None, normalize, *shape[:2], groups, *shape[2:], dtype, device.type)


def _forward(
    x: Tensor,
    taps: Tensor,
    lam: Tensor | None,
    gate: Tensor | None,
    directions: Sequence[int],
    chunk: int,
    normalize: bool,
    backend: str | None,
) -> Tensor:
    problem = _problem(x, taps, directions, chunk, normalize)
    return select(problem, backend).propagate(x, taps, lam, gate, problem)


def _forward_fake(x: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x)


def _backward(
    dy: Tensor,
    x: Tensor,
    taps: Tensor,
    lam: Tensor | None,
    gate: Tensor | None,
    directions: Sequence[int],
    chunk: int,
    normalize: bool,
    backend: str | None,
    needs: Sequence[bool],
    hidden: Tensor | None = None,
) -> tuple[Tensor, ...]:
    problem = _problem(x, taps, directions, chunk, normalize)
    implementation = select(problem, backend)
    gradients = implementation.propagate_backward(dy, x, taps, lam, gate, problem, tuple(needs), hidden)
    return tuple(_absent(x) if gradient is None else gradient for gradient in gradients)


def _backward_fake(
    dy: Tensor, x: Tensor, taps: Tensor, lam: Tensor | None, gate: Tensor | None, *rest: Any
) -> tuple[Tensor, ...]:
    needs = rest[4]
    return tuple(
        torch.empty_like(tensor) if tensor is not None and needed else _absent(x)
        for tensor, needed in zip((x, taps, lam, gate), needs, strict=True)
    )


def _absent(x: Tensor) -> Tensor:
    """Stands for a gradient nobody asked for: an operator cannot return None."""
    return x.new_empty(0)


class _Saved:
    """Names for what the autograd context carries."""

    directions: Sequence[int]
    chunk: int
    normalize: bool
    backend: str | None
    saved_tensors: tuple[Tensor | None, ...]
    needs_input_grad: tuple[bool, ...]

    def save_for_backward(self, *tensors: Tensor | None) -> None: ...


def _setup_context(ctx: _Saved, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, taps, lam, gate, ctx.directions, ctx.chunk, ctx.normalize, ctx.backend = inputs
    hidden = output if _is_hidden_state(x, gate, ctx.directions) else None
    ctx.save_for_backward(x, taps, lam, gate, hidden)


def _is_hidden_state(x: Tensor, gate: Tensor | None, directions: Sequence[int]) -> bool:
    """Is the output the state itself, so that keeping it spares backward from computing it again?

    Only for CUDA, where that time is memory traffic. The state is then known as it was rounded.
    """
    return gate is None and len(directions) == 1 and x.device.type == "cuda"


def _autograd(ctx: _Saved, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, taps, lam, gate, hidden = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[:4])
    options = (ctx.directions, ctx.chunk, ctx.normalize, ctx.backend, needs, hidden)
    arguments: tuple[Any, ...] = (dy, x, taps, lam, gate, *options)
    if plain_gradient(dy, x, taps, lam, gate, hidden):
        gradients = _backward(*arguments)
    elif under_transforms():
        gradients = _GradientsUnderTransforms.apply(*arguments)
    else:
        gradients = torch.ops.gspn2.propagate_backward(*arguments)
    present = (
        needed and tensor is not None for needed, tensor in zip(needs, (x, taps, lam, gate), strict=True)
    )
    found = (gradient if there else None for gradient, there in zip(gradients, present, strict=True))
    return (*found, None, None, None, None)


def _refuse_second_order(ctx: _Saved, *_: Any) -> None:
    raise NotImplementedError(
        "gspn2: the gradient of propagate and line_scan cannot be differentiated a second time"
    )


class _Eager(torch.autograd.Function):
    """`propagate` with its derivative, apart from the dispatcher (see `eager`)."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        y = _forward(*arguments)
        _setup_context(ctx, arguments, y)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return _autograd(ctx, dy)


class _UnderTransforms(torch.autograd.Function):
    """`propagate` with the same derivative, for torch.func."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*arguments: Any) -> Tensor:
        return torch.ops.gspn2.propagate(*arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _setup_context(ctx, inputs, output)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return _autograd(ctx, dy)


class _GradientsUnderTransforms(torch.autograd.Function):
    """`propagate_backward`, for torch.func."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, ...]:
        return torch.ops.gspn2.propagate_backward(*arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> None:
        _refuse_second_order(ctx)


def _fold(
    tensors: Sequence[Tensor | None], dims: Sequence[int | None], size: int
) -> tuple[list[Tensor | None], tuple[int, int]]:
    """Fold the mapped dimension of vmap into the batch: (..., V, ...) -> (V * B, ...), and (V, B)."""

    def front(tensor: Tensor, dim: int | None) -> Tensor:
        return tensor.expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)

    fronts = [t if t is None else front(t, dim) for t, dim in zip(tensors, dims, strict=True)]
    first = fronts[0]
    assert first is not None  # x, or the gradient that came in
    return [t if t is None else t.flatten(0, 1) for t in fronts], (size, first.shape[1])


def _forward_vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Tensor, int]:
    tensors, folded = _fold(args[:4], in_dims[:4], info.batch_size)
    y = torch.ops.gspn2.propagate(*tensors, *args[4:])
    return y.unflatten(0, folded), 0


def _backward_vmap(
    info: Any, in_dims: tuple[int | None, ...], *args: Any
) -> tuple[tuple[Tensor, ...], tuple[int | None, ...]]:
    hidden, hidden_dim = (args[10], in_dims[10]) if len(args) > 10 else (None, None)
    (*tensors, hidden), folded = _fold((*args[:5], hidden), (*in_dims[:5], hidden_dim), info.batch_size)
    needs = args[9]
    gradients = torch.ops.gspn2.propagate_backward(*tensors, *args[5:10], hidden)
    present = [tensor is not None and needed for tensor, needed in zip(tensors[1:], needs, strict=True)]
    unfolded = tuple(
        gradient.unflatten(0, folded) if there else gradient
        for gradient, there in zip(gradients, present, strict=True)
    )
    return unfolded, tuple(0 if there else None for there in present)


_library.impl("propagate", _forward, "CompositeExplicitAutograd")
_library.impl("propagate_backward", _backward, "CompositeExplicitAutograd")
torch.library.register_fake("gspn2::propagate", _forward_fake, lib=_library)
torch.library.register_fake("gspn2::propagate_backward", _backward_fake, lib=_library)
torch.library.register_autograd("gspn2::propagate", _autograd, setup_context=_setup_context, lib=_library)
torch.library.register_autograd("gspn2::propagate_backward", _refuse_second_order, lib=_library)
torch.library.register_vmap("gspn2::propagate", _forward_vmap, lib=_library)
torch.library.register_vmap("gspn2::propagate_backward", _backward_vmap, lib=_library)
