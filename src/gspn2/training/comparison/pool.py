"""Runs of a comparison side by side: processes that have lanes each, over all devices."""

from __future__ import annotations

import contextlib
import os
import signal
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch

from ..errors import Interrupted, TrainingFailed, UserError
from ..stopping import StopRequest
from .images import Source, making, workers
from .lanes import Lanes
from .plan import Run, Settings

LANES = 3
"""Runs of a process. Their streams share the GPU, processes take turns at it; a few of both hide what a run
does on the CPU. Nine runs on an H200 made about 190 steps a second in three processes, and 160 in nine, of
another task."""
LOOK_SECONDS = 0.2
OnWord = Callable[[Run, str, str, int], None]


def work(
    pipe: Connection, device: str, settings: Settings, out: Path, command: str, jobs: int, threads: int
) -> None:
    """What a process does: takes runs out of the pipe until None comes, and tells what becomes of them."""
    torch.set_num_threads(threads)
    with StopRequest() as stop:
        # Ctrl-C reaches every process of a terminal; the parent passes it on, once, as SIGTERM.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            _work(pipe, torch.device(device), settings, out, command, jobs, stop)
        except Interrupted as stopped:
            pipe.send(("interrupted", None, stopped.where, 0))
        except UserError as error:
            pipe.send(("refused", None, str(error), 0))
        except (EOFError, BrokenPipeError):
            return  # the parent is gone
        except Exception:
            # The parent raises it.
            pipe.send(("failed", None, traceback.format_exc(), 0))


def _work(
    pipe: Connection,
    device: torch.device,
    settings: Settings,
    out: Path,
    command: str,
    jobs: int,
    stop: StopRequest,
) -> None:
    if device.type == "cuda":
        torch.cuda.set_device(device)
    lanes = Lanes(settings, out, device, command, jobs, lambda: stop.signum)
    while True:
        while pipe.poll(None if not lanes.busy else 0):
            run = pipe.recv()
            if run is None:
                # Nothing else will come, but for a stop.
                while lanes.busy:
                    _turn(lanes, pipe)
                return

            def say(what: str, text: str = "", step: int = 0, run: Run = run) -> None:
                pipe.send((what, run, text, step))

            if stop.signum is None:
                lanes.begin(run, say)
        _turn(lanes, pipe)


def _turn(lanes: Lanes, pipe: Connection) -> None:
    for run in lanes.turn():
        pipe.send(("ends", run, "", 0))


@dataclass
class _Worker:
    process: Any
    pipe: Connection
    runs: list[Run]


