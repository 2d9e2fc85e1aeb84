"""What `gspn2 train` shows: a live bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import TYPE_CHECKING

from ..training.errors import Interrupted
from ..training.events import EpochDone, EvalProgress, Event, Notice, RunStarted, StepDone
from ..training.log import FAULTS
from .common import plural

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from ..training.engine import TrainResult

PLAIN_SECONDS = 10.0


class TrainProgress:
    """Takes the events of `train`; use as a context so that the terminal is left as it was."""

    def __init__(self) -> None:
        self._live: Progress | None = _live_bar() if sys.stdout.isatty() else None
        self._task: TaskID | None = None
        self._printed = time.monotonic()

    def __enter__(self) -> TrainProgress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def __call__(self, event: Event) -> None:
        """Show an event."""
        match event:
            case RunStarted():
                self._start(event)
            case StepDone():
                self._step(event)
            case EvalProgress() if self._live is not None and self._task is not None:
                self._live.update(self._task, state=f"testing {event.images}/{event.total}")
            case EpochDone():
                self._epoch(event)
            case Notice():
                self._say(f"note: {event.text}")

    def interrupted(self, stop: Interrupted, command: str) -> None:
        """Say where the run stopped and how to go on."""
        self.__exit__(None, None, None)
        print(f"stopped at {stop.where}; saved {stop.checkpoint}", file=sys.stderr)
        print(f"resume with: {command}", file=sys.stderr)

    def finished(self, result: TrainResult) -> None:
        """Say what came out."""
        best = result.best_row
        print(
            f"done in {_span(result.seconds)}: top-1 {best.top1:.2f}%, top-5 {best.top5:.2f}% "
            f"(epoch {best.epoch})"
        )
        if result.faults:
            print(f"left out {plural(len(result.faults), 'unreadable image')}: {result.out / FAULTS}")
        print(f"best weights: {result.best}")

    def _start(self, event: RunStarted) -> None:
        self._epochs, self._steps, self._per_epoch = event.config.epochs, event.steps, event.steps_per_epoch
        height, width = event.image_size
        self._say(
            f"{event.config.model}: {_count(event.parameters)} parameters, {height} x {width} images, "
            f"{event.device}, mixed precision {event.amp}{_processes(event.processes)}"
        )
        self._say(
            f"{event.config.data}: {event.train_images} training and {event.test_images} test images, "
            f"{len(event.class_names)} classes; {plural(event.config.epochs, 'epoch')} of "
            f"{plural(event.steps_per_epoch, 'step')}"
        )
        if event.first_step:
            self._say(f"resuming at step {event.first_step} of {event.steps}")
        self._say(f"output: {event.out}")
        if self._live is not None:
            self._task = self._live.add_task(
                "", total=event.steps, completed=event.first_step, state="starting"
            )
            self._live.start()

    def _step(self, event: StepDone) -> None:
        epoch = f"epoch {event.epoch}/{self._epochs}"
        state = f"loss {event.loss:.3f}  lr {event.lr:.1e}  {event.images_per_second:.0f} img/s"
        if self._live is not None and self._task is not None:
            self._live.update(self._task, completed=event.step, description=epoch, state=state)
        elif time.monotonic() - self._printed > PLAIN_SECONDS:
            done = event.step - (event.epoch - 1) * self._per_epoch
            self._say(f"{epoch} step {done}/{self._per_epoch}  {state}")

    def _epoch(self, event: EpochDone) -> None:
        row = event.row
        self._say(
            f"epoch {row.epoch:>{len(str(self._epochs))}}/{self._epochs}  train loss {row.train_loss:.3f}  "
            f"test loss {row.test_loss:.3f}  top-1 {row.top1:6.2f}%  top-5 {row.top5:6.2f}%  "
            f"{event.seconds:.1f} s{'  *' if event.is_best else ''}"
        )

    def _say(self, text: str) -> None:
        self._printed = time.monotonic()
        if self._live is not None:
            self._live.console.print(text, highlight=False, markup=False)
        else:
            print(text, flush=True)


@contextlib.contextmanager
def counting(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar on a terminal's stderr for a job of `total` images; yields what to call with the number done."""
    if not sys.stderr.isatty():
        yield lambda done: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=total)
        yield lambda done: bar.update(task, completed=done)


def _live_bar() -> Progress:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TextColumn("{task.fields[state]}"),
        TextColumn("eta"),
        TimeRemainingColumn(),
        transient=True,
        expand=True,
    )


def _span(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"


def _processes(count: int) -> str:
    return f", {count} processes" if count > 1 else ""


def _count(number: int) -> str:
    for size, unit in ((1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.2f} {unit}"
    return str(number)
