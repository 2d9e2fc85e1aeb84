"""The planner: every variant on every size, the choices for the sizes that matter, and what `info` prints."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from gspn2.backends import DIRECTIONS, Problem
from gspn2.backends.cuda import driver, params, plan
from gspn2.backends.cuda.geometry import Case, Device, Kernel, Launch, Plan, View
from gspn2.backends.cuda.layouts import LAYOUTS, imagined
from gspn2.backends.cuda.variants import planes_tiles, strips, strips_column, strips_vertical
from gspn2.cli.main import main

AMPERE = Device((8, 6), 84, 101376, 6 * 2**20)
DEVICES = {"H200": Device(), "A100": Device((8, 0), 108, 166912, 40 * 2**20), "A40": AMPERE}
BLACKWELL = Device((12, 0), 170, 101376, 96 * 2**20)

SIZES = (
    *[(1, 1, 1, 1), (1, 3, 1, 7), (2, 5, 7, 1), (1, 7, 13, 17), (3, 4, 31, 33), (2, 6, 127, 129)],
    *[(256, 2, 56, 56), (256, 2, 14, 14), (32, 64, 64, 64), (1, 8, 64, 64), (1, 32, 128, 128)],
    *[(16, 8, 1024, 1024), (1, 80, 1024, 1024), (256, 1, 1024, 1024), (1, 1152, 64, 64), (32, 196, 32, 32)],
    *[(2, 3, 4096, 7), (1, 2, 5, 16384), (1, 64, 2048, 2048), (4, 16, 16384, 16384), (70000, 3, 2, 2)],
)


def posed(
    size: tuple[int, int, int, int],
    dtype: torch.dtype = torch.bfloat16,
    groups: int = 1,
    directions: tuple[str, ...] = DIRECTIONS,
    *,
    normalize: bool = True,
) -> Problem:
    batch, channels, height, width = size
    return Problem(directions, None, normalize, batch, channels, groups, height, width, dtype, "cuda")


def assert_can_run(found: Plan, device: Device) -> None:
    """What the driver would refuse, and what the parameters cannot hold."""
    assert found.launches
    assert len(found.scratch) <= params.SCRATCH
    assert all(size >= 0 for size in found.scratch)
    assert found.reasons
    for launch in found.launches:
        assert 0 < launch.grid <= driver.LARGEST_GRID
        assert launch.grid % launch.cluster == 0
        assert launch.cluster <= 16
        assert launch.cluster == 1 or device.capability >= (9, 0)
        assert 32 <= launch.block <= 1024
        assert launch.block % 32 == 0
        assert 0 <= launch.shared <= device.shared_memory
        assert len(launch.knobs) <= params.KNOBS
        assert all(-(2**31) <= knob < 2**31 for knob in launch.knobs)
        assert all(isinstance(value, int) for _, value in launch.kernel.defines)
        assert len(dict(launch.kernel.defines)) == len(launch.kernel.defines), "a macro twice"


@pytest.mark.parametrize("device", [*DEVICES.values(), BLACKWELL], ids=[*DEVICES, "Blackwell"])
@pytest.mark.parametrize("variant", plan.variants())
def test_plans_can_run_on_the_device(variant: str, device: Device) -> None:
    """Every size a variant takes, in both layouts and passes: with a reason where it declines."""
    module = plan.variants()[variant]
    kinds = itertools.product(SIZES, (torch.float32, torch.float16), LAYOUTS, (False, True), (False, True))
    for size, dtype, layout, backward, shared in kinds:
        problem = posed(size, dtype, 1 if shared else size[1])
        case = imagined(problem, layout, device, backward=backward)
        reason = module.why_not(case)
        if reason is None:
            found = module.plan(case)
            assert found.variant == variant
            assert_can_run(found, device)
        else:
            assert len(reason) > 10


@pytest.mark.parametrize("variant", plan.variants())
def test_directions_operands_and_uses(variant: str) -> None:
    module = plan.variants()[variant]
    subsets = [s for n in (1, 2) for s in itertools.combinations(DIRECTIONS, n)]
    for directions, layout, backward, given in itertools.product(subsets, LAYOUTS, (False, True), range(4)):
        for size in ((2, 8, 32, 48), (1, 8, 1024, 1024), (32, 16, 64, 64)):
            problem = posed(size, directions=directions, normalize=len(directions) > 1 or given > 0)
            options = {"lam": bool(given & 1), "gate": bool(given & 2)}
            case = imagined(problem, layout, Device(), backward=backward, **options)
            if module.why_not(case) is None:
                assert_can_run(module.plan(case), Device())


LARGE = (
    (16, 8, 1024, 1024),
    (256, 1, 1024, 1024),
    (8, 64, 256, 256),
    (1, 128, 512, 512),
    (1, 64, 2048, 2048),
)


@pytest.mark.parametrize(
    "directions", [*((direction,) for direction in DIRECTIONS), DIRECTIONS], ids="+".join
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("size", LARGE, ids=str)
def test_aligned_planes_are_scanned_by_lines(
    size: tuple[int, int, int, int], dtype: torch.dtype, directions: tuple[str, ...]
) -> None:
    """Large images; long columns, and rows of few planes, by blocks that share them."""
    problem = posed(size, dtype, directions=directions, normalize=len(directions) > 1)
    case = imagined(problem, "planes", Device(), gate=problem.normalize)
    by_strips = directions in (("right",), ("left",)) and size[2] <= 1024
    elsewhere = any(module.why_not(case) is None for module in (planes_tiles, strips_vertical))
    found = plan.choose(case, "lines" if elsewhere else None)
    assert found.variant == ("strips" if by_strips else "lines")
    functions = {"lines_forward", "strips_forward"}
    scans = [launch for launch in found.launches if launch.kernel.function in functions]
    assert min(launch.grid for launch in scans) >= 60, "most multiprocessors have work"
    horizontal = [
        launch
        for launch in scans
        if launch.kernel.function == "strips_forward" or dict(launch.kernel.defines)["HPIECE"]
    ]
    assert bool(horizontal) == bool(set(directions) & {"right", "left"})
    assert all(launch.cluster > 1 for launch in horizontal) or size[2] <= 256
    old = plan.choose(imagined(problem, "planes", DEVICES["A100"], gate=problem.normalize))
    assert all(step.cluster == 1 for step in old.launches)


@pytest.mark.parametrize(
    ("size", "dtype", "groups", "cut"),
    [
        ((8, 64, 256, 256), torch.bfloat16, 64, (1, 4, 4, 2)),
        ((8, 64, 256, 256), torch.bfloat16, 1, (1, 4, 4, 2)),
        ((8, 64, 256, 256), torch.float32, 64, None),
        ((8, 64, 256, 256), torch.float32, 1, (1, 4, 4, 2)),
        ((1, 64, 256, 256), torch.bfloat16, 64, (1, 4, 4, 2)),
        ((1, 64, 256, 256), torch.float32, 1, None),
        ((1, 128, 512, 512), torch.float16, 128, (2, 4, 4, 2)),
        ((1, 128, 512, 512), torch.float32, 128, (2, 4, 4, 2)),
        ((1, 128, 512, 512), torch.float32, 1, (2, 4, 4, 2)),
        ((1, 128, 400, 512), torch.float16, 128, None),
        ((1, 160, 512, 512), torch.bfloat16, 1, None),
        ((16, 8, 1024, 1024), torch.bfloat16, 8, (4, 4, 2, 2)),
        ((16, 8, 1024, 1024), torch.bfloat16, 1, (4, 4, 2, 2)),
        ((16, 8, 1024, 1024), torch.float32, 8, (4, 4, 2, 2)),
        ((16, 8, 1024, 1024), torch.float32, 1, (4, 4, 2, 2)),
        ((256, 1, 1024, 1024), torch.bfloat16, 1, (4, 4, 2, 2)),
        ((256, 1, 1024, 1024), torch.float32, 1, (4, 4, 2, 2)),
        ((1, 8, 1024, 1024), torch.bfloat16, 8, (8, 2, 2, 2)),
        ((1, 8, 1024, 1024), torch.bfloat16, 1, (8, 2, 2, 2)),
        ((1, 20, 1024, 1024), torch.bfloat16, 1, (4, 4, 2, 2)),
        ((1, 8, 1024, 1024), torch.float32, 8, (8, 2, 2, 3)),
        ((1, 8, 1024, 1024), torch.float32, 1, (8, 2, 2, 3)),
        ((1, 8, 1024, 128), torch.bfloat16, 8, None),
    ],
    ids=str,
)
def test_strips_take_what_they_are_faster_at(
    size: tuple[int, int, int, int], dtype: torch.dtype, groups: int, cut: tuple[int, ...] | None
) -> None:
    """By dtype, rows, taps, planes: cluster, strips, copying warps, stages. `lines` keeps the rest."""
    case = imagined(posed(size, dtype, groups, ("left",), normalize=False), "planes", Device(), gate=False)
    found = plan.choose(case)
    assert found.variant == ("lines" if cut is None else "strips")
    if cut is not None:
        launch = found.launches[-1]
        defines = dict(launch.kernel.defines)
        assert tuple(defines[name] for name in ("CLUSTER", "STRIPS", "COPIERS", "STAGES")) == cut
        assert launch.cluster == cut[0]


@pytest.mark.parametrize(
    ("size", "clusters", "cut"),
    [
        ((16, 8, 1024, 1024), 30, 8),
        ((1, 70, 1024, 1024), 30, 10),
        # Next to nothing to save.
        ((256, 1, 1024, 1024), 256, 0),
        # As many for each; parts that would wait for each other; fewer than there are clusters.
        ((15, 8, 1024, 1024), 120, 0),
        ((1, 31, 1024, 1024), 31, 0),
        ((1, 24, 1024, 1024), 24, 0),
        ((1, 128, 512, 512), 64, 0),
    ],
    ids=str,
)
def test_the_last_planes_of_strips_are_cut(size: tuple[int, int, int, int], clusters: int, cut: int) -> None:
    """Where planes of clusters of four do not come out even; flags are 0 before anybody looks at them."""
    problem = posed(size, torch.bfloat16, size[1], ("right",), normalize=False)
    found = strips.plan(imagined(problem, "planes", Device(), gate=False))
    *start, launch = found.launches
    assert launch.knobs[0] == clusters == launch.grid // launch.cluster
    assert launch.knobs[2] == cut
    assert bool(start) == bool(cut) == bool(found.scratch) == bool(dict(launch.kernel.defines)["CUT"])
    if cut:
        strips_of_all = clusters * 4 * 4
        assert start[0].knobs == (strips_of_all,)
        assert found.scratch == (96 * 4 * strips_of_all, 4 * strips_of_all)


@pytest.mark.parametrize(
    ("size", "dtype", "cut"),
    [
        ((1, 8, 1024, 1024), torch.bfloat16, (8, 4, 2, 16, 16, 8)),
        ((1, 8, 1024, 1024), torch.float32, (8, 2, 4, 32, 16, 3)),
        ((1, 16, 1024, 1024), torch.bfloat16, (8, 2, 4, 32, 8, 7)),
        ((1, 16, 1024, 1024), torch.float32, (8, 2, 4, 32, 8, 3)),
        ((1, 32, 1024, 1024), torch.bfloat16, (8, 2, 4, 32, 8, 7)),
        ((1, 32, 1024, 1024), torch.float32, (8, 2, 4, 32, 8, 3)),
        ((1, 40, 1024, 1024), torch.float32, None),
        ((16, 8, 1024, 1024), torch.bfloat16, None),
        ((1, 8, 1000, 1000), torch.bfloat16, (8, 2, 4, 32, 16, 7)),
        ((1, 8, 2048, 2048), torch.bfloat16, (8, 8, 2, 16, 16, 4)),
        ((1, 8, 2048, 2048), torch.float32, (8, 4, 4, 32, 8, 4)),
        ((1, 16, 2048, 2048), torch.float32, None),
        ((1, 8, 4096, 4096), torch.float32, None),
        ((1, 16, 512, 512), torch.bfloat16, (4, 4, 2, 16, 16, 8)),
        ((1, 8, 300, 512), torch.float16, (4, 4, 2, 16, 16, 8)),
        ((1, 64, 512, 512), torch.float32, None),
        ((1, 32, 256, 256), torch.float32, (2, 2, 4, 32, 16, 3)),
        ((1, 32, 128, 128), torch.bfloat16, (1, 1, 4, 0, 16, 8)),
        ((1, 120, 128, 128), torch.float32, (1, 1, 4, 0, 16, 5)),
        ((1, 121, 128, 128), torch.float32, None),
        ((1, 32, 64, 64), torch.bfloat16, (1, 1, 2, 0, 16, 8)),
        ((1, 32, 64, 64), torch.float32, (1, 1, 2, 0, 16, 8)),
        ((1, 32, 32, 32), torch.float32, None),
    ],
    ids=str,
)
def test_strips_of_rows_take_few_planes(
    size: tuple[int, int, int, int], dtype: torch.dtype, cut: tuple[int, ...] | None
) -> None:
    """Cluster, strips, places of a lane, halo, lines of a tile, stages; others keep small and many planes."""
    case = imagined(posed(size, dtype, size[1], ("up",), normalize=False), "planes", Device(), gate=False)
    found = plan.choose(case)
    assert (found.variant == "strips_vertical") == (cut is not None)
    if cut is not None:
        (launch,) = found.launches
        defines = dict(launch.kernel.defines)
        assert (
            tuple(defines[name] for name in ("CLUSTER", "STRIPS", "PLACES", "HALO", "LINES", "STAGES")) == cut
        )
        assert launch.grid <= Device().multiprocessors * (2 if defines["LINES"] == 8 else 1)


@pytest.mark.parametrize(
    ("size", "dtype", "chunk", "cut"),
    [
        ((1, 32, 64, 64), torch.bfloat16, None, (2, 2)),
        ((1, 32, 64, 64), torch.float32, None, (2, 4)),
        ((1, 32, 128, 128), torch.bfloat16, None, (4, 4)),
        ((1, 32, 128, 128), torch.float32, None, (4, 5)),
        ((2, 66, 100, 1000), torch.float16, 64, (4, 5)),
        ((1, 133, 64, 64), torch.float32, None, None),
        ((1, 32, 32, 32), torch.bfloat16, None, None),
        ((1, 32, 63, 64), torch.bfloat16, None, None),
        ((1, 32, 64, 64), torch.bfloat16, 12, None),
        ((1, 32, 132, 64), torch.bfloat16, None, None),
    ],
    ids=str,
)
def test_whole_columns_of_few_planes(
    size: tuple[int, int, int, int], dtype: torch.dtype, chunk: int | None, cut: tuple[int, ...] | None
) -> None:
    """Rows of a lane and stages; others keep more planes, other columns, restarts within vectors."""
    problem = replace(posed(size, dtype, size[1], ("left",), normalize=False), chunk=chunk)
    found = plan.choose(imagined(problem, "planes", Device(), gate=False))
    assert (found.variant == "strips_column") == (cut is not None)
    if cut is not None:
        (launch,) = found.launches
        assert tuple(dict(launch.kernel.defines)[name] for name in ("ROWS", "STAGES")) == cut
        assert launch.shared <= Device().shared_memory


@pytest.mark.parametrize("tiles", [0, 1, 2])
@pytest.mark.parametrize("height", [64, 128])
def test_whole_columns_have_room_for_two_tiles(height: int, tiles: int) -> None:
    """With one the scan would wait for the next tile, and that for the scan."""
    problem = posed((1, 4, height, 64), torch.float32, 4, ("right",), normalize=False)
    device = Device(shared_memory=128 + tiles * 5 * height * 64)
    case = imagined(problem, "planes", device, gate=False)
    reason = strips_column.why_not(case)
    assert reason is None if tiles == 2 else "do not fit in the shared memory" in str(reason)


@pytest.mark.parametrize(
    ("size", "groups", "dtype", "found"),
    [
        ((1, 128, 512, 512), 1, torch.bfloat16, True),
        ((1, 128, 300, 480), 2, torch.float16, True),
        ((1, 128, 512, 512), 1, torch.float32, False),
        ((1, 128, 512, 512), 128, torch.bfloat16, False),
        ((1, 136, 512, 512), 1, torch.bfloat16, False),
        ((2, 64, 256, 256), 1, torch.bfloat16, False),
    ],
    ids=str,
)
def test_strips_of_rows_take_a_plane_a_block(
    size: tuple[int, int, int, int], groups: int, dtype: torch.dtype, found: bool
) -> None:
    """Of shared taps in 16 bits, as many planes as there are multiprocessors; `lines` keeps the like."""
    case = imagined(posed(size, dtype, groups, ("up",), normalize=False), "planes", Device(), gate=False)
    chosen = plan.choose(case)
    assert chosen.variant == ("strips_vertical" if found else "lines")
    if found:
        assert (chosen.launches[0].grid, chosen.launches[0].cluster) == (128, 1)


@pytest.mark.parametrize(
    ("size", "groups", "dtype", "planes"),
    [
        ((8, 64, 256, 256), 1, torch.bfloat16, 4),
        ((8, 64, 256, 256), 1, torch.float32, 4),
        ((4, 128, 300, 200), 8, torch.float16, 4),
        ((8, 64, 256, 256), 64, torch.bfloat16, None),
        ((8, 64, 256, 256), 32, torch.bfloat16, None),
        ((8, 64, 64, 256), 1, torch.bfloat16, None),
        ((8, 64, 256, 160), 1, torch.bfloat16, None),
        ((16, 64, 256, 256), 1, torch.bfloat16, 4),
        ((9, 64, 256, 256), 1, torch.bfloat16, None),
        ((4, 64, 256, 256), 1, torch.bfloat16, None),
    ],
    ids=str,
)
def test_strips_of_rows_take_planes_that_share_taps(
    size: tuple[int, int, int, int], groups: int, dtype: torch.dtype, planes: int | None
) -> None:
    """A block for four, where that is about a block for each multiprocessor, or two, or more."""
    case = imagined(posed(size, dtype, groups, ("down",), normalize=False), "planes", Device(), gate=False)
    found = plan.choose(case)
    assert (found.variant == "strips_vertical") == (planes is not None)
    if planes is not None:
        (launch,) = found.launches
        assert dict(launch.kernel.defines)["PLANES"] == planes
        assert launch.grid == size[0] * size[1] // planes


def declined(
    shape: tuple[int, int, int, int],
    steps: tuple[int, int, int, int],
    directions: tuple[str, ...],
    *,
    backward: bool = False,
) -> str | None:
    """Why `lines` declines x of these strides in elements of 2 bytes; the other tensors are plain planes."""
    case = imagined(posed(shape, directions=directions), "planes", Device(), backward=backward)
    b, c, h, w = steps
    views = case.views | {"x": View(b, 0, c, 0, h, w)}
    return plan.variants()["lines"].why_not(replace(case, views=views))


def test_what_lines_declines() -> None:
    plain = (8 * 4096, 4096, 64, 1)
    assert declined((2, 8, 64, 64), plain, DIRECTIONS) is None
    assert declined((2, 8, 64, 64), plain, DIRECTIONS, backward=True) == "it has no backward"
    columns = declined((2, 8, 64, 64), (8 * 4096, 1, 512, 8), DIRECTIONS)
    assert columns == "columns of x are 8 elements apart, not adjacent"
    # Rows of 61 and 62 elements, and rows of 64 that are 66 apart: multiples of 2 and 4 bytes.
    for width, pitch in ((61, 61), (62, 62), (64, 66)):
        found = declined((2, 8, 64, width), (8 * 64 * pitch, 64 * pitch, pitch, 1), ("right",))
        assert found == "rows do not start and end at multiples of 16 bytes"
    assert declined((2, 8, 64, 62), (8 * 64 * 62, 64 * 62, 62, 1), ("down",)) is None
    odd = declined((2, 8, 64, 61), (8 * 64 * 61, 64 * 61, 61, 1), ("down",))
    assert odd == "rows do not start and end at multiples of 4 bytes"
    size = 16384
    long = declined((1, 2, size, size), (2 * size**2, size**2, size, 1), ("right",))
    assert long == "lines of 16384 places are too long for a block"


def test_the_generic_variant_comes_last_and_takes_everything() -> None:
    assert list(plan.variants())[-1] == "generic"
    for size, layout, backward in itertools.product(SIZES, LAYOUTS, (False, True)):
        case = imagined(posed(size), layout, AMPERE, backward=backward)
        assert plan.why_not(case)["generic"] is None
        assert plan.choose(case, "generic").variant == "generic"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_records_of_few_small_images_are_read_once(dtype: torch.dtype) -> None:
    new = Device()

    def launch(size: tuple[int, int, int, int], device: Device = new, **changed: int) -> Launch:
        case = imagined(posed(size, dtype), "channels", device)
        views = {name: replace(view, **changed) for name, view in case.views.items()}
        return plan.choose(replace(case, views=views)).launches[0]

    once = "resident_exchange_forward"
    for size, blocks in (((1, 8, 64, 64), 16), ((6, 8, 32, 32), 96), ((1, 4, 64, 64), 8)):
        found = launch(size)
        assert (found.kernel.function, found.grid) == (once, blocks)
        assert found.cluster == blocks // size[0]
    # More images than run at once; rows that blocks cannot share evenly; no large clusters; no vectors.
    assert launch((8, 8, 32, 32)).kernel.function != once
    assert launch((1, 8, 40, 64)).kernel.function != once
    assert launch((1, 8, 64, 64), AMPERE).kernel.function != once
    assert launch((1, 8, 64, 64), replace(new, multiprocessors=64)).kernel.function != once
    assert launch((1, 8, 64, 64), alignment=8).kernel.function != once


def test_names_in_the_table() -> None:
    case = imagined(posed((1, 8, 64, 64)), "planes", Device())
    with pytest.raises(ValueError, match=r"variant: expected one of strips_vertical.*generic, got 'fast'"):
        plan.choose(case, "fast")


def test_the_first_that_takes_it_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    def made(case: Case) -> Plan:
        return Plan("second", (Launch(Kernel("a.cu", "a", ()), 1, 32, 0),))

    table: dict[str, Any] = {
        "first": SimpleNamespace(why_not=lambda case: "not on weekdays"),
        "second": SimpleNamespace(why_not=lambda case: None, plan=made),
        "third": SimpleNamespace(why_not=lambda case: None),
    }
    monkeypatch.setattr(plan, "variants", lambda: table)
    case = imagined(posed((1, 8, 64, 64)), "planes", Device())
    assert plan.choose(case).variant == "second"
    assert plan.why_not(case) == {"first": "not on weekdays", "second": None, "third": None}
    with pytest.raises(RuntimeError, match="variant 'first' cannot run this case: not on weekdays"):
        plan.choose(case, "first")


def test_imagined_layouts_are_those_of_real_tensors() -> None:
    problem = posed((2, 4, 5, 6), torch.float32, 2)
    views = imagined(problem, "planes", Device()).views
    assert set(views) == {"x", "taps", "lam", "gate", "y"}
    x, taps = torch.empty(2, 4, 5, 6), torch.empty(2, 4, 2, 3, 5, 6)
    assert (views["x"].b, views["x"].c, views["x"].h, views["x"].w) == x.stride()
    assert tuple(views["taps"].__dict__.values())[:6] == taps.stride()
    views = imagined(problem, "channels", Device(), backward=True).views
    assert set(views) == {"x", "taps", "lam", "gate", "dy", "dx", "dtaps", "dlam", "dgate"}
    width = 2 * 4 * 4 + 4 * 2 * 3
    assert (views["x"].c, views["x"].w, views["x"].h) == (1, 4, 24)
    assert (views["gate"].c, views["gate"].d, views["gate"].w) == (1, 4, width)
    assert (views["taps"].k, views["taps"].c, views["taps"].d, views["taps"].h) == (1, 3, 6, 6 * width)
    assert views["dy"] == views["dx"] == views["x"]
    assert views["gate"].alignment == 64, "4 directions of 4 channels of 4 bytes after lam"
    few = imagined(problem, "planes", Device(), lam=False, gate=False).views
    assert set(few) == {"x", "taps", "y"}
    one = imagined(
        posed((1, 2, 3, 4), directions=("up",)), "planes", Device(), backward=True, gate=False
    ).views
    assert one["y"] == one["dy"], "backward of a single scan without gate has its state"


# gspn2 info


def info(capsys: pytest.CaptureFixture[str], *options: str) -> str:
    assert main(["info", "--device", "cuda", *options]) == 0
    return capsys.readouterr().out


def test_info_prints_the_plan(capsys: pytest.CaptureFixture[str]) -> None:
    printed = info(capsys, "--problem", "2,8,77,55", "--dtype", "bfloat16", "--layout", "channels")
    if not torch.cuda.is_available():
        assert "plan of the cuda backend, forward, layout channels, assuming an H200" in printed
    case = imagined(posed((2, 8, 77, 55)), "channels", Device())
    chosen = plan.choose(case)
    assert f"  variant       {chosen.variant}" in printed
    for reason in chosen.reasons:
        assert reason in printed
    for step in chosen.launches:
        assert f"{step.kernel.function}: {step.grid:,} blocks" in printed
        assert "STORAGE=1" in printed
    for name, reason in plan.why_not(case).items():
        assert reason is None or f"  {name:<14}no: {reason}" in printed


def test_info_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    printed = info(capsys, "--problem", "2,8,300,55", "--backward", "--json")
    report = json.loads(printed)["problem"]["plan"]
    assert report["pass"] == "backward"
    assert report["launches"][0]["grid"] > 0
    assert report["launches"][0]["defines"]["STORAGE"] == 0
    assert set(report["declined"]) < set(plan.variants())
    one = info(capsys, "--line-scan", "--directions", "left", "--json")
    (first, *_) = json.loads(one)["problem"]["plan"]["launches"]
    assert first["defines"]["NORMALIZE"] == first["defines"]["HAS_GATE"] == 0


def test_info_has_no_plan_where_the_cuda_backend_does_not_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert "plan of" not in info(capsys, "--dtype", "float64")
    assert "float64 runs in the reference" in info(capsys, "--dtype", "float64")
    assert main(["info", "--device", "cpu", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["problem"]["plan"] is None
    assert main(["info", "--device", "cuda", "--line-scan"]) == 2
    assert "--directions: line_scan has one" in capsys.readouterr().err
