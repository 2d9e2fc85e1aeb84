"""One run: from its first step, or its checkpoint, to its result."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Generator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from ..checkpoint import write_safetensors
from ..config import TrainConfig
from ..errors import Interrupted
from ..model import amp_dtype
from ..rng import derive_seed
from ..schedule import learning_rate
from ..series import check_settings, read_checkpoint
from ..state import count_parameters, learner_tensors, restore_learner
from .contenders import CONTENDERS, build
from .images import Images, poses
from .plan import Run, Settings
from .trainer import Block, Trainer

SAVE_SECONDS = 60.0
LOOKS = 5
"""Points of the training loss for each test, and as often a look at the clock of the whole run."""
EASIEST, HARDEST = 0.1, 0.75
"""The share of the images that training begins with, and that of the steps until it has all."""
Say = Callable[..., None]


def make_trainer(
    run: Run, settings: Settings, images: Images, device: torch.device, block: int
) -> tuple[Trainer, int]:
    """The trainer of a run at its start, and how many parameters its model has."""
    config = TrainConfig(
        batch_size=settings.batch_size,
        lr=run.lr,
        weight_decay=settings.weight_decay,
        label_smoothing=0.0,
        ema_decay=None,
        seed=run.seed,
        amp=settings.amp,
    )
    model = build(CONTENDERS[run.contender], run.size, derive_seed(run.seed, "weights"), run.classes)
    amp = amp_dtype(settings.amp, device)
    trainer = Trainer(config, model, images, device, amp, block, settings.batch_size, settings.compile)
    return trainer, count_parameters(model)


class SingleRun:
    """A run, as a generator: while it waits for the device, others may go on.

    Args:
        run: which.
        settings: what it shares with the others.
        images: by use: "train", "test" and the transfers.
        out: folder of its checkpoint.
        device: where to compute.
        say: takes what happens, a text and the step.
    """

    def __init__(
        self,
        run: Run,
        settings: Settings,
        images: dict[str, Images],
        out: Path,
        device: torch.device,
        say: Say,
    ) -> None:
        self.run, self.settings, self.images, self.say = run, settings, images, say
        self.device = device
        self.checkpoint = out / f"{run.name}.safetensors"
        self.total = run.steps(settings)
        self.every = max(1, math.ceil(self.total / settings.tests))
        self.look = max(1, self.every // LOOKS)
        self.trainer, self.parameters = make_trainer(run, settings, images["train"], device, self.look)
        self.step = 0
        self.seconds = 0.0
        """Of training alone."""
        self.spent = 0.0
        """Of training and testing: what `minutes` bounds."""
        self.points: list[dict[str, Any]] = []
        self._resume()
        self.trainer.prepare()

    def _resume(self) -> None:
        if not self.checkpoint.exists():
            self.say("begins", f"{self.parameters:,} parameters")
            return
        told, tensors = read_checkpoint(self.checkpoint, "comparison")
        check_settings(self.checkpoint, told["settings"], self.settings.decisive())
        restore_learner(self.trainer, tensors, self.checkpoint)  # type: ignore[arg-type]
        self.step, self.points = told["step"], told["points"]
        self.seconds, self.spent = told["seconds"], told["spent"]
        self.say("resumes", f"from step {self.step}", self.step)

    def _save(self) -> None:
        told = {"settings": asdict(self.settings), "step": self.step, "points": self.points}
        told |= {"seconds": self.seconds, "spent": self.spent}
        metadata = {"comparison": json.dumps(told)}
        write_safetensors(self.checkpoint, learner_tensors(self.trainer), metadata)  # type: ignore[arg-type]

    def train(self, stopped: Callable[[], int | None]) -> Generator[None, None, dict[str, Any]]:
        """Train to the last step, or until time is up, and test; yields where it would wait for the device.

        Args:
            stopped: the signal that asks for a stop, if there was one.

        Raises:
            Interrupted: after the state was saved.
        """
        saved = time.monotonic()
        ended = "steps"
        while self.step < self.total:
            if self.step and self.spent > 60 * self.settings.minutes:
                ended = "time"
                break
            # To the next look, but never past the next test.
            until = min(
                self.total,
                (self.step // self.look + 1) * self.look,
                (self.step // self.every + 1) * self.every,
            )
            began = time.perf_counter()
            losses = self.trainer.run(self._block(until))
            yield
            loss = losses.mean().item()
            self.step = until
            self._count(began, training=True)
            tested = self.step % self.every == 0 or self.step == self.total
            if not math.isfinite(loss) or not self._point(loss, tested):
                ended = "diverged"
                break
            signum = stopped()
            if signum is not None:
                self._save()
                where = f"step {self.step} of {self.total} of {self.run.name}"
                raise Interrupted(signum, self.checkpoint, where)
            if time.monotonic() - saved > SAVE_SECONDS:
                self._save()
                saved = time.monotonic()
        return self._result(ended)

    def _block(self, until: int) -> Block:
        """What the steps up to `until` take: a function of the run's seed, the same for every contender."""
        size, lr = self.settings.batch_size, self.run.lr
        chosen, turns, rates = [], [], []
        for step in range(self.step, until):
            draws = torch.Generator().manual_seed(derive_seed(self.run.seed, "images", step))
            chosen.append(self._chosen(step, torch.rand(size, generator=draws, dtype=torch.float64)))
            turns.append(poses(size, draws))
            rates.append(learning_rate(step, self.total, self.total // 20, lr, 0.01 * lr))
        return Block(torch.stack(chosen), torch.stack(turns), torch.tensor(rates))

    def _chosen(self, step: int, draws: torch.Tensor) -> torch.Tensor:
        """Numbers of images, of those that are not too hard yet and more often of the hardest of them.

        Images come from easy to hard, but for the digits: a short run has to begin with what is easy.
        """
        share = 1.0
        if self.run.dense:
            progress = min(1.0, step / (HARDEST * self.total))
            share = EASIEST + (1 - EASIEST) * progress**2
            draws = draws.sqrt()
        return (draws * share * self.settings.train_images).long()

    def _point(self, loss: float, tested: bool) -> bool:
        """A point of the curve, with a test or without; is everything finite?"""
        point: dict[str, Any] = {"step": self.step, "seconds": round(self.seconds, 3), "train_loss": loss}
        if tested:
            found = self._test("test")
            if not math.isfinite(found["loss"]):
                return False
            point |= {"test_loss": found["loss"], "accuracy": found["accuracy"]}
            text = f"loss {loss:.3f}, test {100 * found['accuracy']:.1f}%, {self.seconds:.0f} s"
            self.say("point", text, self.step)
        self.points.append(point)
        return True

    def _test(self, use: str) -> dict[str, float]:
        """Loss and accuracy on a set of images of any size."""
        began = time.perf_counter()
        images = self.images[use]
        # Fewer of larger images, so that memory stays what training needs.
        area = (images.pixels.shape[-1] // self.run.size) ** 2
        loss, accuracy = self.trainer.test(images, max(1, 4 * self.settings.batch_size // area))
        self._count(began, training=False)
        return {"loss": loss, "accuracy": accuracy}

    def _count(self, began: float, training: bool) -> None:
        seconds = time.perf_counter() - began
        self.spent += seconds
        self.seconds += seconds * training

    def _result(self, ended: str) -> dict[str, Any]:
        result: dict[str, Any] = {
            "run": asdict(self.run),
            "settings": asdict(self.settings),
            "parameters": self.parameters,
            "ended": ended,
            "step": self.step,
            "steps": self.total,
            "seconds": round(self.seconds, 3),
            "curve": self.points,
        }
        if ended == "diverged":
            return result
        found, validation = self._test("test"), self._test("validation")
        transfer = {name: self._test(name) for name in self.run.transfers}
        return {**result, **found, "validation": validation, "transfer": transfer}
