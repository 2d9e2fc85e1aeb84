"""What the tests of distillation share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from gspn2.integrations.diffusers.distill import DistillConfig
from gspn2.integrations.diffusers.sources import Options, find_source, list_pictures


def settings(pipeline: Path, data: Path | str, out: Path, **changes: Any) -> DistillConfig:
    """A run of a few steps on the CPU."""
    small = {"resolution": 64, "steps": 5, "batch_size": 2, "warmup": 1, "sample_every": 0, "lr": 3e-3}
    return DistillConfig(pipeline, data, out, device="cpu", **{**small, **changes})


def losses(out: Path) -> list[dict[str, Any]]:
    """The log of a run, a step each."""
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def listed(data: Path | str, kept: Path, **options: Any) -> tuple[Any, Any]:
    """The source that `data` names, and the list of its pictures."""
    chosen = Options(**options)
    source = find_source(str(data), chosen)
    return source, list_pictures(source, str(data), chosen, kept, lambda count: None)
