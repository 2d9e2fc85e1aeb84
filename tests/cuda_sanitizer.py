"""Every variant of the CUDA kernels on small problems, for NVIDIA's compute-sanitizer.

    export PYTORCH_NO_CUDA_MEMORY_CACHING=1 PYTHONPATH=src
    compute-sanitizer --tool memcheck  python tests/cuda_sanitizer.py
    compute-sanitizer --tool racecheck python tests/cuda_sanitizer.py
    compute-sanitizer --tool initcheck python tests/cuda_sanitizer.py
    compute-sanitizer --tool synccheck python tests/cuda_sanitizer.py

PyTorch's allocator cuts tensors out of large blocks, which hides accesses beyond a tensor: without the
variable the script refuses to run. `--compile`, without a sanitizer, only compiles everything on all cores:
most of the time of a first run. racecheck does not know that `__syncwarp` orders what the lanes of a warp
have done before one of them arrives at a barrier for all: `--every-lane-arrives` is a build for it in which
each arrives for itself. Only the project's kernels run on the GPU: tensors are made on the CPU and
copied whole, storage and all, and results are compared there. So initcheck sees who wrote what, and no report
is about anyone else's kernel. `--seconds` bounds the time, after which no further case is begun; first come
cases that differ in everything. The last line is a summary in JSON; the exit code is 1 if a result was wrong.
(`benchmarks/gpu_tests.py` runs all four tools.)
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import product

import pytest
import torch
from torch import Tensor

import gspn2
from cuda_helpers import ALL_LAYOUTS, VARIANTS, Declined, as_weights, forced, line_scan, truth
from gspn2.backends import DIRECTIONS, Problem, reference
from gspn2.backends.cuda.geometry import Case as PlannerCase
from gspn2.backends.cuda.geometry import Kernel, Launch, Plan
from gspn2.backends.keeping import states_of
from helpers import Case, make_case, relative_l2

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1.2e-3}
LAYOUTS = ("records", "planes", "channel_innermost", "strided", "cropped", "misaligned")


@dataclass(frozen=True)
class Size:
    """One problem: small, but more than one tile, stage, warp or chunk of something.

    One direction means no gate, and a backward that is handed the state, as autograd does it. Kept: forward
    leaves the states of all directions, and backward is handed those. Given: `line_scan`, with weights.
    """

    batch: int
    channels: int
    groups: int
    height: int
    width: int
    chunk: int | None = None
    directions: tuple[str, ...] = DIRECTIONS
    kept: bool = False
    given: bool = False


SIZES = (
    Size(2, 4, 1, 14, 14),
    Size(1, 3, 1, 37, 140),
    Size(2, 8, 8, 40, 64, chunk=18),
    Size(2, 8, 1, 32, 12, chunk=21),
    Size(1, 64, 1, 20, 24),
    Size(1, 2, 1, 130, 33),
    Size(2, 32, 4, 9, 32, chunk=5),
    Size(1, 4, 4, 48, 96, directions=("left",)),
    Size(2, 16, 1, 24, 64, chunk=7, directions=("up",)),
    Size(1, 12, 1, 70, 48, chunk=31, kept=True),
    Size(2, 8, 8, 24, 72, kept=True),
    Size(2, 3, 3, 100, 72, chunk=50, directions=("right",), given=True),
    Size(1, 8, 1, 140, 64, directions=("left",), given=True),
    Size(2, 3, 3, 100, 72, chunk=50, directions=("down",), given=True),
    Size(1, 4, 1, 70, 248, chunk=16, directions=("up",), given=True),
    Size(1, 2, 1, 50, 248, chunk=16, directions=("down",), given=True),
    Size(2, 6, 2, 62, 72, chunk=24, directions=("right",), given=True),
    Size(1, 3, 3, 100, 328, directions=("left",), given=True),
)


class Uploaded:
    """Copies of CPU tensors on the GPU with the same memory layout, views of one storage included."""

    def __init__(self) -> None:
        self.storages: dict[int, Tensor] = {}

    def __call__(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.storages:
            whole = torch.empty(0, dtype=tensor.dtype).set_(storage)
            self.storages[storage.data_ptr()] = whole.cuda()
        return self.storages[storage.data_ptr()].as_strided(
            tensor.shape, tensor.stride(), tensor.storage_offset()
        )


def forward(case: Case, problem: Problem, _: Tensor | None) -> dict[str, Tensor]:
    from gspn2.backends.cuda import launch

    return {"y": launch.propagate(case.x, case.logits, case.lam, case.gate, problem)}


def keeping(case: Case, problem: Problem, _: Tensor | None) -> dict[str, Tensor]:
    from gspn2.backends.cuda import launch

    return {"y": launch.propagate_keeping(case.x, case.logits, case.lam, case.gate, problem)[0]}


def backward(case: Case, problem: Problem, hidden: Tensor | None) -> dict[str, Tensor]:
    from gspn2.backends.cuda import launch

    inputs = case.tensors()
    needs = (True, True, "lam" in inputs, "gate" in inputs)
    gradients = launch.propagate_backward(
        case.dy, case.x, case.logits, case.lam, case.gate, problem, needs, hidden
    )
    names = ("dx", "dlogits", "dlam", "dgate")
    return {name: tensor for name, tensor in zip(names, gradients, strict=True) if tensor is not None}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=1e9, help="begin no case after this time")
    parser.add_argument("--variants", default=",".join(VARIANTS), help="only these")
    parser.add_argument("--compile", action="store_true", help="compile only")
    parser.add_argument("--every-lane-arrives", action="store_true", help="a build for racecheck")
    args = parser.parse_args()
    if args.every_lane_arrives:
        from gspn2.backends.cuda import plan

        plan.choose = every_lane_arrives(plan.choose)
    if args.compile:
        return compile_all(args.variants.split(","))
    if os.environ.get("PYTORCH_NO_CUDA_MEMORY_CACHING") != "1":
        sys.exit("set PYTORCH_NO_CUDA_MEMORY_CACHING=1: PyTorch's allocator hides accesses beyond a tensor")
    begin = time.monotonic()
    variants = args.variants.split(",")
    truths: dict[tuple[Size, torch.dtype], tuple[Case, dict[str, Tensor]]] = {}
    ran = {f"{variant} {name}": 0 for variant in variants for name in ("forward", "keeping", "backward")}
    wrong: list[str] = []
    complete = True
    for size, dtype, layout in in_diagonals():
        if time.monotonic() - begin > args.seconds:
            complete = False
            break
        if (size, dtype) not in truths:
            case = posed(size, dtype)
            truths[size, dtype] = case, truth(case, line_scan if size.given else gspn2.propagate)
        case, expected = truths[size, dtype]
        for variant, operator, call in calls(case, layout, variants, expected["y"], size):
            with forced(variant, strictly=True):
                try:
                    found = call()
                except Declined:
                    continue
            ran[f"{variant} {operator}"] += 1
            # Before anything waits for the kernel: should it stop the process, this is what it was.
            print(f"{variant} {operator}, {layout}, {dtype}, {size}", file=sys.stderr, flush=True)
            for name, tensor in found.items():
                error = relative_l2(tensor.cpu(), expected[name])
                if not error <= TOLERANCE[dtype]:
                    wrong.append(f"{variant}, {layout}, {dtype}, {size}: {name} {error:.3g}")
                    print(f"wrong: {wrong[-1]}", flush=True)
    seconds = round(time.monotonic() - begin, 1)
    print(json.dumps({"ran": ran, "wrong": wrong, "complete": complete, "seconds": seconds}), flush=True)
    return 1 if wrong else 0


def in_diagonals() -> list[tuple[Size, torch.dtype, str]]:
    """Every combination, neighbours in the list differing in all three."""
    dtypes = list(TOLERANCE)
    combinations = product(range(len(SIZES)), range(len(dtypes)), range(len(LAYOUTS)))
    order = sorted(combinations, key=lambda c: ((c[1] - c[0]) % len(dtypes), (c[2] - c[0]) % len(LAYOUTS)))
    return [(SIZES[size], dtypes[dtype], LAYOUTS[layout]) for size, dtype, layout in order]


def posed(size: Size, dtype: torch.dtype) -> Case:
    """The problem, on the CPU."""
    case = make_case(
        size.batch,
        size.channels,
        size.height,
        size.width,
        size.groups,
        size.directions,
        size.chunk,
        dtype,
        gate=len(size.directions) > 1,
    )
    return as_weights(case) if size.given else case


def calls(
    case: Case, layout: str, variants: list[str], y: Tensor, size: Size
) -> Iterator[tuple[str, str, Callable[[], dict[str, Tensor]]]]:
    """By variant and pass, what runs it on the GPU."""
    laid, upload = ALL_LAYOUTS[layout](case), Uploaded()
    uploaded = laid.map(upload)
    hidden = upload(torch.empty_like(laid.x).copy_(y)) if case.gate is None else None
    problem = Problem.of(uploaded.x, uploaded.logits, case.directions, case.chunk, normalize=not size.given)
    if size.kept:
        hidden = upload(states_of(reference.propagate, laid.x, laid.logits, laid.lam, problem))
    for variant, operator in product(variants, (keeping if size.kept else forward, backward)):
        yield variant, operator.__name__, partial(operator, uploaded, problem, hidden)


ONE_LANE_ARRIVES = ("pixels_forward.cu", "strips_forward.cu", "strips_vertical.cu", "strips_column.cu")
"""Kernels where a lane arrives at an mbarrier for its warp, unless they are built for racecheck."""


def every_lane_arrives(choose: Callable[..., Plan]) -> Callable[..., Plan]:
    """Plans whose kernels meet at an mbarrier lane by lane."""

    def built(launch: Launch) -> Launch:
        if launch.kernel.source not in ONE_LANE_ARRIVES:
            return launch
        defines = (*launch.kernel.defines, ("EVERY_LANE_ARRIVES", 1))
        return replace(launch, kernel=replace(launch.kernel, defines=defines))

    def chosen(case: PlannerCase, variant: str | None = None) -> Plan:
        found = choose(case, variant)
        return replace(found, launches=tuple(map(built, found.launches)))

    return chosen


class Planned(Exception):
    """A call that was to be planned only, and is."""


@contextmanager
def planning(kernels: dict[Kernel, None]) -> Iterator[None]:
    """Calls note their kernels and end there, with `Planned`."""
    from gspn2.backends.cuda import launch

    choose = launch.choose

    def note(case: PlannerCase) -> Plan:
        kernels.update(dict.fromkeys(it.kernel for it in choose(case).launches))
        raise Planned

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "choose", note)
        yield


def compile_all(variants: list[str]) -> int:
    """Every kernel of every case into the cache on disk; the exit code is 1 if one does not compile."""
    from gspn2.backends.cuda import driver

    kernels: dict[Kernel, None] = {}
    for size, dtype, layout in in_diagonals():
        case = posed(size, dtype)
        for variant, _, call in calls(case, layout, variants, case.x, size):
            with suppress(Declined, Planned), forced(variant, strictly=True), planning(kernels):
                call()
    with ProcessPoolExecutor() as pool:
        failed = sum(pool.map(partial(fails, driver.device(0).capability), kernels))
    print(f"{len(kernels) - failed} of {len(kernels)} kernels compiled")
    return int(failed > 0)


def fails(capability: tuple[int, int], kernel: Kernel) -> bool:
    from gspn2.backends.cuda import toolchain

    try:
        toolchain.code(kernel, toolchain.target(capability))
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return True
    return False


if __name__ == "__main__":
    sys.exit(main())
