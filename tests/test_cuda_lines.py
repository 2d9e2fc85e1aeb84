"""Every way of cutting that `lines` has, on problems of a size that the emulator can run.

The planner takes most of these for large problems only: here they are taken from `lines.layouts` instead.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import replace

import pytest
import torch

from cuda_emulator import compiler, run_plan
from cuda_emulator.emulator import Inputs, case_of
from cuda_emulator.problems import ALL, BF16, FP16, Small, truth
from gspn2.backends.cuda.geometry import Case, Device
from gspn2.backends.cuda.layouts import imagined
from gspn2.backends.cuda.variants import lines
from gspn2.backends.cuda.variants.lines_layout import HALO, Columns, Layout, Rows
from gspn2.backends.cuda.variants.planes_layout import LANES
from gspn2.backends.problem import DIRECTIONS, Problem
from helpers import max_error, relative_l2

TOLERANCE = {torch.float32: (3e-6, 3e-6), BF16: (2.5e-3, 1.02 * 2**-8), FP16: (4e-4, 1.02 * 2**-11)}
"""Relative in L2, and at most: one rounding of the result, where what is nearly a tie may go the other way;
in float32 those of the sums."""

# Where both axes are cut over blocks some warps may rest in the scans of one. In the first two problems
# blocks have exchanged states 18 and 9 times when these come back: they wait in another phase than before.
PROBLEMS = (
    Small(151, 128, channels=1, dtype=BF16),
    Small(40, 152, channels=4, groups=2, dtype=BF16, directions=("left", "up"), chunk=11, lam=False),
    Small(21, 144, channels=1, directions=("down",), normalize=False, gate=False),
    Small(37, 76, channels=2, directions=("down", "right", "up"), chunk=9),
    Small(293, 40, channels=2, directions=("right", "down", "left"), chunk=19, dtype=BF16),
    Small(139, 24, channels=2, directions=("left",), gate=False, chunk=50, dtype=FP16),
    Small(69, 256, channels=2, directions=("up",), normalize=False, gate=False, chunk=50, dtype=BF16),
)


def features(number: int, layout: Layout) -> set[tuple[object, ...]]:
    """What a layout has that others do not: together they are all branches of the kernel."""
    rows, columns = layout.rows, layout.columns
    found: set[tuple[object, ...]] = {("problem", number), ("channels", number, layout.channels)}
    if rows is not None and rows.warps:
        found |= {("strips", layout.case.itemsize, layout.cluster), ("strips of a block", rows.warps)}
    elif rows is not None:
        found |= {
            ("rows over", layout.cluster, layout.split),
            ("places", layout.case.itemsize, rows.places, rows.lines),
            ("ring", rows.ring),
        }
    if columns is not None:
        found |= {
            ("columns over", layout.cluster),
            ("few registers", layout.threads > 9 * LANES, layout.channels),
            ("piece", layout.case.itemsize, columns.piece),
            ("buffers", columns.buffers),
        }
    if layout.split and rows is not None and columns is not None:
        warps = [-(-places // LANES) for places in held(layout)]
        found |= {("warps rest", warps[0] < warps[1], warps[0] > warps[1])}
    return found


def held(layout: Layout) -> tuple[int, int]:
    """Threads of a block that hold places while rows are scanned, and while columns are."""
    assert layout.rows is not None
    halo = 2 * HALO
    return -(-(layout.own_columns + halo) // layout.rows.places), layout.own_rows + halo


def covering(layouts: Iterable[tuple[int, Layout]]) -> list[tuple[int, Layout]]:
    """A few that have every feature of all: always the one that adds most."""
    known = [(features(*numbered), numbered) for numbered in layouts]
    missing = set().union(*(found for found, _ in known))
    chosen = []
    while missing:
        found, numbered = max(known, key=lambda one: len(one[0] & missing))
        chosen.append(numbered)
        missing -= found
    return chosen


@functools.cache
def chosen() -> list[tuple[int, Layout]]:
    every = []
    for number, small in enumerate(PROBLEMS):
        case = small.case()
        inputs = Inputs(case.x, case.logits, case.lam, case.gate, None, ALL)
        planned, _ = case_of(inputs, small.problem(case), small.device)
        assert lines.why_not(planned) is None
        every += [(number, layout) for layout in lines.layouts(planned)]
    return covering(every)


def name(layout: Layout) -> str:
    rows, columns = layout.rows, layout.columns
    parts = [f"{layout.cluster}x{layout.threads}"] + ["pairs"] * (layout.channels > 1)
    parts += ["split"] if layout.split else []
    parts += [f"rows-{rows.places}-{rows.ring}"] if rows else []
    parts += [f"strips-{rows.warps}"] if rows and rows.warps else []
    parts += [f"columns-{columns.piece}-{columns.buffers}"] if columns else []
    return "-".join(parts)


def test_the_layouts_cover_the_kernel() -> None:
    found = set().union(*(features(*numbered) for numbered in chosen()))
    assert {kind[1:] for kind in found if kind[0] == "rows over"} == {
        *((1, False), (2, False), (4, False), (8, False)),
        *((2, True), (4, True), (8, True)),
    }
    assert {kind[1] for kind in found if kind[0] == "columns over"} == {1, 2, 4, 8}
    assert {kind[1:] for kind in found if kind[0] == "places"} == {
        *((2, 2, 8), (2, 4, 4), (2, 8, 2), (2, 8, 4)),
        *((4, 1, 8), (4, 2, 4), (4, 4, 2), (4, 4, 4)),
    }
    assert {kind[1] for kind in found if kind[0] == "ring"} >= {3, 4, 6}
    assert {kind[2] for kind in found if kind[0] == "piece"} == {32, 64, 128}
    assert {kind[1] for kind in found if kind[0] == "buffers"} == {1, 2}
    assert {kind[1:] for kind in found if kind[0] == "strips"} >= {(2, 2), (2, 4), (2, 8), (4, 2)}
    assert {kind[1] for kind in found if kind[0] == "strips of a block"} == {1, 2, 4}
    assert {kind[1:] for kind in found if kind[0] == "warps rest"} >= {(True, False), (False, True)}


@pytest.mark.skipif(compiler() is None, reason="the emulator of CUDA kernels needs g++")
@pytest.mark.parametrize("index", range(len(chosen())), ids=[name(layout) for _, layout in chosen()])
@pytest.mark.usefixtures("threads")
def test_layouts(index: int) -> None:
    torch.set_num_threads(1)  # small tensors: waking more takes longer than the work
    number, layout = chosen()[index]
    small = PROBLEMS[number]
    case = small.case()
    problem = small.problem(case)
    y = torch.full_like(case.x, torch.nan)
    tensors = {"x": case.x, "taps": case.logits, "lam": case.lam, "gate": case.gate, "y": y}
    run_plan(lines.plan_of(layout), problem, tensors, seed=index, device=small.device)
    expected = exact(number)
    l2, largest = TOLERANCE[small.dtype]
    assert max_error(y, expected) <= largest
    assert relative_l2(y, expected) <= l2


@pytest.mark.skipif(compiler() is None, reason="the emulator of CUDA kernels needs g++")
@pytest.mark.parametrize("index", range(len(chosen())), ids=[name(layout) for _, layout in chosen()])
@pytest.mark.usefixtures("threads")
def test_what_shared_memory_held_before_changes_no_bit(index: int) -> None:
    """Lanes without places compute with it; they must not decide how others round."""
    torch.set_num_threads(1)
    number, layout = chosen()[index]
    small = PROBLEMS[number]
    case = small.case()
    if small.normalize:  # where all logits of a place are negative there are two ways to its weights
        case = replace(case, logits=case.logits - 8)
    problem = small.problem(case)
    results = []
    for seed in (0, 6):
        y = torch.full_like(case.x, torch.nan)
        tensors = {"x": case.x, "taps": case.logits, "lam": case.lam, "gate": case.gate, "y": y}
        run_plan(lines.plan_of(layout), problem, tensors, seed=seed, device=small.device)
        results.append(y)
    assert torch.equal(*results)


# Down and up meet in the middle; then right and left.
BY_AXIS = (
    (Small(152, 40, channels=4, dtype=BF16, chunk=11), Rows(8, 2, 4), 2, Columns(64, 1), True),
    (
        Small(152, 40, channels=1, dtype=FP16, chunk=11, gate=False),
        Rows(8, 1, 5),
        1,
        Columns(64, 1),
        False,
    ),
    (
        Small(136, 24, channels=2, directions=("left", "up", "right", "down")),
        Rows(4, 2, 3),
        4,
        Columns(32, 2),
        True,
    ),
    (
        Small(72, 24, directions=("up", "down", "left"), normalize=False, lam=False),
        Rows(2, 4, 4),
        2,
        Columns(32, 1),
        False,
    ),
)


@pytest.mark.skipif(compiler() is None, reason="the emulator of CUDA kernels needs g++")
@pytest.mark.parametrize(("small", "rows", "cluster", "columns", "prepared"), BY_AXIS, ids=str)
@pytest.mark.usefixtures("threads")
def test_axis_by_axis(small: Small, rows: Rows, cluster: int, columns: Columns, prepared: bool) -> None:
    torch.set_num_threads(1)
    case = small.case()
    problem = small.problem(case)
    planned, _ = case_of(Inputs(case.x, case.logits, case.lam, case.gate, None, ALL), problem, small.device)
    down_up = Layout(planned, 2, False, 1, 1, rows, None, pair=True, prepared=prepared)
    right_left = Layout(planned, cluster, False, 1, 1, None, columns, prepared=prepared)
    results = []
    for seed in (3, 6):
        y = torch.full_like(case.x, torch.nan)
        tensors = {"x": case.x, "taps": case.logits, "lam": case.lam, "gate": case.gate, "y": y}
        run_plan(lines.plan_of(down_up, right_left), problem, tensors, seed=seed, device=small.device)
        results.append(y)
    assert torch.equal(*results)
    expected = truth(case, problem, (False, False, False, False))["y"]
    l2, largest = TOLERANCE[small.dtype]
    assert max_error(y, expected) <= largest
    assert relative_l2(y, expected) <= l2


def test_large_planes_are_scanned_axis_by_axis() -> None:
    case = imagined_case(1024, 1024)
    assert not lines.axis_by_axis(case), "two planes keep few multiprocessors busy"
    for channels, prepared in ((2, False), (8, True)):
        problem = replace(case.problem, batch=80 // channels, channels=channels)
        large = imagined(problem, "planes", Device())
        down_up, right_left = lines.axis_by_axis(large)
        assert down_up.prepared == right_left.prepared == prepared
        assert down_up.grid == 2 * 80
        assert down_up.room == 2


def imagined_case(height: int, width: int) -> Case:
    x = torch.empty(1, 2, height, width, dtype=BF16, device="meta")
    taps = torch.empty(1, 4, 1, 3, height, width, dtype=BF16, device="meta")
    problem = replace(Problem.of(x, taps, DIRECTIONS, None, True), device="cuda")
    return imagined(problem, "planes", Device())


def test_warps_share_long_rows_of_few_planes() -> None:
    """The layouts that were fastest on an H200: blocks of a cluster, warps of each, lines and ring."""
    expected = {
        (8, 1024, BF16): (8, 2, 8, 4),
        (8, 1024, torch.float32): (8, 2, 8, 4),
        (32, 1024, BF16): (8, 2, 8, 3),
        (16, 512, BF16): (4, 2, 8, 4),
        (8, 2048, BF16): (8, 4, 8, 4),
        (8, 2048, torch.float32): (8, 4, 4, 4),
    }
    for (planes, width, dtype), found in expected.items():
        layout = scan_of_planes(planes, width, dtype)
        rows = layout.rows
        assert rows is not None
        assert (layout.cluster, rows.warps, rows.lines, rows.ring) == found
        assert layout.own_columns == 64
    for declined in (scan_of_planes(64, 1024, BF16), scan_of_planes(8, 1024, BF16, normalize=True)):
        assert declined.rows is not None
        assert not declined.rows.warps


def scan_of_planes(planes: int, width: int, dtype: torch.dtype, *, normalize: bool = False) -> Layout:
    """How square planes are scanned down."""
    x = torch.empty(1, planes, width, width, dtype=dtype, device="meta")
    taps = torch.empty(1, 1, planes, 3, width, width, dtype=dtype, device="meta")
    problem = replace(Problem.of(x, taps, ("down",), None, normalize), device="cuda")
    layout = lines.best_layout(imagined(problem, "planes", Device(), gate=False))
    assert layout is not None
    return layout


def test_long_lines_are_taken() -> None:
    case = imagined_case(4096, 4096)
    assert lines.why_not(case) is None
    assert lines.best_layout(case) is not None


def test_the_stride_of_a_single_column_says_nothing() -> None:
    case = imagined_case(16, 1)
    scan = replace(case, problem=replace(case.problem, directions=("down",), dtype=torch.float32))
    views = {name: replace(view, w=7919) for name, view in scan.views.items()}
    assert lines.why_not(replace(scan, views=views)) is None


@functools.cache
def exact(number: int) -> torch.Tensor:
    small = PROBLEMS[number]
    case = small.case()
    return truth(case, small.problem(case), (False, False, False, False))["y"]
