"""What a model that draws learns from: the velocity alone, or that and a teacher."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .models import mixers_of

WEIGHTS = {"noise": 1.0, "teacher": 0.5, "features": 0.5}
"""Of the losses of a student, as in `gspn2 distill`."""


class Objective:
    """Losses of a model, by name; "loss" is what is minimised.

    Args:
        model: what learns.
        teacher: with other mixers, trained; it is only evaluated.
    """

    def __init__(self, model: nn.Module, teacher: nn.Module | None = None) -> None:
        self.model, self.teacher = model, teacher
        self._outputs: dict[str, list[Tensor]] = {"model": [], "teacher": []}
        if teacher is not None:
            for who, network in (("model", model), ("teacher", teacher)):
                for mixer in mixers_of(network).values():
                    mixer.register_forward_hook(self._keep(who))

    def _keep(self, who: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            self._outputs[who].append(output)

        return hook

    def __call__(self, x: Tensor, t: Tensor, labels: Tensor, velocity: Tensor) -> dict[str, Tensor]:
        """Losses, float32 scalars, of noisy pictures, their times and classes."""
        for outputs in self._outputs.values():
            outputs.clear()
        told = self.model(x, t, labels).float()
        noise = F.mse_loss(told, velocity)
        if self.teacher is None:
            return {"loss": noise}
        with torch.no_grad():
            expected = self.teacher(x, t, labels).float()
        features = [
            _relative_error(mine.float(), theirs.float())
            for mine, theirs in zip(self._outputs["model"], self._outputs["teacher"], strict=True)
        ]
        losses = {
            "noise": noise,
            "teacher": F.mse_loss(told, expected),
            "features": torch.stack(features).mean(),
        }
        return {"loss": sum(WEIGHTS[name] * losses[name] for name in WEIGHTS), **losses}  # type: ignore[dict-item]


def _relative_error(given: Tensor, expected: Tensor) -> Tensor:
    """Mean square over that of the expected, so that layers of any scale count alike; mean over pictures."""
    error = (given - expected).square().mean(dim=(1, 2, 3))
    return (error / expected.square().mean(dim=(1, 2, 3)).clamp_min(1e-8)).mean()
