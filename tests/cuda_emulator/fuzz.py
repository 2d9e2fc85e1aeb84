"""Random problems for the CUDA kernels, run in the emulator and compared with the reference in float64.

`python -m cuda_emulator.fuzz --seconds 600` in `tests` draws problems, devices and ways to cut the work, and
gives every variant the same share of the time, also on problems that the planner has another one for. A
failure is printed with its seed and shrunk; `--seed N` with that variant draws it again. Compiling a kernel
takes much longer than running it, so each is run on several sizes that need no other (`relatives`).
"""

from __future__ import annotations

import argparse
import contextlib
import random
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from unittest import mock

import torch
from torch import Tensor

from gspn2.backends import reference
from gspn2.backends.cuda import plan as planner
from gspn2.backends.cuda import states_sum
from gspn2.backends.cuda.geometry import Case, Device, Launch, Plan, View
from gspn2.backends.cuda.variants import (
    lines,
    pixels_forward,
    planes,
    planes_backward,
    planes_backward_memory,
    planes_backward_pieces,
    planes_layout,
    planes_tiles,
    resident_exchange,
    resident_straight_backward,
    strips,
    strips_column,
    strips_vertical,
    tiles,
)
from gspn2.backends.keeping import empty_states, one_direction
from gspn2.backends.problem import Problem
from helpers import Case as Tensors
from helpers import max_error, relative_l2

from .drawing import ANY, LIKELY, WORK, draw_problem, sizes
from .emulator import Inputs, case_of, run_plan
from .problems import BF16, COMMON, FP16, Small, extra, truth

NAMES = ("dx", "dtaps", "dlam", "dgate")

TOLERANCE = {torch.float32: (6e-6, 6e-6), BF16: (4e-3, 1.3 * 2**-8), FP16: (6e-4, 1.3 * 2**-11)}
"""Relative in L2, and of the largest error: wider than in `test_cuda_kernels`, as there are more problems."""


@dataclass(frozen=True)
class Drawn:
    """A problem and how it is run.

    Args:
        small: what is asked for, and of which device; `hidden` hands states of all directions to backward.
        variant: by its name, or "kept" for forward that keeps its states.
        backward: gradients instead of y.
        choice: seed of the cut taken where a variant has several; None for the planner's.
        large: small images go the ways of large ones.
        order: seed of the order in which threads run.
    """

    small: Small
    variant: str
    backward: bool
    choice: int | None
    large: bool
    order: int


def draw(seed: int, variants: tuple[str, ...]) -> Drawn:
    """A problem that one of these variants takes."""
    rng = random.Random(seed)
    while True:
        variant = rng.choice(variants)
        drawn = Drawn(
            draw_problem(rng, LIKELY.get(variant, ANY)),
            variant,
            rng.random() < 0.5,
            rng.choice((None, rng.randrange(2**30))),
            rng.random() < 0.3,
            rng.randrange(12),
        )
        if variant == "planes_tiles":
            drawn = _in_tiles(drawn)
        if takes(drawn):
            return drawn


