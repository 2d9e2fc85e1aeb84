"""The training loop.

The place in a run is one number, the step: the learning rate, the order of images, their augmentation and
every random draw follow from it. What else there is (weights, average, optimizer) is in `last.safetensors`: a
run killed at any moment and resumed ends with the same bits, on a device that computes the same twice.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from .checkpoint import BEST, LAST, CheckpointInfo, part, read_checkpoint, save_checkpoint, write_json
from .config import TrainConfig
from .data import Data, eval_loader, load_data, train_loader
from .errors import CheckpointError, Interrupted, TrainingFailed, UserError
from .evaluate import Evaluation, evaluate
from .events import EpochDone, EvalProgress, Event, Notice, OnEvent, RunStarted, StepDone
from .log import EPOCHS, STEPS, EpochRow, RunLog, read_history
from .model import amp_dtype, build_model, pick_device
from .recipe import (
    check_same_run,
    count_parameters,
    environment,
    load_optimizer,
    load_weights,
    make_ema,
    make_loss,
    make_optimizer,
    prefixed,
)
from .rng import derive_seed, seed_everything
from .schedule import learning_rate
from .stopping import StopRequest

CONFIG, SUMMARY = "config.json", "summary.json"
RUN_FILES = (LAST, BEST, EPOCHS, STEPS, CONFIG, SUMMARY)
REPORT_SECONDS = 0.25


@dataclass(frozen=True)
class TrainResult:
    """What a run left behind.

    Args:
        out: folder of the run.
        best: `best.safetensors`, the weights of `best_row`.
        last: `last.safetensors`, the whole state at the end.
        history: every epoch.
        best_row: the epoch of the highest top-1, of the lower test loss among equals.
        class_names: in the order of the logits.
        parameters: of the model.
        seconds: of training and testing, interruptions left out.
    """

    out: Path
    best: Path
    last: Path
    history: list[EpochRow]
    best_row: EpochRow
    class_names: tuple[str, ...]
    parameters: int
    seconds: float


def train(
    config: TrainConfig, *, on_event: OnEvent | None = None, resume: bool = False, overwrite: bool = False
) -> TrainResult:
    """Train a model; leaves checkpoints, log and summary in `config.out_dir`.

    Starts the global random generators from `config.seed`. SIGINT and SIGTERM stop the run after the current
    step, with its state saved.

    Args:
        on_event: called with what happens; see `gspn2.training.events`.
        resume: go on from `last.safetensors`, if there is one. `config` must then be that of the run, but for
            `out`, `device`, `workers` and `checkpoint_every`.
        overwrite: replace a run that is in the folder. Other files there are left alone.

    Raises:
        UserError: a setting, the data, the model or the folder cannot be used; nothing has been changed.
        TrainingFailed: the loss or a gradient is not finite; the checkpoint before that is kept.
        Interrupted: a signal came.
    """
    if resume and overwrite:
        raise UserError("resume and overwrite exclude each other")
    last = config.out_dir / LAST
    resuming = resume and last.exists()
    if not (resume or overwrite):
        check_empty(config.out_dir)
    run = Run(config, on_event or (lambda event: None))
    if resuming:
        run.restore(*read_checkpoint(last))
    else:
        run.start()
    return run.finish()


def check_empty(folder: Path) -> None:
    """Raise a UserError if the folder of a new run holds anything, or is none."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"out: {folder} is a file, expected a folder")
    if folder.is_dir() and any(folder.iterdir()):
        raise UserError(f"out: {folder} is not empty; resume the run (--resume) or replace it (--overwrite)")


def stored_config(folder: Path) -> TrainConfig | None:
    """Settings of the run in this folder, or None if there is no checkpoint to resume from."""
    last = folder / LAST
    return read_checkpoint(last)[1].config if last.exists() else None