class Pool:
    """`jobs` runs at a time.

    Args:
        settings, out, command: as for `compare`.
        device: "cuda" spreads them over all of its kind, any other is taken as it is.
        jobs: how many, in all.
        on_word: takes a run, what happens to it, a text and its step.
    """

    def __init__(
        self,
        settings: Settings,
        out: Path,
        device: torch.device,
        jobs: int,
        command: str,
        on_word: OnWord,
    ) -> None:
        self.settings, self.out, self.jobs, self.command, self.on_word = settings, out, jobs, command, on_word
        self.devices = _devices(device)
        each = LANES if device.type == "cuda" else 1
        self.count = max(len(self.devices), -(-jobs // each)) if jobs >= len(self.devices) else jobs
        self.workers: list[_Worker] = []
        self._asked = False
        """To stop."""

    def run(self, runs: Sequence[Run]) -> None:
        """Do them all; their results are files.

        Raises:
            UserError: as `compare`.
            Interrupted: SIGINT or SIGTERM; what had begun was saved.
            TrainingFailed: a process has ended.
            RuntimeError: one failed.
        """
        with StopRequest() as stop, self._images(runs) as images:
            try:
                self._start(min(self.count, len(runs)))
                self._loop(list(runs), images, stop)
            except BaseException:
                self._ask_to_stop()
                raise
            finally:
                self._end()

    @contextlib.contextmanager
    def _images(self, runs: Sequence[Run]) -> Iterator[_Making]:
        sources = list(dict.fromkeys(it for run in runs for it in run.sources(self.settings).values()))
        with _Making(sources, self.out / "images") as made:
            yield made

    def _start(self, count: int) -> None:
        context = torch.multiprocessing.get_context("spawn")
        threads = max(1, (os.cpu_count() or 1) // count)
        with _deaf():
            for number in range(count):
                ours, theirs = context.Pipe()
                device = self.devices[number % len(self.devices)]
                given = (theirs, device, self.settings, self.out, self.command, self.jobs, threads)
                process = context.Process(target=work, args=given, daemon=True)
                process.start()
                theirs.close()
                self.workers.append(_Worker(process, ours, []))

    def _loop(self, waiting: list[Run], images: _Making, stop: StopRequest) -> None:
        where = ""
        while waiting or any(worker.runs for worker in self.workers):
            images.look()
            if stop.signum is not None and not self._asked:
                waiting.clear()
                self._ask_to_stop()
            self._hand_out(waiting, images)
            pipes: list[Any] = [worker.pipe for worker in self.workers if not worker.pipe.closed]
            for pipe in wait(pipes, LOOK_SECONDS):
                worker = next(it for it in self.workers if it.pipe is pipe)
                where = self._hear(worker) or where
        if stop.signum is not None:
            raise Interrupted(stop.signum, self.out, where or "the start of a run")

    def _hand_out(self, waiting: list[Run], images: _Making) -> None:
        """Runs whose images are there to those who have least to do."""
        while sum(len(worker.runs) for worker in self.workers) < self.jobs:
            run = next((it for it in waiting if images.there(it.sources(self.settings).values())), None)
            if run is None:
                return
            waiting.remove(run)
            worker = min(self.workers, key=lambda it: len(it.runs))
            worker.runs.append(run)
            worker.pipe.send(run)

    def _hear(self, worker: _Worker) -> str:
        """A word of a worker; where it was interrupted, if that is what it says."""
        try:
            what, run, text, step = worker.pipe.recv()
        except (EOFError, ConnectionResetError):
            # Reset: it ended with something unread that was sent to it, as when a signal reaches all at once.
            worker.pipe.close()
            if self._asked:
                # It had not begun, or was still importing.
                worker.runs.clear()
                return ""
            worker.process.join()
            names = ", ".join(run.name for run in worker.runs) or "no run"
            raise TrainingFailed(
                f"the process of {names} ended with exit code {worker.process.exitcode}, for want of memory "
                "perhaps; the same command goes on with fewer --jobs"
            ) from None
        if what == "refused":
            raise UserError(text)
        if what == "failed":
            raise RuntimeError(f"a run failed in its process:\n{text}")
        if what == "interrupted":
            worker.runs.clear()
            return str(text)
        if what == "ends":
            worker.runs.remove(run)
        self.on_word(run, what, text, step)
        return ""

    def _ask_to_stop(self) -> None:
        if self._asked:
            # A second signal would end a process before it has saved.
            return
        self._asked = True
        for worker in self.workers:
            if worker.process.is_alive():
                worker.process.terminate()
            with contextlib.suppress(OSError):
                worker.pipe.send(None)

    def _end(self) -> None:
        for worker in self.workers:
            with contextlib.suppress(OSError):
                worker.pipe.send(None)
        for worker in self.workers:
            worker.process.join()
            worker.pipe.close()


class _Making:
    """Images that are made in the background, in the order in which runs need them."""

    def __init__(self, sources: Sequence[Source], folder: Path) -> None:
        self.folder = folder
        self._sources = [source for source in sources if not source.there(folder)]
        self._open: dict[Source, tuple[contextlib.ExitStack, Sequence[Future[None]]]] = {}

    def __enter__(self) -> _Making:
        shards = sum(len(source.shards) for source in self._sources)
        if shards:
            with _deaf():
                self._pool = workers(min(shards, os.cpu_count() or 1))
                for source in self._sources:
                    stack = contextlib.ExitStack()
                    self._open[source] = stack, stack.enter_context(making(source, self.folder, self._pool))
        return self

    def __exit__(self, *error: Any) -> None:
        if self._sources:
            self._pool.shutdown(wait=True, cancel_futures=True)
        for stack, _ in self._open.values():
            # Not made to the end: the files go.
            with contextlib.suppress(InterruptedError):
                stack.__exit__(InterruptedError, InterruptedError(), None)

    def look(self) -> None:
        """Give those that are complete their names."""
        for source, (stack, parts) in list(self._open.items()):
            if all(part.done() for part in parts):
                del self._open[source]
                with stack:
                    for part in parts:
                        part.result()

    def there(self, sources: Any) -> bool:
        """Have all of these been made?"""
        return not any(source in self._open for source in sources)


def _devices(device: torch.device) -> list[str]:
    if device.type != "cuda" or device.index is not None:
        return [str(device)]
    return [f"cuda:{number}" for number in range(torch.cuda.device_count())]


@contextlib.contextmanager
def _deaf() -> Iterator[None]:
    """Processes that are started here do not hear Ctrl-C, not even while they import."""
    try:
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    except ValueError:  # no main thread: signals are not ours
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