def _in_tiles(drawn: Drawn) -> Drawn:
    """What tiles may take: hardly any other problem is."""
    small = drawn.small
    groups = small.groups if small.channels // small.groups >= 4 else 1
    small = replace(small, width=-(-small.width // 8) * 8, groups=groups, dtype=BF16, normalize=True)
    return replace(drawn, small=replace(small, hidden=False), large=True)


def known(seed: int, variants: tuple[str, ...]) -> Drawn:
    """One of the cases of `test_cuda_kernels`, whose kernels the test suite has compiled."""
    rng = random.Random(seed)
    while True:
        variant = rng.choice(variants)
        small = rng.choice((*COMMON, *extra(variant)))
        drawn = Drawn(small, variant, rng.random() < 0.5, None, False, rng.randrange(12))
        if not small.nan and small.layout != "far" and takes(drawn):
            return drawn


def relatives(drawn: Drawn, rng: random.Random, count: int) -> Iterator[Drawn]:
    """Other sizes that run the same kernels."""
    kernels = {launch.kernel for launch in all_launches(drawn)}
    for _ in range(10 * count):
        small = drawn.small
        batch, channels, height, width = sizes(rng, len(small.directions))
        kind = rng.random()
        if kind < 0.6:
            batch, channels = small.batch, small.channels
        if 0.6 < kind < 0.8:
            height, width = small.height, small.width
        groups = 1 if small.groups == 1 else channels if small.groups == small.channels else small.groups
        if channels % groups or batch * channels * height * width * len(small.directions) > WORK:
            continue
        chunk = rng.choice((small.chunk, None, rng.randrange(1, 40)))
        other = replace(small, batch=batch, channels=channels, groups=groups, height=height, width=width)
        found = replace(drawn, small=replace(other, chunk=chunk), order=rng.randrange(12))
        if takes(found) and {launch.kernel for launch in all_launches(found)} <= kernels:
            yield found
            count -= 1
            if not count:
                return


# Planning and running --------------------------------------------------------------------------------------


def any_strips(case: Case) -> strips.Layout | None:
    """Strips of planes of any size."""
    return next(strips.layouts(case), None)


def any_rows(case: Case) -> strips_vertical.Layout | None:
    """The same of rows."""
    return next(strips_vertical.layouts(case), None)


@contextlib.contextmanager
def ways_of_large_images(wanted: bool) -> Iterator[None]:
    """As of images of 512 x 512 and more: tiles, strips; in backward of planes weights, parts or chains.

    Forward of pixels as of many channels: weights that are made once for all of them.
    """
    if not wanted:
        yield
        return
    changed = {"CHAINED_LINES": 8, "COLUMNS": 1, "PARTS": 0.0, "SUMS": 1e9, "LONGEST_CHAIN": 3}
    with (
        mock.patch.multiple(planes_backward_memory, **changed),
        mock.patch.multiple(planes_tiles, WAVES=0, FILLED=1e9, SHORTEST=0, MOST_PLANES=10**9),
        mock.patch.object(pixels_forward, "MANY_BLOCKS", 1),
        mock.patch.object(tiles, "slower", return_value=None),
        mock.patch.object(strips, "best_layout", any_strips),
        mock.patch.object(strips_vertical, "best_layout", any_rows),
        mock.patch.object(strips_column, "slower", return_value=False),
    ):
        yield


def plan_of(variant: str, case: Case, choice: int | None) -> Plan:
    """The plan of a variant, cut as `choice` decides."""
    if choice is None:
        return planner.variants()[variant].plan(case)
    rng = random.Random(choice)
    if variant == "lines":
        return lines.plan_of(rng.choice(list(lines.layouts(case))))
    if variant == "tiles":
        return tiles.plan_of(case, rng.choice(list(tiles.cuts(case))))
    if variant == "strips":
        # On a small GPU the last planes are cut.
        multiprocessors = rng.choice((case.device.multiprocessors, 9, 14, 27))
        case = replace(case, device=replace(case.device, multiprocessors=multiprocessors))
        return strips.plan_of(rng.choice(list(strips.layouts(case))))
    if variant == "strips_vertical":
        return strips_vertical.plan_of(rng.choice(list(strips_vertical.layouts(case))))
    if variant == "planes" and not case.backward:
        return planes.plan_of(rng.choice(list(planes_layout.layouts(case))))
    if variant == "planes":
        return planes_backward.plan(case, {d: _cut(case, d, rng) for d in case.problem.directions})
    if variant == "planes_tiles":
        return planes_tiles.plan(case, _tiles(case, rng))
    if variant == "pixels" and not case.backward and (tiling := pixels_forward.tiling_of(case)):
        ways = list(pixels_forward.ways(case, replace(tiling, prepared=False)))
        return pixels_forward.plan(case, rng.choice(ways))
    if variant == "resident" and (rows := list(resident_exchange.layouts(case))):
        return resident_exchange.plan_of(case, rng.choice(rows), 32 * rng.randrange(4, 33))
    if variant == "resident" and (found := list(resident_straight_backward.layouts(case))):
        return resident_straight_backward.plan_of(case, rng.choice(found), 32 * rng.randrange(1, 33))
    return planner.variants()[variant].plan(case)


def _cut(
    case: Case, direction: str, rng: random.Random
) -> planes_backward.Cut | tuple[planes_backward_pieces.Pieces, ...]:
    cuts = list(planes_backward.cuts(case, direction))
    if direction in ("right", "left"):
        walks = planes_backward.walks(case, direction)
        pieces = [list(planes_backward_pieces.pieces(case, walk)) for walk in walks]
        # With states at hand only these read them.
        if all(pieces) and (not cuts or planes_backward.is_at_hand(case) or rng.random() < 0.6):
            # The walk back finds states in tiles as wide as those in which the walk forward left them.
            common = set.intersection(*({cut.piece for cut in found} for found in pieces))
            piece = rng.choice(sorted(common))
            return tuple(rng.choice([cut for cut in found if cut.piece == piece]) for found in pieces)
    return rng.choice(cuts)


def _tiles(case: Case, rng: random.Random) -> planes_tiles.Choice:
    strips = rng.choice(planes_tiles.cuts(case) or [None])
    return planes_tiles.Choice(
        rng.choice((2, 3, 4, 6)), strips, rng.choice((None, 2, 3)), rng.choice((None, 1, 3))
    )


def _states(small: Small, case: Tensors, problem: Problem) -> Tensor:
    """What forward leaves for backward, rounded."""
    exact = case.to(torch.float64)
    inputs = (exact.x, exact.logits.nan_to_num(0), exact.lam, exact.gate)
    states = empty_states(case.x, len(small.directions))
    _, found = reference.propagate_keeping(*inputs, replace(problem, dtype=torch.float64))
    return states.copy_(found)


Posed = tuple[Case, dict[str, Tensor], Problem]


def posed(drawn: Drawn, states_of: Callable[[Small, Tensors, Problem], Tensor] = _states) -> Posed:
    """The planner's case and the tensors, gradients filled with NaN."""
    small = drawn.small
    case = small.case()
    problem = small.problem(case)
    dy = None
    if drawn.backward:
        # As the backend does it: what is expanded is copied.
        dy = torch.empty_like(case.x).copy_(case.dy) if 0 in case.dy.stride() else case.dy
    inputs = Inputs(case.x, case.logits, case.lam, case.gate, dy, small.needs)
    planned, tensors = case_of(inputs, problem, small.device)
    if drawn.backward and small.hidden:
        states = states_of(small, case, problem)
        if len(small.directions) == 1 and not small.gate:
            states = states[:, 0]
        tensors["y"] = states
        planned = replace(planned, views=planned.views | {"y": View.of(states)})
    return planned, tensors, problem


def takes(drawn: Drawn) -> bool:
    if drawn.variant == "kept":
        return not drawn.backward
    case, tensors, _ = _to_plan(drawn)
    if drawn.backward and not any(name in tensors for name in NAMES):
        return False
    with ways_of_large_images(drawn.large):
        return planner.variants()[drawn.variant].why_not(case) is None


def _to_plan(drawn: Drawn) -> Posed:
    """As `posed`; what states hold does not matter."""
    return posed(drawn, lambda small, case, problem: empty_states(case.x, len(small.directions)))


def all_plans(drawn: Drawn, posed_case: Posed) -> list[Plan]:
    planned, tensors, problem = posed_case
    with ways_of_large_images(drawn.large):
        if drawn.variant != "kept":
            return [plan_of(drawn.variant, planned, drawn.choice)]
        states = View.of(empty_states(tensors["x"], len(problem.directions)))
        found = [planner.choose(case) for case in states_sum.scans(planned, states)]
        gate = {"gate": planned.views["gate"]} if "gate" in planned.views else {}
        views = {"x": states, **gate, "y": planned.views["y"]}
        return [*found, states_sum.plan(Case(problem, planned.device, views))]


def all_launches(drawn: Drawn) -> list[Launch]:
    return [launch for plan in all_plans(drawn, _to_plan(drawn)) for launch in plan.launches]


def run(drawn: Drawn) -> dict[str, Tensor]:
    """The outputs, by name."""
    posed_case = posed(drawn)
    planned, tensors, problem = posed_case
    plans = all_plans(drawn, posed_case)
    if drawn.variant == "kept":
        states = empty_states(tensors["x"], len(problem.directions)).fill_(torch.nan)
        for d, plan in enumerate(plans[:-1]):
            own = {name: tensors[name][:, d : d + 1] for name in ("taps", "lam") if name in tensors}
            own |= {"x": tensors["x"], "y": states[:, d]}
            run_plan(plan, one_direction(problem, d), own, drawn.order, planned.device)
        gate = {"gate": tensors["gate"]} if "gate" in tensors else {}
        run_plan(plans[-1], problem, {"x": states, **gate, "y": tensors["y"]}, drawn.order, planned.device)
        return {"y": tensors["y"], "states": states}
    run_plan(plans[0], problem, tensors, drawn.order, planned.device)
    wanted = NAMES if drawn.backward else ("y",)
    return {name: tensors[name] for name in wanted if name in tensors}


class Wrong(AssertionError):
    """Results that differ from the reference, or from run to run."""


def check(drawn: Drawn) -> None:
    """Runs a problem twice, with another order of threads and other leftovers in shared memory.

    Raises:
        Wrong: a result is not what it should be.
        KernelError: see `emulator.run_plan`.
    """
    found = run(drawn)
    again = run(replace(drawn, order=(drawn.order + 7) % 12))
    small = drawn.small
    case = small.case()
    problem = small.problem(case)
    right = truth(case, problem, small.needs if drawn.backward else (False,) * 4)
    right |= {"states": _states(small, case, problem)} if drawn.variant == "kept" else {}
    several = drawn.variant == "kept" or (drawn.backward and small.hidden)
    for name, tensor in found.items():
        # Sums of states that were rounded, and gradients from them: those of taps are differences.
        roundings = 1 if not several else 4 if name == "dtaps" else 2
        l2, largest = (roundings * limit for limit in TOLERANCE[small.dtype])
        if not torch.equal(tensor.nan_to_num(nan=1e30), again[name].nan_to_num(nan=1e30)):
            raise Wrong(f"{name} depends on the order of threads, or on what shared memory held")
        if tensor.isnan().any():
            raise Wrong(f"{name}: {int(tensor.isnan().sum())} of {tensor.numel()} elements are NaN")
        error, norm = max_error(tensor, right[name]), relative_l2(tensor, right[name])
        if not error <= largest or (tensor.numel() > 256 and not norm <= l2):
            raise Wrong(f"{name}: largest error {error:.2e}, relative L2 {norm:.2e}")


# Failures --------------------------------------------------------------------------------------------------


def failure(drawn: Drawn) -> str | None:
    """What goes wrong, or None."""
    try:
        check(drawn)
    except Exception as error:
        return f"{type(error).__name__}: {error}" if str(error) else traceback.format_exc()
    return None


def simpler(drawn: Drawn) -> Iterator[Drawn]:
    """Problems that are a step simpler, boldest first."""
    small = drawn.small
    for name in ("height", "width", "channels", "batch"):
        value = getattr(small, name)
        for less in dict.fromkeys((value // 4, value // 2, value - 8, value - 1)):
            if 0 < less < value:
                other = replace(small, **{name: less})
                if name == "channels":
                    groups = {1: 1, small.channels: less}.get(small.groups, small.groups)
                    if less % groups:
                        continue
                    other = replace(other, groups=groups)
                yield replace(drawn, small=other)
    for d in range(len(small.directions) if len(small.directions) > 1 else 0):
        yield replace(
            drawn, small=replace(small, directions=small.directions[:d] + small.directions[d + 1 :])
        )
    plainer = {"chunk": None, "lam": False, "gate": False, "hidden": False, "normalize": True, "dy": "like x"}
    plainer |= {
        "groups": 1,
        "dtype": torch.float32,
        "layout": "planes",
        "needs": (True,) * 4,
        "device": Device(),
    }
    for name, value in plainer.items():
        if getattr(small, name) != value:
            yield replace(drawn, small=replace(small, **{name: value}))
    for name, value in {"choice": None, "large": False, "order": 0}.items():
        if getattr(drawn, name) != value:
            yield replace(drawn, **{name: value})


def shrunk(drawn: Drawn, seconds: float = 240, fails: Callable[[Drawn], str | None] = failure) -> Drawn:
    """A simpler problem that fails, too; as simple as there is time for."""
    end = time.monotonic() + seconds
    progress = True
    while progress and time.monotonic() < end:
        progress = False
        for other in simpler(drawn):
            if time.monotonic() > end:
                break
            with contextlib.suppress(Exception):  # what nobody can pose
                if takes(other) and fails(other):
                    drawn, progress = other, True
                    break
    return drawn


Draw = Callable[[int, tuple[str, ...]], Drawn]


def campaign(seconds: float, first: int, variants: tuple[str, ...], others: int, draws: Draw = draw) -> int:
    """Draws problems until the time is over; returns how many failed."""
    end, spent, runs, failures = time.monotonic() + seconds, Counter(), Counter(), 0
    seed, told = first, time.monotonic()
    while time.monotonic() < end:
        variant = min(variants, key=lambda name: spent[name])
        start = time.monotonic()
        drawn = draws(seed, (variant,))
        for number, one in enumerate((drawn, *relatives(drawn, random.Random(seed), others))):
            runs[variant] += 1
            wrong = failure(one)
            if wrong is not None:
                failures += 1
                print(f"--seed {seed} --variants {variant}, relative {number}: {one}\n  {wrong}", flush=True)
                print(f"shrunk: {(less := shrunk(one))}\n  {failure(less)}", flush=True)
                break
        Small.case.cache_clear()
        spent[variant] += time.monotonic() - start
        seed += 1
        if time.monotonic() > told + 300:
            told = time.monotonic()
            print(f"seed {seed}: {dict(runs)} runs", flush=True)
    print(f"{dict(runs)} runs, seeds {first} to {seed - 1}, {failures} failures", flush=True)
    return failures


def main() -> int:
    names = (*planner.variants(), "kept")
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--variants", type=lambda text: tuple(text.split(",")), default=names)
    parser.add_argument("--relatives", type=int, default=6, help="other sizes for each problem")
    parser.add_argument("--known", action="store_true", help="other sizes of cases of the test suite only")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    draws = known if arguments.known else draw
    found = campaign(arguments.seconds, arguments.seed, arguments.variants, arguments.relatives, draws)
    return int(found > 0)


if __name__ == "__main__":
    raise SystemExit(main())
