"""Which models learn to draw, and what they share."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import UserError
from .judge import STEPS

SEEDS = (0, 1, 2)
FREE = ("minutes", "graph")
"""Settings that a run that reaches its last step does not depend on."""


@dataclass(frozen=True)
class Drawer:
    """A model that learns to draw.

    Args:
        name: as the command line and file names have it.
        label: for people.
        architecture: "unet" or "dit".
        kind: of its mixers, "attention" or "gspn2".
        teacher: name of the model whose weights it has but for the mixers, which learn from it.
    """

    name: str
    label: str
    architecture: str
    kind: str
    teacher: str = ""


# A teacher comes before its student.
DRAWERS = {
    it.name: it
    for it in (
        Drawer("unet-attention", "UNet, self-attention", "unet", "attention"),
        Drawer("unet-gspn2", "UNet, GSPN-2", "unet", "gspn2"),
        Drawer("dit-attention", "DiT, self-attention", "dit", "attention"),
        Drawer("dit-gspn2", "DiT, GSPN-2", "dit", "gspn2"),
        Drawer("unet-distilled", "UNet, GSPN-2 distilled", "unet", "gspn2", teacher="unet-attention"),
    )
}


@dataclass(frozen=True)
class Settings:
    """What all runs share, so that they differ in the model alone.

    Args:
        steps: of the optimizer.
        batch_size: pictures a step.
        lr: peak learning rate of AdamW, after a warm-up of a twentieth of the steps, before half a cosine.
        samples: pictures in each set that is judged.
        sampler_steps: of Heun's method, from noise to a picture.
        judge_steps: the classifier's training.
        tests: times that samples are judged in the course of a run.
        minutes: time of a run, samples included; it then ends where it is, and says so.
        amp: "auto" (bfloat16 on CUDA), "bf16" or "off".
        graph: replay steps as a CUDA graph, on CUDA.

    Raises:
        UserError: a number is not positive, or there are too few samples for a distance.
    """

    steps: int = 2000
    batch_size: int = 128
    lr: float = 1e-3
    samples: int = 500
    sampler_steps: int = 12
    judge_steps: int = STEPS
    tests: int = 4
    minutes: float = 20.0
    amp: str = "auto"
    graph: bool = True

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            # `not` also refuses NaN.
            if field.name not in ("amp", "graph") and not value > 0:
                raise UserError(f"{field.name}: expected more than 0, got {value}")
        if self.samples < 40:
            raise UserError(f"samples: expected at least 40, four of each class, got {self.samples}")
        if self.amp not in ("auto", "off", "bf16"):
            raise UserError(f"amp: expected auto, off or bf16, got {self.amp!r}")

    def decisive(self) -> dict[str, Any]:
        """Those that change what a run that reaches its last step comes to."""
        return {name: value for name, value in dataclasses.asdict(self).items() if name not in FREE}


@dataclass(frozen=True)
class Run:
    """One training: a name out of `DRAWERS`, and the seed of weights, data and samples."""

    model: str
    seed: int

    @property
    def name(self) -> str:
        """Of its files."""
        return f"{self.model}-s{self.seed}"

    @property
    def drawer(self) -> Drawer:
        """What learns."""
        return DRAWERS[self.model]

    @property
    def teacher(self) -> Run | None:
        """The run whose weights it starts from."""
        return Run(self.drawer.teacher, self.seed) if self.drawer.teacher else None


def plan(models: Sequence[str] = tuple(DRAWERS), seeds: Sequence[int] = SEEDS) -> list[Run]:
    """The runs, seed by seed, teachers before their students.

    Raises:
        UserError: no such model, or one of them, or a seed, named twice.
    """
    unknown = [name for name in models if name not in DRAWERS]
    if unknown:
        raise UserError(f"models: expected some of {', '.join(DRAWERS)}, got {unknown[0]!r}")
    lists: dict[str, Sequence[Any]] = {"models": models, "seeds": seeds}
    for name, values in lists.items():
        if not values or len(set(values)) != len(values):
            raise UserError(f"{name}: expected at least one, none twice, got {list(values)}")
    return [Run(name, seed) for seed in seeds for name in DRAWERS if name in models]
