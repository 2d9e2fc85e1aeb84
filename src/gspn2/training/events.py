"""What `train` tells its caller while it works."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from .config import TrainConfig
from .log import EpochRow


@dataclass(frozen=True)
class RunStarted:
    """Everything is loaded; `first_step` is more than 0 for a resumed run."""

    config: TrainConfig
    out: Path
    device: str
    amp: str
    parameters: int
    image_size: tuple[int, int]
    class_names: tuple[str, ...]
    train_images: int
    test_images: int
    steps_per_epoch: int
    steps: int
    first_step: int
    processes: int = 1


@dataclass(frozen=True)
class StepDone:
    """Training went on; sent a few times a second. `loss` is the mean of the epoch so far."""

    epoch: int
    step: int
    loss: float
    lr: float
    images_per_second: float


@dataclass(frozen=True)
class EvalProgress:
    """Testing went on."""

    epoch: int
    images: int
    total: int


@dataclass(frozen=True)
class EpochDone:
    """An epoch was trained, tested and saved; `seconds` are those of this epoch in this process."""

    row: EpochRow
    is_best: bool
    seconds: float


@dataclass(frozen=True)
class Notice:
    """Something the user should know."""

    text: str


Event = RunStarted | StepDone | EvalProgress | EpochDone | Notice
OnEvent = Callable[[Event], None]
