"""What comparison and drawing share: series of runs, reported and resumed one by one."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from .errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

R = TypeVar("R")


@dataclass(frozen=True)
class Progress(Generic[R]):
    """What is reported: every point of a curve, and every run that begins, ends or is skipped.

    Args:
        run: which.
        number, total: its place among the runs, from 1.
        what: "begins", "resumes", "skipped", "point", "ends" or "note".
        text: a line for people.
        step: of the run so far.
    """

    run: R
    number: int
    total: int
    what: str
    text: str = ""
    step: int = 0


def read_checkpoint(path: Path, kind: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What a run that was stopped has told of itself, and its tensors.

    Args:
        path: a safetensors file.
        kind: the key of its metadata.

    Raises:
        CheckpointError: the file is damaged.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            told = json.loads(file.metadata()[kind])
            return told, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    except (SafetensorError, OSError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path}: damaged, remove it: {error!r}") from error
