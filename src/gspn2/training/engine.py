"""The training loop.

The place in a run is one number, the step: the learning rate, the order of images, their augmentation and
every random draw follow from it. What else there is (weights, average, optimizer) is in `last.safetensors`: a
run killed at any moment and resumed ends with the same bits, on a device that computes the same twice.

Of several processes each runs this loop on its share of every batch; the first one writes and reports. They
agree before each step whether to stop, so that none waits for another that has left.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .batches import eval_loader, train_loader
from .checkpoint import BEST, LAST, CheckpointInfo, read_checkpoint, read_info, save_checkpoint, write_json
from .config import TrainConfig
from .data import Data, load_data, unused
from .distributed import World, joined
from .errors import CheckpointError, Interrupted, TrainingFailed, UserError
from .evaluate import Evaluation, evaluate
from .events import EpochDone, EvalProgress, Event, Notice, OnEvent, RunStarted, StepDone
from .failure import FAILED_BATCH, save_failed_batch, write_faults
from .learner import Batch, Learner
from .log import EPOCHS, FAULTS, STEPS, EpochRow, RunLog, read_history
from .losses import make_teacher
from .model import amp_dtype, build_model, pick_device, start_weights
from .rng import seed_everything
from .schedule import learning_rate
from .sharding import gathered, whole
from .state import (
    check_same_run,
    check_whole,
    count_parameters,
    environment,
    learner_tensors,
    restore_learner,
)
from .stopping import StopRequest
from .tensorboard import TensorBoard, check_installed

CONFIG, SUMMARY = "config.json", "summary.json"
RUN_FILES = (LAST, BEST, EPOCHS, STEPS, CONFIG, SUMMARY, FAULTS, FAILED_BATCH)
LOST_WORKERS = (RuntimeError, OSError, EOFError)
"""What loading raises when a worker has ended, by PyTorch or by the connection a tensor came through."""

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
        faults: what is wrong with the images that could not be read.
    """

    out: Path
    best: Path
    last: Path
    history: list[EpochRow]
    best_row: EpochRow
    class_names: tuple[str, ...]
    parameters: int
    seconds: float
    faults: tuple[str, ...] = ()


def train(
    config: TrainConfig, *, on_event: OnEvent | None = None, resume: bool = False, overwrite: bool = False
) -> TrainResult:
    """Train a model; leaves checkpoints, log and summary in `config.out_dir`.

    Starts the global random generators from `config.seed`. SIGINT and SIGTERM stop the run after the current
    step, with its state saved. Started by `torchrun`, each process takes its share of every batch; the folder
    of the run has to be one that all of them see.

    Args:
        on_event: called with what happens, in the first process; see `gspn2.training.events`.
        resume: go on from `last.safetensors`, if there is one. `config` must then be that of the run, but for
            `out`, `device`, `workers`, `checkpoint_every`, `tensorboard` and `shard`.
        overwrite: replace a run that is in the folder. Other files there are left alone.

    Raises:
        UserError: a setting, the data, the model or the folder cannot be used; nothing has been changed.
        TrainingFailed: the loss or a gradient is not finite; the checkpoint before it and the batch are kept.
        Interrupted: a signal came.
    """
    if resume and overwrite:
        raise UserError("resume and overwrite exclude each other")
    with joined() as world:
        return _train(config, on_event or (lambda event: None), resume, overwrite, world)


def _train(config: TrainConfig, emit: OnEvent, resume: bool, overwrite: bool, world: World) -> TrainResult:
    # A function of its own: what holds on to the other processes is gone when it returns.
    last = config.out_dir / LAST
    # What the first process finds is what counts: it is also the one that soon writes there.
    if world.is_main and not (resume or overwrite):
        check_empty(config.out_dir)
    (resuming,) = world.agree(int(world.is_main and resume and last.exists()))
    run = Run(config, emit, world, bool(resuming))
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
    return read_info(last).config if last.exists() else None


