"""Compile every kernel that `gpu.py` will launch, all cores at work, also on a machine that has no GPU.

    GSPN2_CACHE_DIR=cache python benchmarks/gpu_compile.py      for this machine's GPU, or else for an H200
    python benchmarks/gpu_compile.py propagate --plan           only print what the planner decides

Plans depend on sizes, strides and the kind of device, so they can be made ahead; `gpu.py` begins with this. A
kernel's key in the cache covers sources, macros, architecture and compiler: where one of them differs, it is
compiled again.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from functools import cache, partial
from typing import Any

import torch

import gpu_calls
from gpu_cases import BOTH, SECTIONS, Case, make_inputs
from gspn2.backends.cuda import driver, plan, toolchain
from gspn2.backends.cuda.geometry import Case as PlannerCase
from gspn2.backends.cuda.geometry import Device, Kernel, Plan, View


@cache
def device() -> Device:
    return driver.device(0) if torch.cuda.is_available() else Device()


def planned(case: Case, backward: bool, variant: str | None) -> Plan:
    """The plan for the case as the backend poses it, on tensors without memory.

    Raises:
        RuntimeError: the variant declines the case.
    """
    x, taps, lam, gate, dy = make_inputs(case, torch.device("meta"))[0]
    tensors: dict[str, Any] = {"x": x, "taps": taps, "lam": lam, "gate": gate}
    gradients = {f"d{name}": torch.empty_like(it) for name, it in tensors.items() if it is not None}
    is_hidden_state = len(case.directions) == 1 and gate is None
    if not backward or is_hidden_state:
        tensors["y"] = torch.empty_like(x)
    if backward:
        tensors |= {"dy": dy, **gradients}
    views = {name: View.of(tensor) for name, tensor in tensors.items() if tensor is not None}
    return plan.choose(PlannerCase(case.problem(), device(), views, backward), variant)


def passes(sections: list[str]) -> list[tuple[Case, str]]:
    """Every case of the sections, with each of its passes."""
    found: list[tuple[Case, str]] = []
    for name in sections or [*SECTIONS, "calls", "memory"]:
        if name == "calls":
            found += [(case, which) for case in gpu_calls.called() for which in BOTH]
        else:
            cases = gpu_calls.TRAINED if name == "memory" else SECTIONS[name]()
            found += [(case, which) for case in cases for which in case.passes]
    return found


def build(capability: tuple[int, int], kernel: Kernel) -> tuple[float, str]:
    """Compile, or find in the cache; seconds, and what went wrong."""
    begin, error = time.perf_counter(), ""
    try:
        toolchain.code(kernel, toolchain.target(capability))
    except RuntimeError as problem:
        error = str(problem)
    return time.perf_counter() - begin, error


def compile_all(kernels: list[Kernel], jobs: int | None, quiet: bool) -> int:
    """Returns how many failed."""
    begin, failed = time.perf_counter(), 0
    with ProcessPoolExecutor(jobs) as pool:
        done = pool.map(partial(build, device().capability), kernels)
        for kernel, (seconds, error) in zip(kernels, done, strict=True):
            failed += bool(error)
            if error or not quiet:
                macros = " ".join(f"{name}={value}" for name, value in kernel.defines)
                print(f"{seconds:5.1f} s {kernel.source} {macros} {error}", file=sys.stderr, flush=True)
    sources = ", ".join(f"{count} {name}" for name, count in Counter(k.source for k in kernels).items())
    spent = time.perf_counter() - begin
    print(
        f"{len(kernels) - failed} of {len(kernels)} kernels compiled in {spent:.0f} s: {sources}", flush=True
    )
    return failed


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [*SECTIONS, "calls", "memory"]
    parser.add_argument(
        "sections", nargs="*", choices=[[], *names], default=[], metavar="SECTION", help="default: all"
    )
    parser.add_argument("--cases", default="", metavar="REGEX", help="only cases whose name matches")
    parser.add_argument("--variants", metavar="A,B", help="force these variants of the planner")
    parser.add_argument("--jobs", type=int, help="compilations at a time (default: one for each core)")
    parser.add_argument("--plan", action="store_true", help="compile nothing, print the plan of every case")
    parser.add_argument("--quiet", action="store_true", help="print failures and the sum only")
    args = parser.parse_args()
    kernels: dict[Kernel, None] = {}
    for case, which in passes(args.sections):
        if not re.search(args.cases, case.name):
            continue
        for variant in args.variants.split(",") if args.variants else [None]:
            try:
                chosen = planned(case, which == "backward", variant)
            except RuntimeError as error:
                print(f"{case.name} {which}: {error}", file=sys.stderr)
                continue
            kernels |= dict.fromkeys(launch.kernel for launch in chosen.launches)
            if args.plan:
                print(f"{case.name:48} {which:9} {chosen.variant:9} {'; '.join(chosen.reasons)}")
    return 0 if args.plan else int(compile_all(list(kernels), args.jobs, args.quiet) > 0)


if __name__ == "__main__":
    sys.exit(main())
