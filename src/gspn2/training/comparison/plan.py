"""Which runs a comparison has, and what they share."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..config import TrainConfig
from ..errors import UserError
from ..tasks import ALIGNED, CLASSES, Task, parse_task
from .contenders import CONTENDERS, MAIN
from .images import DIGITS_TESTS, Source

DIGITS, DIGITS_SIZE = "digits", 32
TASKS = (*CLASSES, ALIGNED, DIGITS)
SIZES = (64, 128)
SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class Settings:
    """What all runs of a comparison share, so that they differ in the model alone.

    Args:
        steps: of the optimizer; a quarter of them for the digits, which need no more.
        batch_size: images a step.
        weight_decay: of AdamW.
        train_images, test_images: how many are generated; the same for all models and seeds. As many as for
            tests are for validation.
        tests: points of the curve of test accuracy, evenly over the steps.
        minutes: time of a run, testing included; it then ends where it is, and says so.
        amp: "auto" (bfloat16 on CUDA), "bf16" or "off".
        compile: run training steps through `torch.compile`.

    Raises:
        UserError: a number is not positive.
    """

    steps: int = 2000
    batch_size: int = 64
    weight_decay: float = 0.05
    train_images: int = 50_000
    test_images: int = 2_048
    tests: int = 10
    minutes: float = 10.0
    amp: str = "auto"
    compile: bool = False

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "train_images", "test_images", "tests", "minutes"):
            value = getattr(self, name)
            # `not` also refuses NaN.
            if not value > 0:
                raise UserError(f"{name}: expected more than 0, got {value}")
        if self.amp not in ("auto", "off", "bf16"):
            raise UserError(f"amp: expected auto, off or bf16, got {self.amp!r}")

    def decisive(self) -> dict[str, Any]:
        """Those that change what a run that reaches its last step comes to."""
        return {name: value for name, value in dataclasses.asdict(self).items() if name != "minutes"}


@dataclass(frozen=True)
class Run:
    """One training.

    Args:
        task: "pathfinder", "maze", "aligned" or "digits".
        size: pixels, and units of the scene.
        contender: a name out of `CONTENDERS`.
        seed: of weights and order.
        lr: peak learning rate of AdamW, after a warm-up of a twentieth of the steps, before half a cosine.
    """

    task: str
    size: int
    contender: str
    seed: int
    lr: float = 1e-3

    @property
    def name(self) -> str:
        """Of its files."""
        return f"{self.task}-{self.size}-{self.contender}-lr{self.lr:g}-s{self.seed}"

    @property
    def family(self) -> str:
        """The one of the three that its contender is, or is an ablation of."""
        return CONTENDERS[self.contender].kind

    @property
    def classes(self) -> int:
        """Of an image; 0 where it has none (`dense`)."""
        return 0 if self.dense else 10

    def steps(self, settings: Settings) -> int:
        """Of this run."""
        return max(1, settings.steps // 4) if self.task == DIGITS else settings.steps

    @property
    def data(self) -> Task:
        """What it learns from and is tested on."""
        return self._scene(self.size, self.size)

    def _scene(self, canvas: int, size: int) -> Task:
        if self.task == DIGITS:
            return Task(DIGITS, canvas, size)
        return parse_task(f"{self.task}:{canvas}@{size}")

    @property
    def dense(self) -> bool:
        """Are there answers for pixels instead of one for the image?"""
        return self.task != DIGITS

    @property
    def transfers(self) -> dict[str, Task]:
        """Test sets of twice the size, without further training: the same scenes larger, and larger scenes.

        The first asks whether a model depends on the number of pixels, the second also whether it has learnt
        to follow a way further than it ever had to. There are no larger scenes of digits.
        """
        double = 2 * self.size
        found = {"scaled": self._scene(self.size, double)}
        return found if self.task == DIGITS else found | {"larger": self._scene(double, double)}

    def sources(self, settings: Settings) -> dict[str, Source]:
        """Its images by use: "train", "validation", "test" and the transfers."""
        tests = min(settings.test_images, DIGITS_TESTS) if self.task == DIGITS else settings.test_images
        found = {
            "train": Source(self.data, "train", settings.train_images),
            "validation": Source(self.data, "validation", tests),
        }
        tested = {"test": self.data, **self.transfers}
        return found | {use: Source(task, "test", tests) for use, task in tested.items()}


def plan(
    tasks: Sequence[str] = TASKS,
    sizes: Sequence[int] = SIZES,
    seeds: Sequence[int] = SEEDS,
    contenders: Sequence[str] = tuple(CONTENDERS),
    extra_seeds: int = 1,
) -> list[Run]:
    """The runs, seed by seed: what is stopped early has compared everything at least once.

    The three that are compared run with all seeds at the smallest size. What else there is, their runs at
    larger sizes and ablations (at the smallest), takes the first `extra_seeds` of the seeds. Digits have one
    size of their own, and no ablations.

    Raises:
        UserError: no such task, size or contender, one of them named twice, or a seed out of range.
    """
    for name, chosen, known in (("tasks", tasks, TASKS), ("contenders", contenders, tuple(CONTENDERS))):
        unknown = [it for it in chosen if it not in known]
        if unknown:
            raise UserError(f"{name}: expected some of {', '.join(known)}, got {unknown[0]!r}")
    lists: dict[str, Sequence[Any]] = {
        "tasks": tasks,
        "sizes": sizes,
        "seeds": seeds,
        "contenders": contenders,
    }
    for name, values in lists.items():
        if not values or len(set(values)) != len(values):
            raise UserError(f"{name}: expected at least one, none twice, got {list(values)}")
    for seed in seeds:
        TrainConfig(seed=seed)  # of the runs; the last of them may begin in hours
    runs = []
    for number, seed in enumerate(seeds):
        for task in tasks:
            for size in (DIGITS_SIZE,) if task == DIGITS else sizes:
                base = task == DIGITS or size == min(sizes)
                extra = number < extra_seeds
                runs += [
                    Run(task, size, contender, seed)
                    for contender in contenders
                    if (contender in MAIN and (base or extra))
                    or (contender not in MAIN and base and extra and task != DIGITS)
                ]
    for run in runs:
        _ = run.data, run.transfers
    return runs
