"""What the benchmark scripts share: timing, the machine's description, and writing a result file."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from shutil import which
from typing import Any

import torch

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
    model = platform.processor()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [
            line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if "model name" in line
        ]
        model = names[0] if names else model
    return {
        **(_gpu() if device == "cuda" else {}),
        "processor": model,
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "numba", "timm") if find_spec(name)},
        **_commit(),
        "command": " ".join(
            [
                Path(sys.executable).name,
                f"benchmarks/{Path(sys.argv[0]).name}",
                os.environ.get("GSPN2_BENCH_ARGUMENTS", " ".join(sys.argv[1:])),
            ]
        ).strip(),
        "date": time.strftime("%Y-%m-%d"),
    }


def _gpu() -> dict[str, Any]:
    """The current CUDA device, its driver, and the versions behind compiled kernels."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    found = subprocess.run(query, capture_output=True, text=True, check=False) if which(query[0]) else None
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {
        "device": properties.name,
        "multiprocessors": properties.multi_processor_count,
        "driver": found.stdout.split("\n")[0].strip() if found and not found.returncode else "unknown",
        "cuda": torch.version.cuda,
        **{name: _version(name) for name in ("triton", "cuda-core", "cuda-bindings", "nvidia-cuda-nvrtc")},
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _commit() -> dict[str, Any]:
    """From git, or from GSPN2_COMMIT where a copy of the files came without it ("abc1234" or "abc1234+")."""
    told = os.environ.get("GSPN2_COMMIT")
    if told:
        return {"commit": told.rstrip("+"), "uncommitted_changes": told.endswith("+")}
    return {
        "commit": _git("rev-parse", "--short", "HEAD"),
        "uncommitted_changes": bool(_git("status", "--porcelain", "--untracked-files=no", "--", "src")),
    }


def _git(*arguments: str) -> str:
    if which("git") is None:
        return ""
    found = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    return found.stdout.strip()


def save(name: str, results: dict[str, Any]) -> Path:
    """Write results, with the machine they were measured on, to benchmarks/results/NAME.json."""
    path = RESULTS / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"machine": machine(), **results}, indent=2) + "\n")
    print(f"wrote {path.relative_to(ROOT)}")
    return path
