"""Runs of a comparison, one after the other: each leaves a JSON file, or a checkpoint to go on from."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...bench.about import machine
from ..checkpoint import write_json, write_safetensors
from ..config import TrainConfig
from ..errors import CheckpointError, Interrupted, UserError
from ..learner import Learner
from ..model import amp_dtype
from ..rng import derive_seed
from ..schedule import learning_rate
from ..state import count_parameters, learner_tensors, restore_learner
from ..stopping import StopRequest
from .contenders import CONTENDERS, build
from .images import Images, inputs, load, turned
from .plan import Run, Settings

SCHEMA = 1
"""Of result files. Raised when a reader of the old ones would misread the new ones."""
SAVE_SECONDS = 60.0
LOOKS = 5
"""Points of the training loss for each test, and as often a look at the clock of the whole run."""


@dataclass(frozen=True)
class Progress:
    """What a comparison reports: every point of a curve, and every run that begins, ends or is skipped.

    Args:
        run: which.
        number, total: its place among the runs, from 1.
        what: "begins", "resumes", "skipped", "point", "ends" or "note".
        text: a line for people.
        step: of the run so far.
    """

    run: Run
    number: int
    total: int
    what: str
    text: str = ""
    step: int = 0


OnProgress = Callable[[Progress], None]


def compare(
    runs: Sequence[Run],
    settings: Settings,
    out: Path,
    *,
    device: torch.device | str = "cpu",
    command: str = "",
    on_event: OnProgress | None = None,
) -> list[dict[str, Any]]:
    """Do the runs that have no result in `out` yet; returns the results of all, in the order of `runs`.

    Leaves `NAME.json` for each run, images in `images/` and, of a run that was stopped, a checkpoint.

    Raises:
        UserError: a result or checkpoint is there that had other settings.
        Interrupted: SIGINT or SIGTERM; the run goes on from its checkpoint next time.
    """
    out.mkdir(parents=True, exist_ok=True)
    for run in runs:
        if (out / f"{run.name}.json").exists():
            _check_settings(out / f"{run.name}.json", read(out / f"{run.name}.json")["settings"], settings)
    data = _Data(out / "images", settings, torch.device(device))
    results = []
    for number, run in enumerate(runs, 1):

        def say(what: str, text: str = "", step: int = 0, run: Run = run, number: int = number) -> None:
            if on_event is not None:
                on_event(Progress(run, number, len(runs), what, text, step))

        path = out / f"{run.name}.json"
        if path.exists():
            results.append(read(path))
            say("skipped", summary(results[-1]))
            continue
        result = _Training(run, settings, data, out, say).finish()
        about = machine(torch.device(device), command)
        results.append({"schema": SCHEMA, **result, "machine": about})
        write_json(path, results[-1])
        (out / f"{run.name}.safetensors").unlink(missing_ok=True)
        say("ends", summary(results[-1]), result["step"])
    return results


def read(path: Path) -> dict[str, Any]:
    """A result file.

    Raises:
        UserError: no JSON, or not of this kind.
    """
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from error
    if not isinstance(result, dict) or result.get("schema") != SCHEMA:
        raise UserError(f"{path}: expected a result of this comparison, schema {SCHEMA}")
    return result


def summary(result: dict[str, Any]) -> str:
    """A result in a line."""
    if result["ended"] == "diverged":
        return f"the loss was no longer finite at step {result['step']}"
    cut = "" if result["ended"] == "steps" else f" (time was up at step {result['step']})"
    moved = ", ".join(f"{name} {100 * it['accuracy']:.1f}%" for name, it in result["transfer"].items())
    return f"{100 * result['accuracy']:.1f}% in {result['seconds']:.0f} s{cut}; at twice the size: {moved}"


def _check_settings(path: Path, stored: dict[str, Any], settings: Settings) -> None:
    wanted = settings.decisive()
    changed = [f"{name} was {stored.get(name)}, is {wanted[name]}" for name in wanted]
    changed = [text for text, name in zip(changed, wanted, strict=True) if stored.get(name) != wanted[name]]
    if changed:
        raise UserError(f"{path}: had other settings ({'; '.join(changed)}): take another folder")


class _Data:
    """The images of the latest task stay on the device, for the runs that follow."""

    def __init__(self, folder: Path, settings: Settings, device: torch.device) -> None:
        self.folder, self.settings, self.device = folder, settings, device
        self._key: tuple[str, int] | None = None
        self._held: dict[str, Images] = {}

    def of(self, run: Run, say: Callable[[str], None]) -> dict[str, Images]:
        """Images by use: "train", "test" and the transfers."""
        if self._key != (run.task, run.size):
            self._held = {}
            wanted = {"train": ("train", run.data), "test": ("test", run.data)}
            wanted |= {name: ("test", task) for name, task in run.transfers.items()}
            counts = {"train": self.settings.train_images, "test": self.settings.test_images}
            for use, (split, task) in wanted.items():
                self._held[use] = load(task, split, counts[split], self.folder, self.device, say)
            self._key = (run.task, run.size)
        return self._held


class _Training:
    """A run from its first step, or its checkpoint, to its result."""

    def __init__(
        self, run: Run, settings: Settings, data: _Data, out: Path, say: Callable[..., None]
    ) -> None:
        self.run, self.settings, self.say = run, settings, say
        self.device = data.device
        self.images = data.of(run, lambda text: say("note", text))
        self.checkpoint = out / f"{run.name}.safetensors"
        config = TrainConfig(
            batch_size=settings.batch_size,
            lr=settings.lr,
            weight_decay=settings.weight_decay,
            label_smoothing=0.0,
            ema_decay=None,
            channels_last=True,
            seed=run.seed,
            amp=settings.amp,
        )
        model = build(CONTENDERS[run.contender], run.size, derive_seed(run.seed, "weights"))
        self.parameters = count_parameters(model)
        amp = amp_dtype(settings.amp, self.device)
        self.learner = Learner(config, model, classes=2, device=self.device, amp=amp)
        self.step = 0
        self.seconds = 0.0
        """Of training alone."""
        self.spent = 0.0
        """Of training and testing: what `minutes` bounds."""
        self.points: list[dict[str, Any]] = []
        self._resume()

    def _resume(self) -> None:
        if not self.checkpoint.exists():
            self.say("begins", f"{self.parameters:,} parameters")
            return
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self.checkpoint, "pt") as file:
                told = json.loads(file.metadata()["comparison"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        except (SafetensorError, OSError, KeyError, TypeError, json.JSONDecodeError) as error:
            raise CheckpointError(f"{self.checkpoint}: damaged, remove it: {error!r}") from error
        _check_settings(self.checkpoint, told["settings"], self.settings)
        restore_learner(self.learner, tensors, self.checkpoint)
        self.step, self.points = told["step"], told["points"]
        self.seconds, self.spent = told["seconds"], told["spent"]
        self.say("resumes", f"from step {self.step}", self.step)

    def _save(self) -> None:
        told = {"settings": asdict(self.settings), "step": self.step, "points": self.points}
        told |= {"seconds": self.seconds, "spent": self.spent}
        metadata = {"comparison": json.dumps(told)}
        write_safetensors(self.checkpoint, learner_tensors(self.learner), metadata)

    def finish(self) -> dict[str, Any]:
        """Train to the last step, or until time is up, and test.

        Raises:
            Interrupted: after the state was saved.
        """
        total = self.settings.steps
        every = max(1, math.ceil(total / self.settings.tests))
        look = max(1, every // LOOKS)
        self._warm_up()
        saved = time.monotonic()
        ended = "steps"
        with StopRequest() as stop:
            while self.step < total:
                if self.step and self.spent > 60 * self.settings.minutes:
                    ended = "time"
                    break
                # To the next look, but never past the next test.
                until = min(total, (self.step // look + 1) * look, (self.step // every + 1) * every)
                loss = self._steps(until)
                tested = self.step % every == 0 or self.step == total
                if not math.isfinite(loss) or not self._point(loss, tested):
                    ended = "diverged"
                    break
                if stop.signum is not None:
                    self._save()
                    where = f"step {self.step} of {total} of {self.run.name}"
                    raise Interrupted(stop.signum, self.checkpoint, where)
                if time.monotonic() - saved > SAVE_SECONDS:
                    self._save()
                    saved = time.monotonic()
        return self._result(ended)

    def _warm_up(self) -> None:
        """Compile and load whatever the first step would, before the clock starts; changes nothing."""
        batch = inputs(self.images["train"].pixels[: self.settings.batch_size])
        model = self.learner.model.train()
        with torch.autocast(self.device.type, self.learner.amp, enabled=self.learner.amp is not None):
            out = model(batch.to(memory_format=self.learner.layout))
        out.float().sum().backward()
        model.zero_grad(set_to_none=True)
        self._wait()

    def _steps(self, until: int) -> float:
        """Steps up to `until`; their mean loss. Waits for the device at the end."""
        settings, train = self.settings, self.images["train"]
        began = time.perf_counter()
        self.learner.model.train()
        losses = []
        per_epoch = settings.train_images // settings.batch_size
        while self.step < until:
            draws = torch.Generator().manual_seed(derive_seed(self.run.seed, "images", self.step))
            chosen = self._order(self.step // per_epoch)[self.step % per_epoch].to(self.device)
            batch = inputs(turned(train.pixels[chosen], draws)), train.labels[chosen]
            lr = learning_rate(
                self.step, settings.steps, settings.steps // 20, settings.lr, 0.01 * settings.lr
            )
            loss, _ = self.learner.step(self.step, lr, self.step / per_epoch, [batch])
            losses.append(loss)
            self.step += 1
        mean = torch.stack(losses).mean().item()
        self._count(began, training=True)
        return mean

    def _order(self, epoch: int) -> torch.Tensor:
        """Batches (steps of the epoch, batch_size) of numbers of images; the same for every contender."""
        if getattr(self, "_epoch", None) != epoch:
            generator = torch.Generator().manual_seed(derive_seed(self.run.seed, "order", epoch))
            order = torch.randperm(self.settings.train_images, generator=generator)
            size = self.settings.batch_size
            self._batches = order[: len(order) // size * size].view(-1, size)
            self._epoch = epoch
        return self._batches

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
        images, model = self.images[use], self.learner.tested.eval()
        # Fewer of larger images, so that memory stays what training needs.
        area = (images.pixels.shape[-1] // self.run.size) ** 2
        size = max(1, 2 * self.settings.batch_size // area)
        right = torch.zeros((), dtype=torch.long, device=self.device)
        loss = torch.zeros((), dtype=torch.float64, device=self.device)
        with torch.inference_mode():
            for start in range(0, len(images.labels), size):
                labels = images.labels[start : start + size]
                batch = inputs(images.pixels[start : start + size])
                with torch.autocast(self.device.type, self.learner.amp, enabled=self.learner.amp is not None):
                    logits = model(batch.to(memory_format=self.learner.layout))
                loss += nn.functional.cross_entropy(logits.float(), labels, reduction="sum")
                right += (logits.argmax(1) == labels).sum()
        count = len(images.labels)
        found = {"loss": loss.item() / count, "accuracy": right.item() / count}
        self._count(began, training=False)
        return found

    def _count(self, began: float, training: bool) -> None:
        self._wait()
        seconds = time.perf_counter() - began
        self.spent += seconds
        self.seconds += seconds * training

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _result(self, ended: str) -> dict[str, Any]:
        result: dict[str, Any] = {
            "run": asdict(self.run),
            "settings": asdict(self.settings),
            "parameters": self.parameters,
            "ended": ended,
            "step": self.step,
            "seconds": round(self.seconds, 3),
            "curve": self.points,
        }
        if ended == "diverged":
            return result
        found = self._test("test")
        transfer = {name: self._test(name) for name in self.run.transfers}
        return {**result, "loss": found["loss"], "accuracy": found["accuracy"], "transfer": transfer}
