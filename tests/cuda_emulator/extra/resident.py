"""Resident: dense records, in slabs and passes, and what is not quite a record; planes in clusters."""

from __future__ import annotations

from dataclasses import replace

import torch

from gspn2.backends.cuda.geometry import Device
from helpers import Case

from ..problems import BF16, FP16, OLD, OTHER_LAYOUTS, SMALL, Small

TIGHT = Device(shared_memory=17_000, multiprocessors=2)
"""A GPU on which backward of a 14 x 14 image needs two passes, and blocks take several images."""

PAIR = Device(shared_memory=30_000, multiprocessors=2)
"""The same for the kernels of two channels."""


def records(case: Case, names: tuple[str, ...] = ("lam", "gate", "logits"), extra: int = 0) -> Case:
    """As a mixer makes them: views into one (B, H, W, P) tensor; the others are dense, too."""
    tensors = case.tensors() | {"dy": case.dy}
    pixels = {name: t.movedim((-2, -1), (1, 2)).contiguous() for name, t in tensors.items()}
    flat = [pixels[name].flatten(3) for name in names if name in pixels]
    packed = torch.cat([*flat, *(torch.full_like(flat[0][..., :1], torch.nan) for _ in range(extra))], -1)
    parts = packed.split([t.shape[-1] for t in flat] + [1] * extra, -1)
    inside = dict(zip((name for name in names if name in pixels), parts, strict=False))
    pixels |= {name: part.unflatten(-1, pixels[name].shape[3:]) for name, part in inside.items()}
    return replace(case, **{name: t.movedim((1, 2), (-2, -1)) for name, t in pixels.items()})


def far_below(case: Case) -> Case:
    """All logits of every third pixel are so negative that exponentials overflow."""
    pixels = torch.arange(case.x.shape[-2] * case.x.shape[-1]).view(case.x.shape[-2:])
    return records(replace(case, logits=torch.where(pixels % 3 == 0, case.logits - 90, case.logits)))


OTHER_LAYOUTS |= {
    "records": records,
    "records_far_below": far_below,
    "records_with_x": lambda case: records(case, ("x", "lam", "gate", "logits")),
    "records_in_other_order": lambda case: records(case, ("gate", "lam", "logits")),
    "records_with_more": lambda case: records(case, extra=2),
}

