"""Tiles of large images: ways of cutting them, what enters and leaves a tile, and the planner's sizes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from cuda_emulator import compiler
from cuda_emulator.emulator import Inputs, case_of, run_plan
from cuda_emulator.extra import resident as _resident  # noqa: F401 (its layouts)
from cuda_emulator.problems import BF16, FP16, Small, truth
from gspn2.backends import Problem
from gspn2.backends.cuda import plan as planner
from gspn2.backends.cuda.geometry import Case, Device
from gspn2.backends.cuda.layouts import imagined
from gspn2.backends.cuda.variants import tiles
from gspn2.backends.cuda.variants.tiles import Cut
from gspn2.backends.problem import DIRECTIONS
from helpers import relative_l2

NAMES = ("dx", "dtaps", "dlam", "dgate")
NARROW = Small(37, 35, channels=8, dtype=BF16, layout="channel_innermost")
WIDE = replace(NARROW, channels=16, batch=2, height=20, width=33)
PAIR = Small(37, 35, channels=2, batch=2, dtype=BF16, layout="channel_innermost")
OWN = replace(NARROW, groups=8)
CUTS = (
    # Several tiles along both axes, the last of them short; one of a single place.
    (NARROW, Cut(16, 2, 2)),
    (replace(NARROW, height=33, width=49, dtype=torch.float32), Cut(16, 2, 4)),
    (replace(NARROW, channels=4, height=65), Cut(32, 1, 2)),
    # Groups of several blocks, blocks of several warps.
    (replace(WIDE, channels=32, batch=1, groups=2), Cut(16, 2, 2)),
    (WIDE, Cut(16, 4, 2)),
    # Restarts on every line, within tiles, and beyond the image.
    *((replace(WIDE, chunk=chunk), Cut(16, 2, 2)) for chunk in (1, 7, 32)),
    # Some of the directions, in an order of their own.
    (replace(WIDE, directions=("left", "down", "up"), dtype=FP16, layout="channels_last"), Cut(16, 2, 2)),
    (replace(WIDE, directions=("right", "up"), chunk=21, layout="channels_last"), Cut(16, 2, 2)),
    # What is not there.
    (replace(NARROW, lam=False, gate=False), Cut(16, 2, 2)),
    (replace(NARROW, gate=False, chunk=9), Cut(16, 2, 2)),
    (replace(NARROW, needs=(False, True, False, True)), Cut(16, 2, 2)),
    (replace(NARROW, height=1, width=40), Cut(16, 2, 2)),
    # Vectors of two channels; two directions in a warp, or not.
    (PAIR, Cut(16, 1, 2, 2)),
    (replace(PAIR, height=70), Cut(32, 1, 4, 2)),
    (replace(PAIR, height=300, width=19, batch=1), Cut(16, 1, 8, 2)),
    (replace(PAIR, width=50, dtype=torch.float32, chunk=18), Cut(16, 1, 4, 2)),
    (replace(PAIR, channels=12, groups=2, dtype=FP16, layout="channels_last"), Cut(16, 1, 4, 2)),
    (replace(PAIR, directions=("up", "right", "down", "left"), chunk=11), Cut(32, 1, 2, 2)),
    (replace(PAIR, directions=("left", "right"), lam=False), Cut(16, 1, 2, 2)),
    (replace(PAIR, channels=10, gate=False, chunk=16), Cut(16, 1, 2, 2)),
    # Taps of each channel.
    (OWN, Cut(16, 2, 4)),
    (replace(OWN, height=33, width=49, channels=12, groups=12), Cut(16, 1, 2)),
    (replace(OWN, layout="records"), Cut(16, 1, 4)),
    *((replace(OWN, batch=2, height=20, width=33, chunk=chunk), Cut(16, 1, 2)) for chunk in (1, 7, 32)),
    (replace(OWN, directions=("left", "down", "up"), layout="channels_last"), Cut(16, 2, 2)),
    (replace(OWN, directions=("right", "up"), chunk=21, layout="channels_last"), Cut(16, 1, 2)),
    (replace(OWN, lam=False, gate=False), Cut(16, 2, 2)),
    (replace(OWN, gate=False, chunk=9), Cut(16, 2, 4)),
    (replace(OWN, needs=(False, True, False, True)), Cut(16, 1, 2)),
    (replace(OWN, height=1, width=40), Cut(16, 1, 2)),
)


@pytest.mark.skipif(compiler() is None, reason="the emulator of CUDA kernels needs g++ 12, on Linux")
@pytest.mark.parametrize(("small", "cut"), CUTS, ids=str)
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_ways_of_cutting(small: Small, cut: Cut, backward: bool) -> None:
    """Results as they should be, and the same in two orders of threads."""
    torch.set_num_threads(1)
    inputs = small.case()
    problem = small.problem(inputs)
    expected = truth(inputs, problem, small.needs)
    dy = inputs.dy if backward else None
    given = Inputs(inputs.x, inputs.logits, inputs.lam, inputs.gate, dy, small.needs)
    found = []
    for seed in (0, 9):
        case, tensors = case_of(given, problem, small.device)
        assert tiles.cannot(case) is None
        if tiles.memory(case, cut) > small.device.shared_memory:
            pytest.skip("gradients of such tiles do not fit")

        run_plan(tiles.plan_of(case, cut), problem, tensors, seed, small.device)
        found.append(tensors)
    tolerance = {torch.float32: 3e-6, BF16: 2.5e-3, FP16: 4e-4}[small.dtype]
    for name in NAMES if backward else ("y",):
        if name in expected:
            assert relative_l2(found[0][name], expected[name]) <= tolerance, name
            assert torch.equal(found[0][name], found[1][name]), f"{name} depends on the order of threads"


def large(batch: int, channels: int, *, backward: bool = False, scaled: bool = True) -> Case:
    """What a mixer asks for on large images."""
    problem = Problem(DIRECTIONS, None, True, batch, channels, 1, 1024, 1024, torch.bfloat16, "cuda")
    return imagined(problem, "channels", Device(), backward=backward, lam=scaled, gate=scaled)


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize(("batch", "channels"), [(16, 8), (8, 16)])
def test_large_images_go_by_tiles(batch: int, channels: int, backward: bool) -> None:
    """And take less than a third of the memory of inputs and outputs for what is at borders."""
    case = large(batch, channels, backward=backward)
    found = planner.choose(case)
    assert found.variant == "tiles"
    numbers = 10 * channels + 12 if not backward else 19 * channels + 24
    assert sum(found.scratch) <= 0.3 * numbers * 2 * batch * 1024**2
    for launch in found.launches:
        assert launch.shared <= case.device.shared_memory


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize(
    ("sizes", "places"),
    [((8, 128, 128), 2), ((1, 128, 128), 2), ((2, 512, 512), 4), ((1, 1024, 1024), 8), ((1, 256, 2048), 8)],
)
def test_two_channels_of_few_images(sizes: tuple[int, int, int], places: int, backward: bool) -> None:
    """As a backbone has them at high resolution: what enters is carried by four warps, if they are enough."""
    batch, height, width = sizes
    case = large(1, 2, backward=backward)
    case = replace(case, problem=replace(case.problem, batch=batch, height=height, width=width))
    assert next(tiles.cuts(case)) == Cut(16, 1, places, 2)
    assert planner.choose(case).variant == "tiles"
    many = replace(case, problem=replace(case.problem, batch=64))
    assert "few large images" in (tiles.why_not(many) or "")
    # A warp never holds directions of both axes.
    mixed = replace(case, problem=replace(case.problem, directions=("down", "right", "up", "left")))
    assert next(tiles.cuts(mixed)) == Cut(32, 1, places, 2)


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize(("batch", "channels"), [(16, 8), (1, 80), (16, 12)])
def test_taps_of_each_channel(batch: int, channels: int, backward: bool) -> None:
    """Gradients of many channels, too: `pixels` takes three times as long for them."""
    problem = Problem(DIRECTIONS, None, True, batch, channels, channels, 1024, 1024, torch.bfloat16, "cuda")
    case = imagined(problem, "channels", Device(), backward=backward)
    found = planner.choose(case)
    if channels > 16 and not backward:
        assert found.variant == "pixels"
        return
    assert found.variant == "tiles"
    assert sum(found.scratch) <= 23 * batch * channels * 1024**2
    assert all(launch.shared <= case.device.shared_memory for launch in found.launches)
    for changed, word in (
        (replace(problem, dtype=torch.float32), "bfloat16 only"),
        (replace(problem, channels=6, groups=6), "no multiple"),
    ):
        assert word in str(tiles.cannot(replace(case, problem=changed)))
    taps = replace(case.views["taps"], k=8, c=1)
    assert "not adjacent" in str(tiles.cannot(replace(case, views=case.views | {"taps": taps})))


def test_what_is_declined() -> None:
    case = large(16, 8)
    problem = case.problem
    for changed, word in (
        (replace(problem, directions=("down",)), "single direction"),
        (replace(problem, normalize=False), "as given"),
        (replace(problem, channels=12, groups=4), "not shared"),
        (replace(problem, height=8192), "too long"),
        (replace(problem, height=32), "too few tiles"),
        (replace(problem, height=100, width=100), "on the chip"),
        (replace(problem, batch=8, height=256, width=256), "in the cache"),
        (replace(problem, channels=80), "short pieces"),
    ):
        reason = tiles.why_not(replace(case, problem=changed))
        assert word in (reason or ""), (changed, reason)
    few = replace(problem, batch=1, channels=32, height=256, width=512)
    assert tiles.why_not(replace(case, problem=few)) is None
    kept = large(16, 8, backward=True)
    assert tiles.why_not(replace(kept, views=kept.views | {"y": kept.views["x"]})) is None
