"""Problems, devices and layouts drawn at random: small ones for the emulator, large ones to plan only."""

from __future__ import annotations

import random
from dataclasses import replace

import torch
from torch import Tensor

from gspn2.backends.cuda.geometry import Case, Device
from gspn2.backends.cuda.layouts import LAYOUTS, imagined
from gspn2.backends.problem import DIRECTIONS, Problem
from helpers import Case as Tensors

from .extra import resident as _resident  # noqa: F401 (its layouts)
from .problems import BF16, FP16, OTHER_LAYOUTS, Small

DEVICES = (
    Device((8, 0), 108, 166912, 40 * 2**20),
    Device((8, 6), 84, 101376, 6 * 2**20),
    Device((8, 9), 128, 101376, 72 * 2**20),
    Device(),
    Device((9, 0), 114, 232448, 50 * 2**20),
    Device((10, 0), 148, 232448, 126 * 2**20),
    Device((12, 0), 170, 101376, 96 * 2**20),
)

LARGEST = 2**40
"""Elements of all directions of a problem that is planned only: more than any GPU's memory holds."""

WORK = 60_000
"""Places times directions of a problem, at most."""


# Layouts beyond those of the tests


def _slices(case: Tensors) -> Tensors:
    """A window of larger planes, 16 bytes from their left edge."""

    def change(tensor: Tensor) -> Tensor:
        each = 16 // tensor.itemsize
        shape = (*tensor.shape[:-2], tensor.shape[-2] + 3, -(-tensor.shape[-1] // each) * each + 2 * each)
        field = tensor.new_full(shape, torch.nan)
        window = field[..., 1 : 1 + tensor.shape[-2], each : each + tensor.shape[-1]]
        return window.copy_(tensor)

    return case.map(change)


def _expanded(case: Tensors) -> Tensors:
    """lam of one row for all, gate of one image; one image's taps."""
    changed = {"logits": case.logits[:1].expand_as(case.logits)}
    if case.lam is not None:
        changed["lam"] = case.lam[..., :1, :].expand_as(case.lam)
    if case.gate is not None:
        changed["gate"] = case.gate[:1].expand_as(case.gate)
    return replace(case, **changed)


def _channels_first_directions_last(case: Tensors) -> Tensors:
    """Planes whose batch is the innermost of the outer axes."""
    return case.map(lambda tensor: tensor.transpose(0, 1).contiguous().transpose(0, 1))


def _mixed(case: Tensors) -> Tensors:
    """Channels innermost, but gradients come as planes."""
    return replace(OTHER_LAYOUTS["channels_last"](case), dy=case.dy.contiguous())


OTHER_LAYOUTS |= {
    "slices": _slices,
    "expanded": _expanded,
    "channels_outermost": _channels_first_directions_last,
    "mixed": _mixed,
}

PLANES = ("planes", "planes", "planes", "slices", "expanded", "channels_outermost")
PIXELS = ("channel_innermost", "channels_last", "records", "records_with_x", "records_with_more", "mixed")
ANY = (*PLANES, *PIXELS, "strided", "transposed", "spread", "misaligned")
LIKELY = {
    "strips": PLANES,
    "strips_vertical": PLANES,
    "strips_column": PLANES,
    "lines": PLANES,
    "planes_tiles": PLANES,
    "planes": (*PLANES, "misaligned"),
    "tiles": PIXELS,
    "pixels": PIXELS,
}
"""Layouts that a variant may take; else any."""


# Problems


def size(rng: random.Random) -> int:
    """Where something ends: small numbers, neighbours of warps and powers of two, primes; else anything."""
    kind = rng.random()
    if kind < 0.15:
        return rng.choice((1, 2, 3))
    if kind < 0.5:
        return rng.choice((4, 7, 8, 14, 15, 16, 17, 24, 28, 31, 32, 33, 40, 56, 63, 64, 65, 72))
    if kind < 0.65:
        return rng.choice((5, 11, 13, 19, 23, 29, 37, 41, 53, 61, 71, 89, 97, 113, 127, 128, 129, 149))
    if kind < 0.97:
        return rng.randrange(1, 151)
    return rng.choice((256, 257, 264, 272, 520))


def sizes(rng: random.Random, directions: int) -> tuple[int, int, int, int]:
    """batch, channels, height, width: not more of them together than `WORK` allows."""
    while True:
        batch = rng.choice((1, 1, 1, 2, 3, 5))
        channels = rng.choice((1, 2, 2, 3, 4, 5, 6, 8, 8, 12, 16, 17, 24, 32, 40, 64, 80))
        height, width = size(rng), size(rng)
        if rng.random() < 0.25:
            width = height
        if rng.random() < 0.35:
            width = -(-width // 8) * 8  # rows of whole vectors
        if batch * channels * height * width * directions <= WORK:
            return batch, channels, height, width


def draw_problem(rng: random.Random, layouts: tuple[str, ...]) -> Small:
    directions = tuple(rng.sample(DIRECTIONS, rng.choice((1, 1, 2, 3, 4, 4, 4))))
    if rng.random() < 0.5:
        directions = tuple(name for name in DIRECTIONS if name in directions)
    batch, channels, height, width = sizes(rng, len(directions))
    groups = rng.choice([g for g in (1, 1, 1, channels, 2, 4, channels // 2) if g and channels % g == 0])
    chunk = rng.choice((None, None, None, 1, 2, 7, 16, rng.randrange(1, 160)))
    device = rng.choice(DEVICES)
    if rng.random() < 0.4:
        # Fewer multiprocessors and less shared memory than any GPU has: a small problem is a large one there.
        shared = rng.choice((24 * 2**10, 48 * 2**10, 100 * 2**10, device.shared_memory))
        device = replace(device, multiprocessors=rng.choice((1, 2, 4, 16)), shared_memory=shared)
        device = replace(device, cache=rng.choice((2**14, device.cache)))
    return Small(
        height,
        width,
        channels,
        batch,
        groups,
        directions,
        chunk,
        rng.choice((torch.float32, BF16, BF16, FP16)),
        lam=rng.random() < 0.6,
        gate=rng.random() < 0.6,
        layout=rng.choice(layouts),
        normalize=rng.random() < 0.75,
        needs=rng.choice(((True,) * 4, (True,) * 4, tuple(rng.random() < 0.5 for _ in range(4)))),
        device=device,
        dy=rng.choice(("like x", "like x", "like x", "expanded")),
        hidden=rng.random() < 0.3,
    )


def draw_large(rng: random.Random) -> Case:
    """A problem to be planned only."""
    while True:
        case = _draw_large(rng)
        problem = case.problem
        planes = problem.batch * len(problem.directions) * max(problem.channels, 3 * problem.groups)
        if planes * problem.height * problem.width <= LARGEST:
            return case


def _draw_large(rng: random.Random) -> Case:

    def edge() -> int:
        usual = (
            1,
            2,
            3,
            7,
            14,
            31,
            32,
            33,
            56,
            64,
            127,
            128,
            129,
            224,
            256,
            512,
            520,
            1000,
            1024,
            4096,
            16384,
        )
        return rng.choice(usual) if rng.random() < 0.3 else int(2 ** rng.uniform(0, 14))

    directions = tuple(rng.sample(DIRECTIONS, rng.choice((1, 2, 3, 4, 4))))
    if rng.random() < 0.6:
        directions = tuple(name for name in DIRECTIONS if name in directions)
    channels = rng.choice((1, 2, 3, 4, 8, 16, 17, 32, 64, 80, 96, 128, 196, 256, 1152, 2176, 4096))
    groups = rng.choice([g for g in (1, 1, channels, 2, 4, channels // 2) if g and channels % g == 0])
    height, width = edge(), edge()
    if rng.random() < 0.4:
        width = -(-width // 8) * 8
    problem = Problem(
        directions,
        rng.choice((None, None, 1, 16, rng.randrange(1, 4000))),
        rng.random() < 0.7,
        rng.choice((1, 1, 2, 8, 16, 64, 256, 1024)),
        channels,
        groups,
        height,
        width,
        rng.choice((torch.float32, BF16, FP16)),
        "cuda",
    )
    options = {name: rng.random() < 0.5 for name in ("backward", "lam", "gate", "keep_hidden")}
    return imagined(problem, rng.choice(LAYOUTS), rng.choice(DEVICES), **options)
