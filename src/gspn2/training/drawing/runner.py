"""Runs of models that learn to draw: each leaves a JSON file and grids, or a checkpoint to go on from."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...bench.about import machine
from ..checkpoint import part, write_json, write_safetensors
from ..errors import CheckpointError, Interrupted, UserError
from ..learner import make_ema
from ..model import amp_dtype
from ..rng import derive_seed
from ..schedule import learning_rate
from ..series import Progress, check_settings, read_checkpoint, read_result
from ..state import count_parameters, load_optimizer, load_weights, prefixed
from ..stopping import StopRequest
from . import digits, flow, samples
from .judge import Judge, load_judge
from .models import SIZE, build, build_student, dilated
from .objective import Objective
from .plan import Run, Settings
from .stepping import Batch, Stepper

SCHEMA = 1
"""Of result files. Raised when a reader of the old ones would misread the new ones."""
SAVE_SECONDS = 60.0
LOOKS = 10
"""Points of the losses for each test, and as often a look at the clock of the whole run."""
EMA = 0.999


OnProgress = Callable[[Progress[Run]], None]


def draw(
    runs: Sequence[Run],
    settings: Settings,
    out: Path,
    *,
    device: torch.device | str = "cpu",
    command: str = "",
    on_event: OnProgress | None = None,
) -> list[dict[str, Any]]:
    """Do the runs that have no result in `out` yet; returns the results of all, in the order of `runs`.

    Leaves `NAME.json` for each run, grids of its samples (`NAME-1x.png` and so on), its weights in `weights/`
    and, of a run that was stopped, a checkpoint. Several processes may work on different runs in one folder
    once the judge is there (`prepare`).

    Raises:
        UserError: a result or checkpoint is there that had other settings, or a teacher is missing.
        Interrupted: SIGINT or SIGTERM; the run goes on from its checkpoint next time.
    """
    for run in runs:
        path = out / f"{run.name}.json"
        if path.exists():
            check_settings(path, read(path)["settings"], settings.decisive())
        elif run.teacher is not None and run.teacher not in runs and not _weights(out, run.teacher).exists():
            raise UserError(f"{run.name}: its teacher {run.teacher.name} is not there: run that first")
    data = prepare(settings, out, device=device)
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


@dataclass(frozen=True)
class Data:
    """What all runs of a folder share.

    Args:
        train: digits to learn from.
        judge: of samples.
    """

    train: digits.Digits
    judge: Judge


def prepare(settings: Settings, out: Path, *, device: torch.device | str = "cpu") -> Data:
    """The digits, and the judge of a folder, which is trained where it is missing."""
    out.mkdir(parents=True, exist_ok=True)
    train, held_out = digits.load(torch.device(device))
    path = out / "judge.safetensors"
    return Data(train, load_judge(path, train, held_out, settings.samples, settings.judge_steps))


def read(path: Path) -> dict[str, Any]:
    """A result file; a UserError where it is none of this kind."""
    return read_result(path, SCHEMA, "gspn2 draw", "judge")


def summary(result: dict[str, Any]) -> str:
    """A result in a line."""
    if result["ended"] == "diverged":
        return f"the loss was no longer finite at step {result['step']}"
    cut = "" if result["ended"] == "steps" else f" (time was up at step {result['step']})"
    told = ", ".join(
        f"{use} {it['distance']:.1f} {100 * it['accuracy']:.1f}%" for use, it in result["samples"].items()
    )
    return f"{result['seconds']:.0f} s{cut}; distance and accuracy: {told}"


def _weights(out: Path, run: Run) -> Path:
    return out / "weights" / f"{run.name}.safetensors"


class _Training:
    """A run from its first step, or its checkpoint, to its result."""

    def __init__(self, run: Run, settings: Settings, data: Data, out: Path, say: Callable[..., None]) -> None:
        self.run, self.settings, self.data, self.out, self.say = run, settings, data, out, say
        self.device = data.train.labels.device
        self.amp = amp_dtype(settings.amp, self.device)
        self.checkpoint = out / f"{run.name}.safetensors"
        self._build()
        self.parameters = count_parameters(self.model)
        self.stepper = Stepper(self.objective, self.amp, settings.graph and self.device.type == "cuda")
        self.learnt = sum(it.numel() for it in self.stepper.learnt)
        # What learns, averaged; the rest of a student never changes.
        pairs = zip(self.ema.module.parameters(), self.model.parameters(), strict=True)
        self.averaged = tuple(mine for mine, learns in pairs if learns.requires_grad)
        self.step = 0
        self.seconds = 0.0
        """Of training alone."""
        self.spent = 0.0
        """Of training and sampling: what `minutes` bounds."""
        self.points: list[dict[str, Any]] = []
        self._resume()

    def _build(self) -> None:
        seed = derive_seed(self.run.seed, "weights")
        drawer, teacher = self.run.drawer, None
        if self.run.teacher is None:
            self.model = build(drawer.architecture, drawer.kind, seed).to(self.device)
        else:
            teacher = self._load_teacher(self.run.teacher)
            self.model = build_student(teacher, seed).to(self.device)
        # Before the objective looks into the model: a copy would bring its hooks along.
        self.ema: Any = make_ema(self.model, EMA)
        self.objective = Objective(self.model, teacher)

    def _load_teacher(self, run: Run) -> nn.Module:
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        path = _weights(self.out, run)
        try:
            tensors = load_file(path)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path}: expected the weights of a teacher: {error!r}") from error
        teacher = build(run.drawer.architecture, run.drawer.kind, 0)
        load_weights(teacher, tensors, path)
        return teacher.to(self.device).eval().requires_grad_(False)

    def _resume(self) -> None:
        if not self.checkpoint.exists():
            self.say("begins", f"{self.parameters:,} parameters, {self.learnt:,} of them learn")
            return
        told, tensors = read_checkpoint(self.checkpoint, "drawing")
        check_settings(self.checkpoint, told["settings"], self.settings.decisive())
        load_weights(self.model, part(tensors, "model"), self.checkpoint)
        load_weights(self.ema.module, part(tensors, "ema"), self.checkpoint)
        load_optimizer(self.stepper.optimizer, part(tensors, "optimizer"))
        self.step, self.points = told["step"], told["points"]
        self.seconds, self.spent = told["seconds"], told["spent"]
        self.say("resumes", f"from step {self.step}", self.step)

    def _save(self) -> None:
        told = {"settings": asdict(self.settings), "step": self.step, "points": self.points}
        told |= {"seconds": self.seconds, "spent": self.spent}
        tensors = prefixed("model", self.model.state_dict())
        tensors |= prefixed("ema", self.ema.module.state_dict())
        for index, values in self.stepper.optimizer.state_dict()["state"].items():
            tensors |= prefixed(f"optimizer/{index}", values)
        write_safetensors(self.checkpoint, tensors, {"drawing": json.dumps(told)})

    def finish(self) -> dict[str, Any]:
        """Train to the last step, or until time is up, and judge samples.

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
            if self.step == 0 and self.run.teacher is not None:
                # Where mixers that put out nothing begin.
                self._point({}, tested=True)
            while self.step < total:
                if self.step and self.spent > 60 * self.settings.minutes:
                    ended = "time"
                    break
                # To the next look, but never past the next test.
                until = min(total, (self.step // look + 1) * look, (self.step // every + 1) * every)
                losses = self._steps(until)
                if not all(map(math.isfinite, losses.values())):
                    ended = "diverged"
                    break
                self._point(losses, tested=self.step % every == 0 and self.step < total)
                if stop.signum is not None:
                    self._save()
                    where = f"step {self.step} of {total} of {self.run.name}"
                    raise Interrupted(stop.signum, self.checkpoint, where)
                if time.monotonic() - saved > SAVE_SECONDS:
                    self._save()
                    saved = time.monotonic()
        if ended != "diverged":
            # Samples of the largest size take a while, too.
            self._save()
        return self._result(ended)

    def _warm_up(self) -> None:
        """Compile and load whatever the first step would, before the clock starts; changes nothing."""
        self.stepper.warm_up(self._batch(0))
        self._wait()

    def _batch(self, step: int) -> Batch:
        """A function of seed and step alone: all models meet the same pictures and the same noise."""
        seed = derive_seed(self.run.seed, "step", step)
        generator = torch.Generator(self.device).manual_seed(seed)
        pictures, labels = digits.sample(self.data.train, self.settings.batch_size, SIZE, generator)
        x, t, velocity = flow.noisy(pictures, generator)
        return Batch(x, t, labels, velocity)

    def _steps(self, until: int) -> dict[str, float]:
        """Steps up to `until`; their mean losses by name. Waits for the device at the end."""
        settings = self.settings
        began = time.perf_counter()
        self.model.train()
        kept: list[dict[str, Tensor]] = []
        while self.step < until:
            lr = learning_rate(
                self.step, settings.steps, settings.steps // 20, settings.lr, 0.01 * settings.lr
            )
            kept.append(self.stepper(self._batch(self.step), lr))
            self.step += 1
            self._average()
        means = {name: torch.stack([it[name] for it in kept]).mean().item() for name in kept[0]}
        self._count(began, training=True)
        return means

    @torch.no_grad()
    def _average(self) -> None:
        """As `ema.update`, which collects the state of both models anew each time.

        That takes the host as long as a fast GPU needs for a step.
        """
        weight = 1.0 - self.ema.get_decay(self.step)
        torch._foreach_lerp_(self.averaged, tuple(self.stepper.learnt), weight)

    def _point(self, losses: dict[str, float], tested: bool) -> None:
        """A point of the curve, with samples judged or without."""
        point: dict[str, Any] = {"step": self.step, "seconds": round(self.seconds, 3), **losses}
        if tested:
            found, _ = self._judged("1x", None)
            point |= found
        self.points.append(point)
        told = ", ".join(f"{name} {value:.4g}" for name, value in point.items() if name != "step")
        self.say("point", told, self.step)

    def _judged(self, use: str, before: Tensor | None) -> tuple[dict[str, float], Tensor]:
        """Distance and class accuracy of samples, and the samples."""
        began = time.perf_counter()
        network = self.ema.module.eval()

        def velocity(x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
            with torch.autocast(self.device.type, self.amp, enabled=self.amp is not None):
                return network(x, t, labels).float()

        settings = self.settings
        labels = samples.classes(settings.samples, self.device)
        with dilated(network, int(use[0]) if use.endswith("dilated") else 1):
            pictures = samples.draw(velocity, use, before, labels, settings.sampler_steps, self.run.seed)
        judge = self.data.judge
        found = {"distance": judge.distance(pictures), "accuracy": judge.right(pictures, labels)}
        self._count(began, training=False)
        return found, pictures

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
            "learnt": self.learnt,
            "ended": ended,
            "step": self.step,
            "seconds": round(self.seconds, 3),
            "curve": self.points,
            "judge": self.data.judge.about(),
        }
        if ended == "diverged":
            return result
        found: dict[str, dict[str, float]] = {}
        before: dict[str, Tensor] = {}
        for use in samples.uses(self.run.drawer.architecture):
            base = {"2x-enlarged": "1x", "4x-enlarged": "2x-enlarged"}.get(use)
            found[use], before[use] = self._judged(use, before.get(base) if base else None)
            samples.write_grid(self.out / f"{self.run.name}-{use}.png", before[use], samples.ROWS[use])
            self.say("note", f"{use}: {found[use]}", self.step)
        weights = _weights(self.out, self.run)
        weights.parent.mkdir(exist_ok=True)
        write_safetensors(weights, self.ema.module.state_dict(), {})
        return {**result, "samples": found}
