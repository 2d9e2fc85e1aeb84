"""Propagation of one packed tensor, for compiled models: one argument, and one gradient.

A compiler that sees the views of a packed tensor may copy each of them before the operator, and puts the
gradients together with another copy. Here it sees one tensor, and the views are made inside.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .eager import needs_gradient, plain, refuse_forward_mode
from .propagate import _INDICES, _refuse_second_order
from .propagate import _backward as _unpacked_backward
from .propagate import _forward as _unpacked_forward

_library = torch.library.Library("gspn2", "FRAGMENT")
_library.define(
    "propagate_packed(Tensor packed, int channels, int groups, int[] directions, SymInt chunk, bool lam,"
    " str? backend) -> Tensor"
)
_library.define(
    "propagate_packed_backward(Tensor dy, Tensor packed, int channels, int groups, int[] directions,"
    " SymInt chunk, bool lam, str? backend) -> (Tensor, Tensor, Tensor, Tensor)"
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
    arguments = (packed, channels, groups, _INDICES[tuple(directions)], chunk or 0, lam, backend)
    if plain(packed) and not needs_gradient(packed):
        return _forward(*arguments)
    refuse_forward_mode(packed)
    y: Tensor = torch.ops.gspn2.propagate_packed(*arguments)
    return y


def _sizes(channels: int, groups: int, scans: int, lam: bool) -> tuple[int, int, int, int]:
    """Channels of x, lam, gate and logits in the packed tensor."""
    each = scans * channels
    return channels, each * lam, each, 3 * scans * groups


def _views(
    packed: Tensor, channels: int, groups: int, scans: int, has_lam: bool
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """x (B, C, H, W), logits (B, D, G, 3, H, W), lam and gate (B, D, C, H, W), of a contiguous tensor."""
    # One operation each: splitting, unflattening and permuting take longer on the host than the launch does.
    batch, height, width, record = packed.shape
    image, row = height * width * record, width * record
    first, lams, gates, _ = _sizes(channels, groups, scans, has_lam)
    x = packed.storage_offset()
    lam = x + first
    gate = lam + lams
    logits = gate + gates
    per_channel = (batch, scans, channels, height, width), (image, channels, 1, row, record)
    return (
        packed.as_strided((batch, channels, height, width), (image, 1, row, record), x),
        packed.as_strided(
            (batch, scans, groups, 3, height, width), (image, 3 * groups, 3, 1, row, record), logits
        ),
        packed.as_strided(*per_channel, lam) if has_lam else None,
        packed.as_strided(*per_channel, gate),
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
) -> tuple[Tensor, ...]:
    """Gradients of x, lam, gate and logits, dense (B, H, W, channels); without lam, its part has no channels.

    Parts, so that a compiler puts them together in one pass with what it does to the whole.
    """
    views = _views(packed.contiguous(), channels, groups, len(directions), lam)
    needs = (True, True, lam, True)
    dx, dlogits, dlam, dgate = _unpacked_backward(dy, *views, directions, chunk, True, backend, needs)
    parts = (
        dx.permute(0, 2, 3, 1),
        dlam.permute(0, 3, 4, 1, 2).flatten(3) if lam else dx.new_empty(*packed.shape[:3], 0),
        dgate.permute(0, 3, 4, 1, 2).flatten(3),
        dlogits.permute(0, 4, 5, 1, 2, 3).flatten(3),
    )
    return tuple(part.contiguous() for part in parts)


def _forward_fake(packed: Tensor, channels: int, *_: Any) -> Tensor:
    batch, height, width, _size = packed.shape
    return packed.new_empty(batch, height, width, channels).permute(0, 3, 1, 2)


def _backward_fake(
    dy: Tensor,
    packed: Tensor,
    channels: int,
    groups: int,
    directions: Sequence[int],
    chunk: int,
    lam: bool,
    *_: Any,
) -> tuple[Tensor, ...]:
    sizes = _sizes(channels, groups, len(directions), lam)
    return tuple(packed.new_empty(*packed.shape[:3], size) for size in sizes)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    packed, *ctx.options = inputs
    ctx.save_for_backward(packed)


def _autograd(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    (packed,) = ctx.saved_tensors
    parts = torch.ops.gspn2.propagate_packed_backward(dy, packed, *ctx.options)
    has_lam = ctx.options[4]
    return (torch.cat([part for i, part in enumerate(parts) if i != 1 or has_lam], dim=-1), *(None,) * 6)


_library.impl("propagate_packed", _forward, "CompositeExplicitAutograd")
_library.impl("propagate_packed_backward", _backward, "CompositeExplicitAutograd")
torch.library.register_fake("gspn2::propagate_packed", _forward_fake, lib=_library)
torch.library.register_fake("gspn2::propagate_packed_backward", _backward_fake, lib=_library)
torch.library.register_autograd(
    "gspn2::propagate_packed", _autograd, setup_context=_setup_context, lib=_library
)
torch.library.register_autograd("gspn2::propagate_packed_backward", _refuse_second_order, lib=_library)
