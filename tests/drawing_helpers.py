"""What the tests of `gspn2.training.drawing` share: settings and models that take a moment."""

from __future__ import annotations

import pytest
import torch

from gspn2.training.drawing import Settings, models, samples

TINY = Settings(
    steps=8, batch_size=8, lr=3e-3, samples=40, sampler_steps=1, judge_steps=2, tests=2, amp="off"
)


def shrink(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models that take a moment, and few uses of them."""
    for name, value in {"HEAD_DIM": 8, "UNET_DIMS": (8, 16, 16), "DIT_DIM": 16, "DIT_DEPTH": 1}.items():
        monkeypatch.setattr(models, name, value)
    monkeypatch.setattr(samples, "USES", ("1x", "2x", "2x-dilated", "2x-enlarged"))


def seeded(seed: int = 0) -> torch.Generator:
    """A generator that draws the same for everybody."""
    return torch.Generator().manual_seed(seed)
