"""Propagation of one packed tensor, for compiled models: one argument, and one gradient.

A compiler that sees the views of a packed tensor may copy each of them before the operator, and puts the
gradients together with another copy. Here it sees one tensor, and the views are made inside.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..backends import DIRECTIONS
from .eager import refuse_forward_mode
from .propagate import _backward as _unpacked_backward
from .propagate import _forward as _unpacked_forward
from .propagate import _refuse_second_order

_library = torch.library.Library("gspn2", "FRAGMENT")
_library.define(
    "propagate_packed(Tensor packed, int channels, int groups, int[] directions, SymInt chunk, bool lam,"
    " str? backend) -> Tensor"
)
_library.define(
    "propagate_packed_backward(Tensor dy, Tensor packed, int channels, int groups, int[] directions,"
    " SymInt chunk, bool lam, str? backend) -> Tensor"
)


def propagate_packed(
    packed: Tensor,  # (B, H, W, P): x, lam (if there is one), gate, logits
    channels: int,
    groups: int,
    directions: Sequence[str],
    chunk: int | None,
    lam: bool,
    backend: str | None,
) -> Tensor:  # (B, C, H, W), channels_last
    """`gspn2.propagate` of the views into `packed`."""
    refuse_forward_mode(packed)
    indices = [DIRECTIONS.index(name) for name in directions]
    y: Tensor = torch.ops.gspn2.propagate_packed(packed, channels, groups, indices, chunk or 0, lam, backend)
    return y


def _views(
    packed: Tensor, channels: int, groups: int, scans: int, has_lam: bool
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """x (B, C, H, W), logits (B, D, G, 3, H, W), lam and gate (B, D, C, H, W)."""
    each = scans * channels
    x, lam, gate, logits = packed.split((channels, each * has_lam, each, 3 * scans * groups), dim=-1)
    return (
        x.permute(0, 3, 1, 2),
        logits.unflatten(-1, (scans, groups, 3)).permute(0, 3, 4, 5, 1, 2),
        lam.unflatten(-1, (scans, channels)).permute(0, 3, 4, 1, 2) if has_lam else None,
        gate.unflatten(-1, (scans, channels)).permute(0, 3, 4, 1, 2),
    )


def _forward(
    packed: Tensor,
    channels: int,
    groups: int,
    directions: Sequence[int],
    chunk: int,
    lam: bool,
    backend: str | None,
) -> Tensor:
    views = _views(packed.contiguous(), channels, groups, len(directions), lam)
    y = _unpacked_forward(*views, directions, chunk, True, backend)
    return y.contiguous(memory_format=torch.channels_last)


def _backward(
    dy: Tensor,
    packed: Tensor,
    channels: int,
    groups: int,
    directions: Sequence[int],
    chunk: int,
    lam: bool,
    backend: str | None,
) -> Tensor:
    views = _views(packed.contiguous(), channels, groups, len(directions), lam)
    needs = (True, True, lam, True)
    dx, dlogits, dlam, dgate = _unpacked_backward(dy, *views, directions, chunk, True, backend, needs)
    parts = [
        dx.permute(0, 2, 3, 1),
        *([dlam.permute(0, 3, 4, 1, 2).flatten(3)] if lam else []),
        dgate.permute(0, 3, 4, 1, 2).flatten(3),
        dlogits.permute(0, 4, 5, 1, 2, 3).flatten(3),
    ]
    return torch.cat(parts, dim=-1)


def _forward_fake(packed: Tensor, channels: int, *_: Any) -> Tensor:
    batch, height, width, _size = packed.shape
    return packed.new_empty(batch, height, width, channels).permute(0, 3, 1, 2)


def _backward_fake(dy: Tensor, packed: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(packed, memory_format=torch.contiguous_format)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    packed, *ctx.options = inputs
    ctx.save_for_backward(packed)


def _autograd(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    (packed,) = ctx.saved_tensors
    return (torch.ops.gspn2.propagate_packed_backward(dy, packed, *ctx.options), *(None,) * 6)


_library.impl("propagate_packed", _forward, "CompositeExplicitAutograd")
_library.impl("propagate_packed_backward", _backward, "CompositeExplicitAutograd")
torch.library.register_fake("gspn2::propagate_packed", _forward_fake, lib=_library)
torch.library.register_fake("gspn2::propagate_packed_backward", _backward_fake, lib=_library)
torch.library.register_autograd(
    "gspn2::propagate_packed", _autograd, setup_context=_setup_context, lib=_library
)
torch.library.register_autograd("gspn2::propagate_packed_backward", _refuse_second_order, lib=_library)
