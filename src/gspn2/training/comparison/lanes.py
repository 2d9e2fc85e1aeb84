"""Several runs on one device: each has a stream of its own, and they take turns at the CPU."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ...bench.about import machine
from ..checkpoint import write_json
from ..errors import Interrupted
from .images import Images, Source, load
from .plan import Run, Settings
from .single import Say, SingleRun

SCHEMA = 1
"""Of result files. Raised when a reader of the old ones would misread the new ones."""


class _Lane(NamedTuple):
    run: Run
    say: Say
    training: Generator[None, None, dict[str, Any]]
    stream: torch.cuda.Stream | None


class Lanes:
    """Runs that share a device. A small model's kernels leave most of it idle; streams fill it.

    Args:
        settings, out: as for `compare`.
        device: where to compute.
        command: the command line, for the results.
        jobs: how many runs the whole comparison has going at a time, for the results.
        stopped: the signal that asks for a stop, if there was one.
    """

    def __init__(
        self,
        settings: Settings,
        out: Path,
        device: torch.device,
        command: str,
        jobs: int,
        stopped: Callable[[], int | None],
    ) -> None:
        self.settings, self.out, self.device = settings, out, device
        self.command, self.jobs, self.stopped = command, jobs, stopped
        self._lanes: list[_Lane] = []
        self._images: dict[Source, Images] = {}
        self._interrupted: Interrupted | None = None

    @property
    def busy(self) -> int:
        """Runs that have begun and not ended."""
        return len(self._lanes)

    def begin(self, run: Run, say: Say) -> None:
        """Start a run, or go on with it."""
        on_cuda = self.device.type == "cuda"
        images = self._load(run)
        stream = torch.cuda.Stream(self.device) if on_cuda else None
        with _on(stream):
            single = SingleRun(run, self.settings, images, self.out, self.device, say)
        self._lanes.append(_Lane(run, say, single.train(self.stopped), stream))

    def turn(self) -> list[Run]:
        """Let every run go on to where it waits for the device; those that ended, their results written.

        Raises:
            Interrupted: all runs have been stopped and saved.
        """
        ended = []
        for lane in list(self._lanes):
            try:
                with _on(lane.stream):
                    next(lane.training)
            except StopIteration as end:
                self._lanes.remove(lane)
                self._write(lane, end.value)
                ended.append(lane.run)
            except Interrupted as stop:
                self._lanes.remove(lane)
                self._interrupted = self._interrupted or stop
        if self._interrupted is not None and not self._lanes:
            raise self._interrupted
        return ended

    def _write(self, lane: _Lane, result: dict[str, Any]) -> None:
        about = machine(self.device, self.command)
        kept = {"schema": SCHEMA, **result, "jobs": self.jobs, "machine": about}
        write_json(self.out / f"{lane.run.name}.json", kept)
        (self.out / f"{lane.run.name}.safetensors").unlink(missing_ok=True)

    def _load(self, run: Run) -> dict[str, Images]:
        """Images by use. What no run needs any longer goes when others come."""
        wanted = run.sources(self.settings)
        if any(source not in self._images for source in wanted.values()):
            needed = {
                it
                for other in (run, *(lane.run for lane in self._lanes))
                for it in other.sources(self.settings).values()
            }
            self._images = {source: held for source, held in self._images.items() if source in needed}
            for source in wanted.values():
                if source not in self._images:
                    self._images[source] = load(source, self.out / "images", self.device)
            if self.device.type == "cuda":
                # They were copied in another stream than those that read them.
                torch.cuda.synchronize(self.device)
        return {use: self._images[source] for use, source in wanted.items()}


def _on(stream: torch.cuda.Stream | None) -> contextlib.AbstractContextManager[Any]:
    return contextlib.nullcontext() if stream is None else torch.cuda.stream(stream)