class Run:
    """The state of one run, from loading to summary.

    Args:
        resuming: `restore` follows, not `start`: weights to begin with are not needed, and may be gone.
    """

    def __init__(self, config: TrainConfig, emit: OnEvent, world: World, resuming: bool = False) -> None:
        self.config = config
        self.world = world
        self.emit: OnEvent = emit if world.is_main else (lambda event: None)
        self.out = config.out_dir
        self.device = pick_device(config.device, world.local_rank if world.size > 1 else None)
        self.amp = amp_dtype(config.amp, self.device)
        if config.tensorboard and world.is_main:
            check_installed()
        seed_everything(config.seed)
        self.data: Data = load_data(config)
        names, preprocess = self.data.class_names, self.data.preprocess
        model = build_model(config, preprocess, len(names), config.pretrained and not resuming)
        if not resuming:
            start_weights(model, config)
        teacher = make_teacher(config, preprocess, names)
        self.learner = Learner(config, model, len(names), self.device, self.amp, world, teacher)
        self.loader, self.batches = train_loader(self.data.train, config, self.device, world)
        self.tests = eval_loader(self.data.test, config.batch_size, config.workers, self.device, world)
        self.steps_per_epoch = self.batches.steps
        self.steps = config.epochs * self.steps_per_epoch
        self.epoch = self.step = 0
        self.loss_sum = self.seconds = self.train_seconds = 0.0
        self._clock = time.perf_counter()
        self.best: EpochRow | None = None
        self.pending: list[tuple[int, float, Tensor, Tensor]] = []
        self.faults: dict[str, None] = {}
        self._listing: list[str] = []
        self._told = 0
        self.log: RunLog | None = None
        self.board: TensorBoard | None = None

    # -- beginning

    def start(self) -> None:
        """Begin in an empty folder, or in the place of an older run."""
        tensors = self._gathered()
        if self.world.is_main:
            try:
                self.out.mkdir(parents=True, exist_ok=True)
                for name in RUN_FILES:
                    (self.out / name).unlink(missing_ok=True)
                self.log = RunLog(self.out, None)
                write_json(self.out / CONFIG, self.config.to_json())
                self._write_last(tensors)
            except OSError as error:
                raise UserError(f"out: cannot write to {self.out}: {error}") from error
        self._open_board()
        self.world.wait()

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
        check_whole(self.out, state)
        restore_learner(self.learner, tensors, info.path)
        self.epoch, self.step = info.epoch, info.step
        self.loss_sum = state["loss_sum"]
        self.seconds, self.train_seconds = state["seconds"], state["train_seconds"]
        self.best = EpochRow(**state["best"]) if state["best"] else None
        self._listing = state.get("faults", [])
        self.faults = dict.fromkeys(self._listing)
        self._told = len(self._listing)
        if self.world.is_main:
            for stale in self.out.glob(".*.tmp"):
                stale.unlink()
            self.log = RunLog(self.out, state["log"])
        self._open_board()
        for name, here in self._environment().items():
            was = state["environment"].get(name, here)
            if was != here:
                self.emit(Notice(f"{name} is {here}, was {was}: the numbers may differ in the last bits"))

    def _open_board(self) -> None:
        if self.config.tensorboard and self.world.is_main:
            self.board = TensorBoard(self.out, self.step)

    # -- the loop

    def finish(self) -> TrainResult:
        """Train and test what is left of the run."""
        self.emit(self._started())
        for text in (*self.config.unreached, *unused(self.config)):
            self.emit(Notice(text))
        self._clock = time.perf_counter()
        try:
            with StopRequest() as self.stop:
                while self.epoch < self.config.epochs:
                    self._one_epoch()
        finally:
            for file in (self.log, self.board):
                if file is not None:
                    file.close()
        result = self._result()
        if self.world.is_main:
            write_json(self.out / SUMMARY, self._summary(result))
        # Whoever leaves first would take the connection away from the others.
        self.world.wait()
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
        for file in (self.log, self.board):
            if file is not None:
                file.epoch(row)
        self.epoch += 1
        self.loss_sum = 0.0
        is_best = self.best is None or (row.top1, -row.test_loss) > (self.best.top1, -self.best.test_loss)
        if is_best:
            self.best = row
            self._save_best()
        self._count_time(training=False)
        self.save_last()
        self.emit(EpochDone(row, is_best, time.perf_counter() - began))
        # No process may read on before the files are whole: one that fails would leave the others behind.
        self.world.wait()

    def _train_epoch(self) -> None:
        self.learner.model.train()
        self.batches.epoch = self.epoch
        self.batches.start = self.step - self.epoch * self.steps_per_epoch
        self._reported = self._epoch_began = time.perf_counter()
        self._images_done = 0
        every = self.config.checkpoint_every
        for parts in self._load():
            lr = self._lr(self.step)
            epochs = self.step / self.steps_per_epoch
            loss, norm = self.learner.step(self.step, lr, epochs, parts)
            self.step += 1
            self.pending.append((self.step, lr, loss, norm))
            self._images_done += self.batches.batch_size
            # The last step of an epoch is saved when it has been tested.
            if every and self.step % every == 0 and self.step % self.steps_per_epoch:
                self._report()
                self._count_time(training=True)
                self.save_last()
        self._report()
        self._count_time(training=True)

    def _load(self) -> Iterator[list[Batch]]:
        """This process's parts of every step of the epoch, until somebody is asked to stop.

        Workers that a batch system's SIGTERM has ended too are no error then.
        """
        loaded = iter(self.loader)
        while True:
            broken: Exception | None = None
            parts: list[Batch] = []
            try:
                for inputs, labels, faults in islice(loaded, self.config.accumulate):
                    parts.append((inputs, labels))
                    self.faults.update(dict.fromkeys(faults))
            except LOST_WORKERS as error:
                broken = error
            ends = not parts and broken is None
            due = time.perf_counter() - self._reported > REPORT_SECONDS and self.world.is_main
            signum, report = self.world.agree(self.stop.signum or 0, int(due))
            if signum and not ends:
                self._stop(signum, training=True)
            if broken is not None:
                raise broken
            if ends:
                return
            if report:
                self._report()
            yield parts

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
        shares = torch.stack([torch.stack((loss, norm.to(loss))) for *_, loss, norm in self.pending])
        values = (self.world.sum(shares) / self.world.size).tolist()
        lines = []
        for (step, lr, *_), (loss, norm) in zip(self.pending, values, strict=True):
            if not (math.isfinite(loss) and math.isfinite(norm)):
                self._fail(step, lr, loss, norm)
            self.loss_sum += loss
            lines.append({"epoch": self.epoch + 1, "step": step, "lr": lr, "loss": loss, "grad_norm": norm})
        for file in (self.log, self.board):
            if file is not None:
                file.steps(lines)
        self.pending.clear()
        done = self.step - self.epoch * self.steps_per_epoch
        rate = self._images_done / max(1e-9, self._reported - self._epoch_began)
        self.emit(StepDone(self.epoch + 1, self.step, self.loss_sum / done, lines[-1]["lr"], rate))

    def _fail(self, step: int, lr: float, loss: float, norm: float) -> None:
        saved = save_failed_batch(self.out, self.data.train, self.learner, self.epoch, step - 1, loss, norm)
        what = f"loss is {loss}" if not math.isfinite(loss) else f"gradient norm is {norm}"
        raise TrainingFailed(
            f"{what} at step {step} (epoch {self.epoch + 1}, lr {lr:.3g}); the checkpoint before it is kept: "
            f"{self.out / LAST}, the batch is in {saved}. Try a smaller lr, a longer warm-up or amp off"
        )

    def _stop(self, signum: int, training: bool) -> None:
        self._report()
        self._count_time(training)
        self.save_last()
        where = f"epoch {self.epoch + 1}, step {self.step} of {self.steps}"
        raise Interrupted(signum, self.out / LAST, where)

    def _count_time(self, training: bool) -> None:
        """Credit the time since the last call to the run, which sums it up over interruptions."""
        now = time.perf_counter()
        self.seconds += now - self._clock
        self.train_seconds += now - self._clock if training else 0.0
        self._clock = now

    # -- testing and saving

    def _test(self) -> Evaluation:
        def progress(images: int) -> None:
            self.emit(EvalProgress(self.epoch + 1, images, len(self.data.test)))
            # Alone, one need not agree; together, the next step is soon enough.
            if self.stop.signum is not None and self.world.size == 1:
                self._stop(self.stop.signum, training=False)

        try:
            with whole(self.learner.tested):
                evaluation = evaluate(
                    self.learner.tested,
                    self.tests,
                    device=self.device,
                    amp=self.amp,
                    channels_last=self.config.channels_last,
                    on_batch=progress,
                    world=self.world,
                )
        except LOST_WORKERS:
            # Workers may have got the signal, too.
            if self.stop.signum is not None and self.world.size == 1:
                self._stop(self.stop.signum, training=False)
            raise
        self.faults.update(dict.fromkeys(self.tests.faults))
        return evaluation

    def save_last(self) -> None:
        """Write the whole state; every process has to call it."""
        self._listing = self.world.gather(list(self.faults))
        tensors = self._gathered()
        if self.world.is_main:
            self._write_last(tensors)

    def _gathered(self) -> dict[str, Tensor]:
        """The whole state, in the first process."""
        return gathered(learner_tensors(self.learner), self.world.is_main)

    def _environment(self) -> dict[str, Any]:
        return environment(self.device, self.world, self.learner.sharded)

    def _write_last(self, tensors: dict[str, Tensor]) -> None:
        assert self.log is not None, "the first process has opened its log"
        if len(self._listing) > self._told:
            self._told = len(self._listing)
            self.emit(Notice(write_faults(self.out, self._listing)))
        state = {
            "loss_sum": self.loss_sum,
            "seconds": self.seconds,
            "train_seconds": self.train_seconds,
            "best": vars(self.best) if self.best else None,
            "log": self.log.sync(),
            "fingerprint": self.data.fingerprint,
            "environment": self._environment(),
            "faults": self._listing,
        }
        save_checkpoint(self.out / LAST, tensors, self._info("run", state))

    def _save_best(self) -> None:
        weights = gathered(self.learner.tested.state_dict(), self.world.is_main)
        if self.world.is_main:
            save_checkpoint(self.out / BEST, weights, self._info("weights", {}))

    def _info(self, kind: str, state: dict[str, Any]) -> CheckpointInfo:
        row = self.best
        return CheckpointInfo(
            path=self.out / (LAST if kind == "run" else BEST),
            kind=kind,
            weights="model" if self.learner.ema is None else "ema",
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
            parameters=count_parameters(self.learner.model),
            image_size=self.data.preprocess.image_size,
            class_names=self.data.class_names,
            train_images=len(self.data.train),
            test_images=len(self.data.test),
            steps_per_epoch=self.steps_per_epoch,
            steps=self.steps,
            first_step=self.step,
            processes=self.world.size,
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
            parameters=count_parameters(self.learner.model),
            seconds=self.seconds,
            faults=tuple(self._listing),
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
            "environment": self._environment(),
            "unreadable_images": len(result.faults),
            "class_names": self.data.class_names,
            "config": self.config.to_json(),
        }
