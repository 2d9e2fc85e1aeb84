"""Small problems that are hard for kernels, and what their results should be."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from importlib.util import find_spec

import torch
from torch import Tensor

from gspn2.backends import reference
from gspn2.backends.cuda.geometry import Device
from gspn2.backends.problem import DIRECTIONS, Problem
from helpers import LAYOUTS, Case, in_memory, make_case

from .memory import sparse

NEW = Device()
OLD = Device(capability=(8, 0), multiprocessors=108, shared_memory=166912, cache=40 * 2**20)
"""A GPU without clusters and bulk copies."""
SMALL = Device(multiprocessors=2)
"""A GPU on which a small problem is a large one."""

ALL = (True, True, True, True)


@dataclass(frozen=True)
class Small:
    """One problem for the emulator.

    Args:
        batch, channels, height, width, groups, directions, chunk, dtype, lam, gate: as in `make_case`.
        layout: a name of `LAYOUTS` of helpers.py or of this file.
        normalize: taps are logits, else weights.
        needs: which gradients backward is asked for.
        device: the GPU that is planned for.
        dy: "like x" or "expanded" (of strides 0).
        forward, backward: which of the two is run.
        hidden: backward is handed the state that forward returned.
        nan: "x", "logits", "lam", "gate" or "dy": there is a NaN in its middle; "restarts": all taps of lines
            that restart are NaN, which forward does not read.
    """

    height: int = 5
    width: int = 7
    channels: int = 4
    batch: int = 1
    groups: int = 1
    directions: tuple[str, ...] = DIRECTIONS
    chunk: int | None = None
    dtype: torch.dtype = torch.float32
    lam: bool = True
    gate: bool = True
    layout: str = "planes"
    normalize: bool = True
    needs: tuple[bool, bool, bool, bool] = ALL
    device: Device = NEW
    dy: str = "like x"
    forward: bool = True
    backward: bool = True
    hidden: bool = False
    nan: str = ""

    def __str__(self) -> str:
        """What differs from the defaults, for the name of a test."""
        sizes = f"{self.batch}x{self.channels}x{self.height}x{self.width}"
        known = {"float32": "", "bfloat16": "bf16", "float16": "fp16"}
        parts = [
            sizes,
            known[str(self.dtype).removeprefix("torch.")],
            f"groups={self.groups}" if self.groups > 1 else "",
            "+".join(self.directions) if self.directions != DIRECTIONS else "",
            f"chunk={self.chunk}" if self.chunk else "",
            "" if self.lam else "no_lam",
            "" if self.gate else "no_gate",
            self.layout if self.layout != "planes" else "",
            "" if self.normalize else "weights",
            "" if self.needs == ALL else "needs=" + "".join("x-"[not need] for need in self.needs),
            "" if self.device == NEW else f"sm{self.device.capability[0]}x{self.device.multiprocessors}",
            "" if self.dy == "like x" else "dy_expanded",
            "hidden" if self.hidden else "",
            f"nan={self.nan}" if self.nan else "",
        ]
        return "-".join(part for part in parts if part)

    @functools.cache  # noqa: B019 (a few small cases, each used by every variant)
    def case(self) -> Case:
        """The tensors. Taps of neighbours that do not exist are NaN: nobody may look at them."""
        case = make_case(
            self.batch,
            self.channels,
            self.height,
            self.width,
            self.groups,
            self.directions,
            self.chunk,
            lam=self.lam,
            gate=self.gate,
        )
        if not self.normalize:
            case = replace(case, logits=case.logits / 6)
        case = case.to(self.dtype)
        for d, direction in enumerate(self.directions):
            fill_missing(case.logits[:, d], direction)
        if self.nan == "restarts":
            case.logits.masked_fill_(self.restarts(), torch.nan)
        if self.nan not in ("", "restarts"):
            middle(getattr(case, self.nan)).fill_(torch.nan)
        case = (LAYOUTS | OTHER_LAYOUTS)[self.layout](case)
        return replace(case, dy=case.dy[:, :, :1, :1].expand_as(case.x)) if self.dy == "expanded" else case

    def restarts(self) -> Tensor:
        """(D, 1, 1, H, W): the lines on which each direction starts anew."""
        masks = torch.zeros(len(self.directions), 1, 1, self.height, self.width, dtype=torch.bool)
        for mask, direction in zip(masks, self.directions, strict=True):
            lines = mask if direction in ("down", "up") else mask.transpose(-2, -1)
            first = torch.arange(0, lines.shape[-2], self.chunk or lines.shape[-2])
            lines[:, :, first if direction in ("down", "right") else -1 - first] = True
        return masks

    def problem(self, case: Case) -> Problem:
        problem = Problem.of(case.x, case.logits, self.directions, self.chunk, self.normalize)
        return replace(problem, device="cuda")


def fill_missing(taps: Tensor, direction: str) -> None:
    """Fills taps of one direction, (B, G, 3, H, W), that belong to no neighbour in the image with NaN."""
    lines = taps if direction in ("down", "up") else taps.transpose(-2, -1)
    lines[:, :, 0, :, 0] = torch.nan
    lines[:, :, 2, :, -1] = torch.nan


def middle(tensor: Tensor) -> Tensor:
    """One element of the last image, of all three taps where there are taps: a view."""
    places = tensor.shape[-2] // 2, tensor.shape[-1] // 2
    if tensor.ndim == 6:
        return tensor[-1, 0, 0, :, places[0], places[1]]
    return tensor[-1, ..., 0, places[0], places[1]]


def truth(case: Case, problem: Problem, needs: tuple[bool, bool, bool, bool] = ALL) -> dict[str, Tensor]:
    """y and the gradients asked for, by the reference in float64 on the inputs as they were rounded."""
    exact = case.to(torch.float64)
    problem = replace(problem, dtype=torch.float64)
    inputs = (exact.x, exact.logits, exact.lam, exact.gate, problem)
    gradients = reference.propagate_backward(exact.dy, *inputs, needs)
    named = dict(zip(("dx", "dtaps", "dlam", "dgate"), gradients, strict=True))
    return {"y": reference.propagate(*inputs)} | {n: g for n, g in named.items() if g is not None}


# Layouts beyond those of helpers.py


def channels_last(case: Case) -> Case:
    """Each tensor dense in memory of its own, channels innermost, taps next to their group."""

    def change(tensor: Tensor) -> Tensor:
        order = (0, tensor.ndim - 2, tensor.ndim - 1, *range(1, tensor.ndim - 2))
        inverse = sorted(range(tensor.ndim), key=lambda axis: order[axis])
        return tensor.permute(*order).contiguous().permute(*inverse)

    return case.map(change)


def transposed(case: Case) -> Case:
    """Planes, each stored column after column."""
    return case.map(lambda tensor: tensor.transpose(-2, -1).contiguous().transpose(-2, -1))


def spread(case: Case) -> Case:
    """Planes, in steps of 2 elements along every axis."""
    return case.map(lambda tensor: in_memory(tensor, tuple(range(tensor.ndim)), 2))


def misaligned(case: Case) -> Case:
    """Planes, dense, that start one element behind a multiple of 128 bytes."""

    def change(tensor: Tensor) -> Tensor:
        return torch.cat((tensor.new_full((1,), torch.nan), tensor.flatten()))[1:].view(tensor.shape)

    return case.map(change)


def far(case: Case) -> Case:
    """Planes whose images are more than 2^31 elements apart."""
    return case.map(lambda tensor: sparse(tensor, 2**31 + 128))


OTHER_LAYOUTS: dict[str, Callable[[Case], Case]] = {
    "channels_last": channels_last,
    "transposed": transposed,
    "spread": spread,
    "misaligned": misaligned,
    "far": far,
}

# The lists


BF16, FP16 = torch.bfloat16, torch.float16

COMMON: tuple[Small, ...] = (
    # Sizes at which something ends: a plane, a line, a warp, a tile.
    *(Small(h, w, dtype=BF16) for h, w in ((1, 1), (1, 2), (2, 1), (2, 2), (1, 9), (9, 1))),
    Small(7, 5),
    Small(31, 32, channels=2),
    *(Small(h, w, channels=2, dtype=BF16) for h, w in ((33, 31), (40, 24))),
    Small(64, 64, channels=2, dtype=BF16),
    Small(65, 130, channels=1, dtype=BF16),
    Small(3, 257, channels=1, dtype=BF16),
    Small(257, 3, channels=1, dtype=BF16),
    Small(56, 56, channels=3, batch=2, dtype=BF16),
    # Directions and restarts.
    *(Small(9, 12, directions=(d,), batch=2, dtype=BF16) for d in DIRECTIONS),
    Small(17, 19, directions=("left", "down"), chunk=4, dtype=BF16),
    Small(17, 19, directions=("up", "right", "left"), chunk=1, dtype=BF16),
    Small(32, 40, directions=("right", "left"), chunk=16, dtype=BF16),
    Small(20, 12, chunk=20, dtype=BF16),
    # Channels and groups.
    Small(6, 6, channels=1, batch=3, dtype=BF16),
    Small(6, 6, channels=6, groups=2, dtype=BF16),
    Small(8, 16, channels=8, groups=8, dtype=BF16),
    Small(12, 10, channels=40, dtype=BF16),
    Small(9, 8, channels=130, dtype=BF16),
    Small(5, 6, channels=12, groups=4, batch=2, chunk=3, dtype=BF16),
    # Options.
    Small(10, 16, dtype=FP16),
    Small(10, 16, lam=False, gate=False, dtype=BF16),
    Small(8, 16, directions=("down",), normalize=False, gate=False),
    Small(16, 24, directions=("left",), normalize=False, gate=False, groups=4, chunk=5),
    # NaN.
    *(Small(11, 9, batch=2, chunk=3, dtype=BF16, nan=n) for n in ("x", "logits", "lam", "gate", "dy")),
    *(
        Small(9, 10, channels=16, batch=2, layout="channels_last", dtype=BF16, nan=name)
        for name in ("x", "logits", "dy")
    ),
    Small(11, 9, batch=2, chunk=3, dtype=BF16, nan="restarts", backward=False),
    Small(9, 10, channels=16, layout="channels_last", dtype=BF16, nan="restarts", chunk=5, backward=False),
    # Memory.
    *(
        Small(9, 10, channels=8, groups=groups, layout=layout, dtype=BF16)
        for layout in ("channel_innermost", "strided", "channels_last", "transposed", "spread", "misaligned")
        for groups in (1, 8)
    ),
    Small(16, 16, channels=16, layout="channels_last", dtype=BF16, batch=2),
    Small(33, 20, channels=32, layout="channels_last", dtype=BF16, groups=4),
    Small(12, 33, channels=8, groups=8, layout="channel_innermost"),
    Small(6, 16, channels=2, batch=2, layout="far", dtype=BF16),
    # What is asked for, and of which device.
    Small(8, 16, needs=(False, True, False, False), dtype=BF16, forward=False),
    Small(8, 16, needs=(True, False, True, False), dtype=BF16, forward=False),
    Small(8, 16, needs=(False, False, False, True), dtype=BF16, forward=False),
    Small(8, 16, dy="expanded", dtype=BF16, forward=False),
    Small(20, 16, directions=("up",), gate=False, hidden=True, chunk=7, dtype=BF16, forward=False),
    Small(9, 33, directions=("right",), normalize=False, gate=False, hidden=True, groups=4, forward=False),
    Small(24, 40, channels=16, batch=2, device=SMALL, dtype=BF16),
    Small(24, 40, channels=16, device=OLD, dtype=BF16),
    Small(24, 24, channels=16, layout="channels_last", device=OLD, dtype=BF16),
)
"""Every variant tries those that it takes."""


def extra(variant: str) -> Sequence[Small]:
    """More cases for one variant: `CASES` of the module of its name in `extra`."""
    name = f"{__package__}.extra.{variant}"
    return import_module(name).CASES if find_spec(name) is not None else ()
