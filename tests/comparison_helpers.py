"""What the tests of `gspn2.training.comparison` share: small runs, and results that nobody trained."""

from __future__ import annotations

import dataclasses
from typing import Any

from gspn2.training.comparison import MAIN, Run, Settings, plan

TINY = Settings(steps=6, batch_size=4, train_images=16, test_images=8, tests=3, amp="off")
VIT = Run("maze", 32, "vit", 0)


def small_runs() -> list[Run]:
    """A small run of each of the three, and of an ablation."""
    return plan(["maze"], [32], [0], [*MAIN, "gspn2-local"])


def made_up(
    contender: str, accuracy: float, seconds: float, seed: int = 0, step: int = 100
) -> dict[str, Any]:
    """A result of a run in the maze, with a curve of two points."""
    tested = {"test_loss": 0.5, "train_loss": 0.4}
    curve = [
        {"step": step // 2, "seconds": seconds / 2, "accuracy": accuracy - 0.2, **tested},
        {"step": step, "seconds": seconds, "accuracy": accuracy, **tested},
    ]
    machine = {"processor": "a CPU", "python": "3", "torch": "2", "commit": "abc", "date": "2026-01-01"}
    return {
        "run": dataclasses.asdict(Run("maze", 64, contender, seed)),
        "settings": dataclasses.asdict(TINY),
        "parameters": 1_243_000,
        "ended": "steps",
        "step": step,
        "steps": 100,
        "seconds": seconds,
        "curve": curve,
        "accuracy": accuracy,
        "transfer": {"scaled": {"accuracy": accuracy - 0.1}, "larger": {"accuracy": accuracy - 0.3}},
        "machine": machine | {"uncommitted_changes": False},
    }
