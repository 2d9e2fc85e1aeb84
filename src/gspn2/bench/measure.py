"""Timing: on a GPU many launches in a CUDA graph, contenders in turn, device events around each replay.

Without a GPU the same functions time plain calls with the host's clock.
"""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

GRAPH_MILLISECONDS = 1.5
"""A graph repeats its launch until it takes about this long: its own start then does not count."""
MOST_LAUNCHES = 256
COPY_BYTES = 4 * 2**30
"""What the copy that gives the bandwidth reads and writes, in all."""


@dataclass(frozen=True)
class Work:
    """Something to time.

    Args:
        call: runs it on input set i and returns its outputs. A graph keeps them, so that every launch in it
            writes to memory of its own.
        sets: number of input sets, used in rotation.
        graph: repeat it in a CUDA graph. A copy is no kernel there but a node of its own, which runs at two
            thirds of the speed.
        warm: call it before it is timed. What takes long and has been called already need not be.
    """

    call: Callable[[int], Any]
    sets: int = 1
    graph: bool = True
    warm: bool = True


@dataclass
class Prepared:
    """Work that is ready to run: `run` does it `launches` times."""

    run: Callable[[], object]
    launches: int
    method: str
    keep: list[Any] = field(default_factory=list)


def prepare(work: Work, device: torch.device) -> Prepared:
    """Compile and warm up, then capture a graph that cycles through the input sets.

    Where capturing fails the plain calls are timed by events; `method` tells.
    """
    if device.type == "cpu":
        for i in range(work.sets if work.warm else 0):
            work.call(i)
        return Prepared(lambda: [work.call(i) for i in range(work.sets)], work.sets, "host clock")
    for i in range(work.sets if work.warm else 0):  # all: one aligned differently may need another kernel
        work.call(i)
    torch.cuda.synchronize()
    if not work.graph:
        return Prepared(lambda: work.call(0), 1, "events")
    once = milliseconds(lambda: work.call(0))
    launches = max(1, min(MOST_LAUNCHES, round(GRAPH_MILLISECONDS / max(once, 1e-3))))
    launches = work.sets * -(-launches // work.sets)
    try:
        graph, outputs = capture(lambda: [work.call(i % work.sets) for i in range(launches)])
    except RuntimeError as error:
        torch.cuda.synchronize()
        warnings.warn(f"no graph: {error}", stacklevel=2)
        return Prepared(lambda: [work.call(i % work.sets) for i in range(launches)], launches, "events")
    graph.replay()
    torch.cuda.synchronize()
    return Prepared(graph.replay, launches, "graph", [graph, outputs])


def capture(run: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
    """A graph of what `run` launches, and what it returned.

    torch.cuda.graph collects garbage first, and empties the allocator's cache: too slow for hundreds of them.
    """
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        graph.capture_begin()
        try:
            outputs = run()
        finally:
            graph.capture_end()
    return graph, outputs


def milliseconds(run: Callable[[], object]) -> float:
    """Device time of one run, between two events."""
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    before.record()
    run()
    after.record()
    after.synchronize()
    return before.elapsed_time(after)


def _host_milliseconds(run: Callable[[], object]) -> float:
    begin = time.perf_counter()
    run()
    return 1e3 * (time.perf_counter() - begin)


def in_turn(
    works: dict[str, Work],
    device: torch.device,
    rounds: int,
    seconds: float | None = None,
    least: int = 3,
    doing: Callable[[Any], None] = lambda name: None,
) -> dict[str, dict[str, Any]]:
    """Time the works in turn, `rounds` times; for each the spread of milliseconds a launch.

    Args:
        works: what to time, by name.
        device: where; its clock is used.
        rounds: samples of each.
        seconds: stop when so much time is spent, if there are `least` samples of each.
        least: see there.
        doing: told the name of each work before it is prepared, and before each sample.
    """
    clock = _host_milliseconds if device.type == "cpu" else milliseconds
    prepared = {}
    for name, work in works.items():
        doing(name)
        prepared[name] = prepare(work, device)
    samples: dict[str, list[float]] = {name: [] for name in works}
    begin = time.perf_counter()
    for turn in range(rounds):
        if seconds is not None and turn >= least and time.perf_counter() - begin > seconds:
            break
        for name, it in prepared.items():
            doing(name)
            samples[name].append(clock(it.run) / it.launches)
    return {
        name: {**spread(samples[name]), "launches": it.launches, "method": it.method}
        for name, it in prepared.items()
    }


def spread(samples: list[float], unit: str = "ms") -> dict[str, Any]:
    """Median, quartiles, extremes and number of samples."""
    low, median, high = statistics.quantiles(samples, n=4) if len(samples) > 1 else samples * 3
    values = {unit: median, "quartiles": [low, high], "range": [min(samples), max(samples)]}
    return {**rounded(values), "runs": len(samples)}


def rounded(value: Any) -> Any:
    """Six digits are more than any clock here has."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(item) for item in value]
    return value


def copy(device: torch.device, size: int = COPY_BYTES) -> Work:
    """A copy that reads and writes `size` bytes in all, of random numbers, far more than any cache holds.

    Without a GPU a part of that: `bytes_per_ms` knows.
    """
    if device.type == "cpu":
        size //= 64
    source = torch.rand(size // 8, device=device)
    target = torch.empty_like(source)
    return Work(lambda _: target.copy_(source), graph=False)


def bytes_per_ms(times: dict[str, Any], device: torch.device, size: int = COPY_BYTES) -> float:
    """Bandwidth from the times of `copy`."""
    return (size // 64 if device.type == "cpu" else size) / times["ms"]