CASES = (
    *(Small(14, 14, channels=2, batch=3, layout="records", dtype=dtype) for dtype in (BF16, FP16)),
    Small(14, 14, channels=2, batch=3, layout="records", dtype=BF16, device=TIGHT),
    Small(14, 13, channels=2, batch=5, layout="records", dtype=BF16, device=TIGHT, chunk=4),
    Small(7, 7, channels=2, batch=3, layout="records_with_x", dtype=BF16),
    *(
        Small(14, 14, channels=2, batch=5, layout="records", dtype=dtype, device=PAIR)
        for dtype in (BF16, FP16)
    ),
    Small(13, 14, channels=2, batch=3, layout="records_with_x", dtype=BF16, device=PAIR, chunk=5),
    # Whole bundles only, and two passes on a square image.
    Small(16, 16, channels=2, batch=3, layout="records", dtype=BF16, device=PAIR, chunk=6),
    *(Small(9, 10, channels=2, layout="records_far_below", dtype=dtype) for dtype in (BF16, FP16)),
    Small(5, 70, channels=2, layout="records", dtype=BF16),
    Small(1, 3, channels=2, batch=2, layout="records", dtype=BF16),
    Small(28, 28, channels=2, batch=3, layout="records", dtype=BF16, device=SMALL),
    Small(56, 56, channels=2, layout="records", dtype=BF16, forward=False),
    # A thread's pixels are below each other: in one pass, and in two.
    *(Small(32, 32, channels=2, layout="records", dtype=dtype, chunk=5) for dtype in (BF16, FP16)),
    Small(56, 56, channels=2, layout="records", dtype=BF16, chunk=9, forward=False),
    Small(12, 12, channels=2, batch=2, layout="records_in_other_order", dtype=BF16),
    Small(12, 12, channels=2, batch=2, layout="records_with_more", dtype=BF16),
    Small(9, 10, channels=2, layout="records", directions=("left", "down"), dtype=BF16),
    Small(9, 10, channels=2, layout="records", directions=("up",), lam=False, gate=False, dtype=BF16),
    Small(10, 9, channels=2, batch=2, layout="records", lam=False, dtype=BF16, device=OLD),
    Small(10, 9, channels=2, batch=2, layout="records_with_x", gate=False, dtype=BF16),
    Small(10, 12, channels=8, batch=2, layout="records", dtype=BF16),
    Small(10, 12, channels=8, batch=2, layout="records", groups=2, chunk=3, dtype=FP16),
    Small(10, 12, channels=3, batch=2, layout="records", groups=3),
    Small(10, 12, channels=2, batch=2, layout="records", dtype=BF16, needs=(True, True, False, True)),
    *(
        Small(11, 9, channels=2, batch=2, layout="records", chunk=3, dtype=BF16, nan=name)
        for name in ("x", "logits", "lam", "gate", "dy")
    ),
    # Planes: a cluster for the directions of a task, rows that are no words, a scan that writes y itself.
    Small(13, 11, channels=3, groups=3, dtype=BF16),
    Small(13, 11, channels=3, batch=2, chunk=4, nan="logits", backward=False),
    Small(16, 16, channels=4, groups=4, directions=("up", "down"), dtype=FP16),
    Small(32, 24, channels=4, groups=4, directions=("up",), normalize=False, gate=False, dtype=BF16, chunk=9),
    # A block for each direction: vectors of channels, of two groups; blocks that take several planes.
    Small(10, 12, channels=8, groups=2, batch=2, layout="channels_last", dtype=BF16, chunk=5, backward=False),
    Small(11, 9, channels=4, batch=2, layout="channels_last", directions=("left", "up"), backward=False),
    Small(24, 32, channels=5, groups=5, directions=("right",), normalize=False, gate=False, device=TIGHT),
    # Backward by a block for each direction: channels that share taps in one block, or in those of a cluster.
    *(
        Small(12, 11, channels=8, layout=layout, dtype=dtype, chunk=5, forward=False)
        for layout in ("planes", "channels_last", "channel_innermost", "strided")
        for dtype in (BF16, FP16, torch.float32)
    ),
    Small(10, 70, channels=4, batch=2, layout="channels_last", dtype=BF16, forward=False),
    Small(9, 14, channels=6, groups=2, batch=2, layout="channels_last", dtype=BF16, forward=False),
    Small(
        34, 33, channels=2, directions=("left",), layout="transposed", lam=False, dtype=FP16, forward=False
    ),
    Small(13, 16, channels=8, directions=("left", "down"), lam=False, chunk=3, dtype=BF16, forward=False),
    Small(13, 16, channels=8, gate=False, dtype=BF16, needs=(True, True, False, False), forward=False),
    Small(14, 13, channels=8, dtype=BF16, needs=(False, True, True, True), forward=False),
    Small(16, 13, channels=8, dtype=BF16, needs=(True, False, False, True), forward=False),
    Small(64, 64, channels=8, layout="channels_last", dtype=BF16, forward=False),
    Small(64, 64, channels=8, forward=False),
    *(
        Small(11, 9, channels=8, layout="channels_last", chunk=3, dtype=BF16, nan=name, forward=False)
        for name in ("x", "logits", "lam", "gate", "dy")
    ),
    # Records by a cluster: rows are read by their owners, and put in order for the blocks that scan them.
    *(
        Small(32, 6, channels=8, layout="records", dtype=dtype, chunk=chunk, backward=False)
        for dtype, chunk in ((BF16, None), (FP16, 7), (torch.float32, 5))
    ),
    Small(64, 64, channels=8, layout="records", dtype=BF16, backward=False),
    Small(32, 8, channels=4, layout="records_with_x", groups=2, batch=2, chunk=5, backward=False),
    Small(32, 16, channels=16, layout="records", dtype=BF16, groups=2, backward=False),
    Small(
        16,
        8,
        channels=8,
        layout="records_in_other_order",
        dtype=BF16,
        directions=("left", "down"),
        backward=False,
    ),
    Small(
        16,
        72,
        channels=4,
        layout="records",
        dtype=FP16,
        directions=("up", "right"),
        lam=False,
        backward=False,
    ),
    Small(64, 12, channels=8, layout="records", gate=False, backward=False),
    *(
        Small(32, 8, channels=8, layout="records", chunk=3, dtype=BF16, nan=name, backward=False)
        for name in ("x", "logits", "lam", "gate")
    ),
)
