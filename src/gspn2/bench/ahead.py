"""Compile what a run needs before it starts, on all cores at once.

CUDA kernels: the cases are run on tensors without memory, and what the planner decides is noted.
Models that go through torch.compile: each is called once in a process of its own, which leaves the result in
PyTorch's cache on disk. What fails here is told again by the case that needs it.
"""

from __future__ import annotations

import math
import os
import sys
import time
import traceback
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import replace
from functools import partial
from multiprocessing import connection, get_all_start_methods, get_context
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ..backends import Problem
from ..backends.cuda import driver, plan, states_sum, toolchain
from ..backends.cuda.geometry import Case as PlannerCase
from ..backends.cuda.geometry import Device, Kernel, View
from ..ops.propagate import _problem
from . import launches
from .case import Case, Contender, parts


class Recorder(TorchDispatchMode):
    """While this is on, the operator on tensors without memory notes the kernels that it would launch."""

    def __init__(self, device: Device) -> None:
        super().__init__()
        self.device = device
        self.kernels: dict[Kernel, None] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.gspn2.propagate.default:
            self._forward(result, *args)
        elif func is torch.ops.gspn2.propagate_keeping.default:
            self._keeping(*result, *args)
        elif func is torch.ops.gspn2.propagate_backward.default:
            self._backward(result, *args)
        return result

    def _forward(self, y: Tensor, *args: Any) -> None:
        x, taps, lam, gate, directions, chunk, normalize, _ = args
        problem = _problem(x, taps, directions, chunk, normalize)
        self._note(problem, {"x": x, "taps": taps, "lam": lam, "gate": gate, "y": y}, False)

    def _keeping(self, y: Tensor, h: Tensor, *args: Any) -> None:
        x, taps, lam, gate, directions, chunk, normalize, _ = args
        problem = replace(_problem(x, taps, directions, chunk, normalize), device="cuda")
        tensors = {"x": x, "taps": taps, "lam": lam, "gate": gate, "y": y}
        views = {name: View.of(it) for name, it in tensors.items() if it is not None}
        case, states = PlannerCase(problem, self.device, views), View.of(h)
        plans = [plan.choose(scan) for scan in states_sum.scans(case, states)]
        summed = {"x": states} | {name: views[name] for name in ("gate", "y") if name in views}
        plans.append(states_sum.plan(PlannerCase(problem, self.device, summed)))
        self.kernels |= dict.fromkeys(launch.kernel for it in plans for launch in it.launches)

    def _backward(self, gradients: tuple[Tensor, ...], *args: Any) -> None:
        dy, x, taps, lam, gate, directions, chunk, normalize, _, needs, *rest = args
        tensors = {"x": x, "taps": taps, "lam": lam, "gate": gate}
        named = {
            f"d{name}": gradient
            for name, gradient, needed in zip(tensors, gradients, needs, strict=True)
            if needed and tensors[name] is not None
        }
        hidden = rest[0] if rest else None
        problem = _problem(x, taps, directions, chunk, normalize)
        self._note(problem, {**tensors, "y": hidden, "dy": dy, **named}, True)

    def _note(self, problem: Problem, tensors: dict[str, Tensor | None], backward: bool) -> None:
        views = {name: View.of(it) for name, it in tensors.items() if it is not None}
        case = PlannerCase(replace(problem, device="cuda"), self.device, views, backward)
        self.kernels |= dict.fromkeys(launch.kernel for launch in plan.choose(case).launches)


def kernels(cases: Sequence[Case], device: Device) -> list[Kernel]:
    """What the cases will launch; contenders that do not run without memory add nothing."""
    meta = torch.device("meta")
    recorder = Recorder(device)
    launches.recorded = recorder.kernels
    try:
        with recorder:
            for case in cases:
                for contender in [] if case.host else case.contenders(meta):
                    _try(contender)
    finally:
        launches.recorded = None
    return list(recorder.kernels)


def _try(contender: Contender) -> None:
    with suppress(Exception):
        for it in contender.make().values():
            with suppress(Exception):
                it.work.call(0)


def compile_all(cases: Sequence[Case], index: int, jobs: int | None = None) -> tuple[int, int]:
    """Compile for a device; returns how many kernels there are and how many failed."""
    global _cases
    _cases = cases
    device = driver.device(index)
    with _workers(jobs) as pool:
        wanted = dict.fromkeys(it for found in _noted(pool, cases, device) for it in found)
        failed = sum(pool.map(partial(_fails, device.capability), wanted))
    return len(wanted), failed


