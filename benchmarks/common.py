"""What the benchmark scripts share: timing, the machine's description, and writing a result file."""

from __future__ import annotations

import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent


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


def machine() -> dict[str, Any]:
    """Processor, versions and commit of this run."""
    model = platform.processor()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [
            line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if "model name" in line
        ]
        model = names[0] if names else model
    return {
        "processor": model,
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "numba", "timm") if find_spec(name)},
        "commit": _git("rev-parse", "--short", "HEAD"),
        "uncommitted_changes": bool(_git("status", "--porcelain", "--untracked-files=no", "--", "src")),
        "command": " ".join(
            [Path(sys.executable).name, f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]
        ),
        "date": time.strftime("%Y-%m-%d"),
    }


def _git(*arguments: str) -> str:
    found = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    return found.stdout.strip()


def save(name: str, results: dict[str, Any]) -> Path:
    """Write results, with the machine they were measured on, to benchmarks/results/NAME.json."""
    path = ROOT / "benchmarks" / "results" / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"machine": machine(), **results}, indent=2) + "\n")
    print(f"wrote {path.relative_to(ROOT)}")
    return path
