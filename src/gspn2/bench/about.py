"""What a run was measured on: processor or GPU, driver, versions, commit, command line."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from shutil import which
from typing import Any

import torch

from .. import __version__

PACKAGE = Path(__file__).resolve().parents[1]
VERSIONS = ("torch", "numba", "timm", "flash-linear-attention")
GPU_VERSIONS = ("triton", "cuda-core", "cuda-bindings", "nvidia-cuda-nvrtc")


def machine(device: torch.device, command: str) -> dict[str, Any]:
    """Everything that a number may depend on.

    Args:
        device: a CUDA device adds the GPU, its driver and what kernels are compiled with.
        command: the command line, as typed.
    """
    names = (*VERSIONS, *(GPU_VERSIONS if device.type == "cuda" else ()))
    found = {name: package_version(name) for name in names}
    return {
        **(_gpu() if device.type == "cuda" else {}),
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        # Of others, when the run begins: a CPU that is shared tells little of the code.
        "load": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "gspn2": __version__,
        **{name: number for name, number in found.items() if number},
        **commit(),
        "command": command,
        "date": time.strftime("%Y-%m-%d"),
    }


def commit() -> dict[str, Any]:
    """From git, from GSPN2_COMMIT ("abc1234", "abc1234+" with changes), or else the installed version."""
    told = os.environ.get("GSPN2_COMMIT")
    if told:
        return {"commit": told.rstrip("+"), "uncommitted_changes": told.endswith("+")}
    found = _git("rev-parse", "--short", "HEAD")
    if not found:
        return {"commit": f"v{__version__}", "uncommitted_changes": False}
    changed = bool(_git("status", "--porcelain", "--untracked-files=no", "--", "."))
    return {"commit": found, "uncommitted_changes": changed}


def package_version(name: str) -> str | None:
    """Of an installed package, or None."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if "model name" in line]
    return names[0] if names else platform.processor() or platform.machine()


def _gpu() -> dict[str, Any]:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    found = subprocess.run(query, capture_output=True, text=True, check=False) if which(query[0]) else None
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {
        "device": properties.name,
        "multiprocessors": properties.multi_processor_count,
        "cache_bytes": properties.L2_cache_size,
        "driver": found.stdout.split("\n")[0].strip() if found and not found.returncode else "unknown",
        "cuda": torch.version.cuda,
    }


def _git(*arguments: str) -> str:
    """Of the checkout that holds the package; nothing for one that is installed inside of another."""
    if which("git") is None or "site-packages" in PACKAGE.parts:
        return ""
    found = subprocess.run(["git", *arguments], cwd=PACKAGE, capture_output=True, text=True, check=False)
    return found.stdout.strip() if not found.returncode else ""