COMPILERS = "TORCHINDUCTOR_COMPILE_THREADS"
COMPILER_CORES = 4
"""That a model of torch.compile keeps busy, once it is traced: for that it has only one."""


def compile_models(
    cases: Sequence[Case], jobs: int | None = None, seconds: float | None = None
) -> tuple[int, int]:
    """Fill the cache of torch.compile; returns how many models there are and how many are not ready.

    In a run with a limit, cases that may be left out compile their models themselves, when their turn comes.

    Args:
        cases: of the run.
        jobs: models at a time; None for half as many as there are processors.
        seconds: after which what still compiles is given up, and its case compiles it; None for no limit.
    """
    device = torch.device("cuda")
    wanted = [
        (case.key, number)
        # Training takes longest, so it begins first.
        for case in sorted(cases, key=lambda case: "training" not in case.name)
        if case.compiled and not (case.extra and seconds)
        for number in range(len(case.contenders(device)))
    ]
    jobs = jobs or max(1, (os.cpu_count() or 1) // 2)
    # PyTorch reads this when it is imported: in the process itself it would be too late, and each would start
    # as many compilers as there are processors.
    before = os.environ.get(COMPILERS)
    os.environ[COMPILERS] = str(COMPILER_CORES)
    try:
        ready = side_by_side(_compile_one, wanted, jobs, seconds)
    finally:
        del os.environ[COMPILERS]
        if before is not None:
            os.environ[COMPILERS] = before
    return len(wanted), len(wanted) - ready


def side_by_side(work: Any, wanted: Sequence[Any], jobs: int, seconds: float | None) -> int:
    """Call `work` with each in a process of its own; how many left with 0.

    Args:
        work: a function of a module; what it raises, or a process that dies, is one that is not counted.
        wanted: arguments, one a process.
        jobs: processes at a time.
        seconds: after which those that still run are ended.
    """
    # New processes: one that has asked for a GPU cannot leave it to those that it forks.
    context, waiting = get_context("spawn"), list(wanted)
    ends = math.inf if seconds is None else time.monotonic() + seconds
    running: list[Any] = []
    ready = 0
    while (waiting or running) and time.monotonic() < ends:
        while waiting and len(running) < jobs:
            running.append(context.Process(target=work, args=(waiting.pop(0),)))
            running[-1].start()
        timeout = None if ends == math.inf else max(0.0, ends - time.monotonic())
        connection.wait([it.sentinel for it in running], timeout)
        ended = [it for it in running if it.exitcode is not None]
        running = [it for it in running if it not in ended]
        ready += sum(it.exitcode == 0 for it in ended)
    for it in running:
        it.kill()
        it.join()
    return ready


def _compile_one(which: tuple[str, int]) -> None:
    sys.exit(_does_not_compile(which))


def _does_not_compile(which: tuple[str, int]) -> bool:
    device = torch.device("cuda")
    key, number = which
    try:
        (case,) = (it for part in parts().values() for it in part.cases(device) if it.key == key)
        for it in case.contenders(device)[number].make().values():
            it.work.call(0)
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except Exception:
        if os.environ.get("GSPN2_BENCH_TRACEBACKS"):
            traceback.print_exc()
        return True
    return False


_cases: Sequence[Case] = ()
"""What a worker finds in the memory that it has from its parent: cases cannot be sent."""


def _workers(jobs: int | None) -> ProcessPoolExecutor:
    """Processes that see this one's memory as it is at their start, where that can be had."""
    context = get_context("fork") if "fork" in get_all_start_methods() else None
    return ProcessPoolExecutor(jobs, mp_context=context)


def _noted(pool: ProcessPoolExecutor, cases: Sequence[Case], device: Device) -> Iterable[list[Kernel]]:
    """What each case launches; whole text-to-image models among them take seconds, so side by side."""
    if "fork" not in get_all_start_methods():
        return [kernels(cases, device)]
    # The last cases are the largest.
    return list(pool.map(partial(_kernels_of, device), reversed(range(len(cases)))))


def _kernels_of(device: Device, number: int) -> list[Kernel]:
    torch.set_num_threads(1)
    return kernels(_cases[number : number + 1], device)


def _fails(capability: tuple[int, int], kernel: Kernel) -> bool:
    try:
        toolchain.code(kernel, toolchain.target(capability))
    except RuntimeError:
        return True
    return False
