"""The log of a run: `log.csv`, a row an epoch, and `log.jsonl`, a line a step.

There is no clock in either: a run that was killed and resumed writes the same bytes as one that was not.
"""

from __future__ import annotations

import csv
import dataclasses
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

EPOCHS, STEPS = "log.csv", "log.jsonl"
FAULTS = "unreadable.txt"
"""What is wrong with images that were left out, a line each."""


@dataclass(frozen=True)
class EpochRow:
    """One epoch of a run.

    Args:
        epoch: counted from 1.
        step: steps of the run so far.
        lr: learning rate of its last step.
        train_loss: mean loss of its steps, with label smoothing, mixup and augmentation.
        test_loss: mean cross-entropy on the test images.
        top1, top5: accuracy on the test images, in percent.
    """

    epoch: int
    step: int
    lr: float
    train_loss: float
    test_loss: float
    top1: float
    top5: float


_COLUMNS = [field.name for field in dataclasses.fields(EpochRow)]


class RunLog:
    """Both files of a run's folder, cut to where a checkpoint was written.

    Args:
        folder: of the run.
        sizes: bytes of each file at the checkpoint, as `sync` returned them; None starts both anew.
    """

    def __init__(self, folder: Path, sizes: dict[str, int] | None) -> None:
        self._files = {}
        for name in (EPOCHS, STEPS):
            path = folder / name
            keep = 0 if sizes is None or not path.exists() else sizes[name]
            # newline="": the csv module and JSON lines end lines themselves, alike on every system.
            file = open(path, "a", encoding="utf-8", newline="")  # noqa: SIM115 - closed by close()
            if path.stat().st_size > keep:
                file.truncate(keep)
            self._files[name] = file
        if (folder / EPOCHS).stat().st_size == 0:
            self._write_row(_COLUMNS)

    def epoch(self, row: EpochRow) -> None:
        """Append an epoch."""
        # repr gives every digit of a float: reading it back gives the same number.
        self._write_row([repr(value) for value in dataclasses.astuple(row)])

    def steps(self, lines: Iterable[dict[str, float]]) -> None:
        """Append steps."""
        for line in lines:
            self._files[STEPS].write(json.dumps(line) + "\n")

    def sync(self) -> dict[str, int]:
        """Bring everything to the disk; returns the size of each file."""
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())
        return {name: file.tell() for name, file in self._files.items()}

    def close(self) -> None:
        """Close both files."""
        for file in self._files.values():
            file.close()

    def _write_row(self, values: list[str]) -> None:
        csv.writer(self._files[EPOCHS], lineterminator="\n").writerow(values)


def read_history(folder: str | Path) -> list[EpochRow]:
    """The epochs in a run's `log.csv`."""
    path = Path(folder) / EPOCHS
    if not path.exists():
        return []
    kinds: dict[str, Any] = {f.name: int if f.type == "int" else float for f in dataclasses.fields(EpochRow)}
    with open(path, encoding="utf-8", newline="") as file:
        return [
            EpochRow(**{name: kinds[name](value) for name, value in row.items()})
            for row in csv.DictReader(file)
        ]
