"""What the demo shows in the terminal: a bar for each training and one for the measurement."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from ..training.events import EpochDone, Event, RunStarted, StepDone
from .charts import duration
from .cost import Point


class DemoProgress:
    """Live bars on a terminal; elsewhere a line for each epoch and measured point. Use as a context."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bars = Progress(
            TextColumn("{task.description:<10}"),
            BarColumn(bar_width=24),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[state]}"),
            console=console,
            disable=not console.is_terminal,
        )

    def __enter__(self) -> DemoProgress:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()

    def training(self, name: str) -> Callable[[Event], None]:
        """A new bar; returns what takes the training's events."""
        task = self._bars.add_task(name, total=None, state="")
        epochs = 0
        tested = ""

        def show(event: Event) -> None:
            nonlocal epochs, tested
            match event:
                case RunStarted():
                    epochs = event.config.epochs
                    self._bars.update(task, total=event.steps)
                case StepDone():
                    state = f"epoch {event.epoch}/{epochs}  loss {event.loss:.3f}{tested}"
                    self._bars.update(task, completed=event.step, state=state)
                case EpochDone():
                    row = event.row
                    tested = f"  test {row.top1:.1f}%"
                    state = f"epoch {row.epoch}/{epochs}  loss {row.train_loss:.3f}{tested}"
                    self._bars.update(task, state=state)
                    self._line(f"{name}: {state}  {event.seconds:.1f} s")

        return show

    def measuring(self, name: str, sides: Sequence[int]) -> Callable[[Point], None]:
        """A new bar over image sides; returns what takes the measured points."""
        order = sorted(sides)
        task = self._bars.add_task(name, total=len(order), state="")

        def show(point: Point) -> None:
            state = f"{point.side} x {point.side}  {point.contender} {duration(point.seconds)}"
            self._bars.update(task, completed=order.index(point.side) + 1, state=state)
            self._line(f"{name}: {state}")

        return show

    def _line(self, text: str) -> None:
        if not self._console.is_terminal:
            self._console.print(text, markup=False)
