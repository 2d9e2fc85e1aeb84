"""What the benchmark scripts share: timing, the machine's description, and writing a result file."""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch

from gspn2.bench import about

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def interleaved(
    functions: dict[str, Callable[[], object]], seconds: float = 3.0, least: int = 5
) -> dict[str, Any]:
    """Time the functions in turn, so that a disturbance meets all alike.

    Returns for each the median, the fastest and the number of runs, in milliseconds. Rounds go on until
    `seconds` are spent, and for at least `least` rounds. Every turn starts with a run that does not count:
    the others have just had the caches, the allocator and the threads.
    """
    samples: dict[str, list[float]] = {name: [] for name in functions}
    for function in functions.values():
        function()
    start = time.perf_counter()
    while time.perf_counter() - start < seconds or len(next(iter(samples.values()))) < least:
        for name, function in functions.items():
            function()
            for _ in range(2):
                begin = time.perf_counter()
                function()
                samples[name].append(1e3 * (time.perf_counter() - begin))
    return {
        name: {"median_ms": statistics.median(times), "fastest_ms": min(times), "runs": len(times)}
        for name, times in samples.items()
    }


def rotating_copy(size: int, footprint: int = 256 * 2**20) -> Callable[[], object]:
    """A copy that reads and writes `size` bytes in all, from buffers that no cache still holds."""
    count = max(2, -(-footprint // size))
    elements = size // 8
    sources = [torch.rand(elements) for _ in range(count)]
    targets = [torch.rand(elements) for _ in range(count)]
    turn = 0

    def copy() -> None:
        nonlocal turn
        turn = (turn + 1) % count
        targets[turn].copy_(sources[turn])

    return copy


@cache
def machine(device: str = "cpu") -> dict[str, Any]:
    """Processor or GPU, versions and commit of this run.

    Args:
        device: "cuda" adds the GPU, its driver and what kernels are compiled with.
    """
    arguments = os.environ.get("GSPN2_BENCH_ARGUMENTS", " ".join(sys.argv[1:]))
    command = f"{Path(sys.executable).name} benchmarks/{Path(sys.argv[0]).name} {arguments}".strip()
    return about.machine(torch.device(device), command)


def save(name: str, results: dict[str, Any]) -> Path:
    """Write results, with the machine they were measured on, to benchmarks/results/NAME.json."""
    path = RESULTS / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"machine": machine(), **results}, indent=2) + "\n")
    print(f"wrote {path.relative_to(ROOT)}")
    return path
