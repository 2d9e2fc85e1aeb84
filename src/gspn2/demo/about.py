"""What a run was made on and with: the report's footer."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from datetime import UTC, datetime

PACKAGES = ("torch", "timm", "torchvision", "numpy", "scikit-learn")


def about(command: str, seed: int, seconds: float) -> dict[str, str]:
    """Facts of the run as pairs of name and text, in the order to print them."""
    import torch

    from .. import __version__

    versions = [f"gspn2 {__version__}", f"Python {platform.python_version()}"]
    versions += [f"{name} {importlib.metadata.version(name)}" for name in PACKAGES]
    return {
        "Command": command,
        "Seed": str(seed),
        "Duration": f"{seconds:.0f} s in all",
        "Finished": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "Machine": f"{processor()}, {usable_cores()} cores usable, "
        f"{torch.get_num_threads()} PyTorch threads, {platform.system()}",
        "Versions": ", ".join(versions),
    }


def usable_cores() -> int:
    """Cores that this process may run on; fewer than the machine's in a container or under taskset."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def processor() -> str:
    """The processor's name, as far as the system tells."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            for line in lines:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine() or "unknown processor"