class Run:
    """The state of one run, from loading to summary."""

    def __init__(self, config: TrainConfig, emit: OnEvent) -> None:
        self.config = config
        self.emit: OnEvent = emit
        self.out = config.out_dir
        self.device = pick_device(config.device)
        self.amp = amp_dtype(config.amp, self.device)
        seed_everything(config.seed)
        self.data: Data = load_data(config)
        classes = len(self.data.class_names)
        self.layout = torch.channels_last if config.channels_last else torch.preserve_format
        model = build_model(config, self.data.preprocess, classes, config.pretrained)
        self.model: nn.Module = model.to(self.device).to(memory_format=self.layout)  # type: ignore[call-overload]
        self.ema = make_ema(self.model, config.ema_decay)
        self.optimizer = make_optimizer(self.model, config)
        self.mixup, self.criterion = make_loss(config, classes)
        self.loader, self.batches = train_loader(self.data.train, config, self.device)
        self.tests = eval_loader(self.data.test, config.batch_size, config.workers, self.device)
        self.steps_per_epoch = len(self.batches)
        self.steps = config.epochs * self.steps_per_epoch
        self.epoch = self.step = 0
        self.loss_sum = self.seconds = self.train_seconds = 0.0
        self._clock = time.perf_counter()
        self.best: EpochRow | None = None
        self.pending: list[tuple[int, float, Tensor, Tensor]] = []
        self.log: RunLog

    # -- beginning

    def start(self) -> None:
        """Begin in an empty folder, or in the place of an older run."""
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            for name in RUN_FILES:
                (self.out / name).unlink(missing_ok=True)
            self.log = RunLog(self.out, None)
            write_json(self.out / CONFIG, self.config.to_json())
            self.save_last()
        except OSError as error:
            raise UserError(f"out: cannot write to {self.out}: {error}") from error

    def restore(self, tensors: dict[str, Tensor], info: CheckpointInfo) -> None:
        """Go on from a checkpoint."""
        if info.kind != "run":
            raise CheckpointError(f"{info.path}: holds weights only, a run cannot go on from it")
        check_same_run(self.config, info.config)
        state = info.state
        if state["fingerprint"] != self.data.fingerprint:
            raise UserError(
                f"data: {self.config.data} is not what it was when the run began (images or classes)"
            )
        for stale in self.out.glob(".*.tmp"):
            stale.unlink()
        load_weights(self.model, part(tensors, "model"), info.path)
        if self.ema is not None:
            load_weights(self.ema.module, part(tensors, "ema"), info.path)
        load_optimizer(self.optimizer, part(tensors, "optimizer"))
        self.epoch, self.step = info.epoch, info.step
        self.loss_sum = state["loss_sum"]
        self.seconds, self.train_seconds = state["seconds"], state["train_seconds"]
        self.best = EpochRow(**state["best"]) if state["best"] else None
        self.log = RunLog(self.out, state["log"])
        for name, here in environment(self.device).items():
            if state["environment"].get(name) != here:
                was = state["environment"].get(name)
                self.emit(Notice(f"{name} is {here}, was {was}: the numbers may differ in the last bits"))

    # -- the loop

    def finish(self) -> TrainResult:
        """Train and test what is left of the run."""
        self.emit(self._started())
        self._clock = time.perf_counter()
        try:
            with StopRequest() as self.stop:
                while self.epoch < self.config.epochs:
                    self._one_epoch()
        finally:
            self.log.close()
        result = self._result()
        write_json(self.out / SUMMARY, self._summary(result))
        return result

    def _one_epoch(self) -> None:
        began = time.perf_counter()
        self._train_epoch()
        evaluation = self._test()
        row = EpochRow(
            epoch=self.epoch + 1,
            step=self.step,
            lr=self._lr(self.step - 1),
            train_loss=self.loss_sum / self.steps_per_epoch,
            test_loss=evaluation.loss,
            top1=evaluation.top1,
            top5=evaluation.top5,
        )
        self.log.epoch(row)
        self.epoch += 1
        self.loss_sum = 0.0
        is_best = self.best is None or (row.top1, -row.test_loss) > (self.best.top1, -self.best.test_loss)
        if is_best:
            self.best = row
            self._save_best()
        self._count_time(training=False)
        self.save_last()
        self.emit(EpochDone(row, is_best, time.perf_counter() - began))

    def _train_epoch(self) -> None:
        self.model.train()
        self.batches.epoch = self.epoch
        self.batches.start = self.step - self.epoch * self.steps_per_epoch
        self._reported = self._epoch_began = time.perf_counter()
        self._images_done = 0
        every = self.config.checkpoint_every
        for inputs, labels in self._load(self.loader, training=True):
            self._train_step(inputs, labels)
            self._images_done += len(labels)
            if time.perf_counter() - self._reported > REPORT_SECONDS:
                self._report()
            self._stop_if_asked(training=True)
            # The last step of an epoch is saved when it has been tested.
            if every and self.step % every == 0 and self.step % self.steps_per_epoch:
                self._report()
                self._count_time(training=True)
                self.save_last()
        self._report()
        self._count_time(training=True)

    def _load(self, loader: DataLoader, training: bool) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of a loader whose workers a batch system's SIGTERM may have ended, too."""
        batches = iter(loader)
        while True:
            try:
                batch = next(batches, None)
            except RuntimeError:
                self._stop_if_asked(training)
                raise
            if batch is None:
                return
            yield batch

    def _train_step(self, inputs: Tensor, labels: Tensor) -> None:
        seed_everything(derive_seed(self.config.seed, "step", self.step))
        lr = self._lr(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)
        inputs = inputs.to(self.device, non_blocking=True, memory_format=self.layout)
        labels = labels.to(self.device, non_blocking=True)
        if self.mixup is not None:
            inputs, labels = self.mixup(inputs, labels)
        with torch.autocast(self.device.type, self.amp, enabled=self.amp is not None):
            logits = self.model(inputs)
        loss = self.criterion(logits.float(), labels)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        limit = self.config.clip_grad or math.inf
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), limit)
        self.optimizer.step()
        self.step += 1
        if self.ema is not None:
            self.ema.update(self.model, step=self.step)
        self.pending.append((self.step, lr, loss.detach(), norm.detach()))

    def _lr(self, step: int) -> float:
        warmup = round(self.config.warmup_epochs * self.steps_per_epoch)
        peak = self.config.peak_lr
        return learning_rate(step, self.steps, warmup, peak, peak * self.config.min_lr)

    def _report(self) -> None:
        """Read the losses of the latest steps off the device, log them, and refuse to go on without sense.

        Everything that is saved has gone through here: a checkpoint never holds what NaN has touched.
        """
        self._reported = time.perf_counter()
        if not self.pending:
            return
        values = torch.stack([torch.stack((loss, norm.to(loss))) for *_, loss, norm in self.pending]).tolist()
        lines = []
        for (step, lr, *_), (loss, norm) in zip(self.pending, values, strict=True):
            if not (math.isfinite(loss) and math.isfinite(norm)):
                self._fail(step, lr, loss, norm)
            self.loss_sum += loss
            lines.append({"epoch": self.epoch + 1, "step": step, "lr": lr, "loss": loss, "grad_norm": norm})
        self.log.steps(lines)
        self.pending.clear()
        done = self.step - self.epoch * self.steps_per_epoch
        rate = self._images_done / max(1e-9, self._reported - self._epoch_began)
        self.emit(StepDone(self.epoch + 1, self.step, self.loss_sum / done, lines[-1]["lr"], rate))

    def _fail(self, step: int, lr: float, loss: float, norm: float) -> None:
        what = f"loss is {loss}" if not math.isfinite(loss) else f"gradient norm is {norm}"
        raise TrainingFailed(
            f"{what} at step {step} (epoch {self.epoch + 1}, lr {lr:.3g}); the checkpoint before it is kept: "
            f"{self.out / LAST}. Try a smaller lr, a longer warm-up or amp off"
        )

    def _stop_if_asked(self, training: bool) -> None:
        if self.stop.signum is None:
            return
        self._report()
        self._count_time(training)
        self.save_last()
        where = f"epoch {self.epoch + 1}, step {self.step} of {self.steps}"
        raise Interrupted(self.stop.signum, self.out / LAST, where)

    def _count_time(self, training: bool) -> None:
        """Credit the time since the last call to the run, which sums it up over interruptions."""
        now = time.perf_counter()
        self.seconds += now - self._clock
        self.train_seconds += now - self._clock if training else 0.0
        self._clock = now

    # -- testing and saving

    def _test(self) -> Evaluation:
        model = self.model if self.ema is None else self.ema.module

        def progress(images: int) -> None:
            self.emit(EvalProgress(self.epoch + 1, images, len(self.data.test)))
            self._stop_if_asked(training=False)

        return evaluate(
            model,
            self._load(self.tests, training=False),
            device=self.device,
            amp=self.amp,
            channels_last=self.config.channels_last,
            on_batch=progress,
        )

    def save_last(self) -> None:
        """Write the whole state."""
        tensors = prefixed("model", self.model.state_dict())
        if self.ema is not None:
            tensors |= prefixed("ema", self.ema.module.state_dict())
        for index, values in self.optimizer.state_dict()["state"].items():
            tensors |= prefixed(f"optimizer/{index}", values)
        state = {
            "loss_sum": self.loss_sum,
            "seconds": self.seconds,
            "train_seconds": self.train_seconds,
            "best": vars(self.best) if self.best else None,
            "log": self.log.sync(),
            "fingerprint": self.data.fingerprint,
            "environment": environment(self.device),
        }
        save_checkpoint(self.out / LAST, tensors, self._info("run", state))

    def _save_best(self) -> None:
        model = self.model if self.ema is None else self.ema.module
        save_checkpoint(self.out / BEST, model.state_dict(), self._info("weights", {}))

    def _info(self, kind: str, state: dict[str, Any]) -> CheckpointInfo:
        row = self.best
        return CheckpointInfo(
            path=self.out / (LAST if kind == "run" else BEST),
            kind=kind,
            weights="model" if self.ema is None else "ema",
            config=self.config,
            class_names=self.data.class_names,
            preprocess=self.data.preprocess,
            epoch=self.epoch,
            step=self.step,
            metrics={"test_loss": row.test_loss, "top1": row.top1, "top5": row.top5} if row else {},
            state=state,
        )

    # -- telling

    def _started(self) -> Event:
        return RunStarted(
            config=self.config,
            out=self.out,
            device=str(self.device),
            amp="off" if self.amp is None else "bf16",
            parameters=count_parameters(self.model),
            image_size=self.data.preprocess.image_size,
            class_names=self.data.class_names,
            train_images=len(self.data.train),
            test_images=len(self.data.test),
            steps_per_epoch=self.steps_per_epoch,
            steps=self.steps,
            first_step=self.step,
        )

    def _result(self) -> TrainResult:
        assert self.best is not None, "a finished run has tested at least one epoch"
        return TrainResult(
            out=self.out,
            best=self.out / BEST,
            last=self.out / LAST,
            history=read_history(self.out),
            best_row=self.best,
            class_names=self.data.class_names,
            parameters=count_parameters(self.model),
            seconds=self.seconds,
        )

    def _summary(self, result: TrainResult) -> dict[str, Any]:
        images = self.steps * self.batches.batch_size
        return {
            "best": vars(result.best_row),
            "last": vars(result.history[-1]),
            "parameters": result.parameters,
            "seconds": self.seconds,
            "train_images_per_second": images / self.train_seconds if self.train_seconds else None,
            "device": str(self.device),
            "amp": "off" if self.amp is None else "bf16",
            "environment": environment(self.device),
            "class_names": self.data.class_names,
            "config": self.config.to_json(),
        }
