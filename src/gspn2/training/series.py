"""What comparison and drawing share: series of runs, reported and resumed one by one."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from .errors import CheckpointError, UserError

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


def read_result(path: Path, schema: int, what: str, *keys: str) -> dict[str, Any]:
    """A result file.

    Args:
        schema: that of the reader.
        what: whose result is expected, for messages.
        keys: that every result of this kind has, for kinds that count their schemas alike.

    Raises:
        UserError: no JSON, or not of this kind.
    """
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from error
    if not isinstance(result, dict) or result.get("schema") != schema or not set(keys) <= set(result):
        raise UserError(f"{path}: expected a result of {what}, schema {schema}")
    return result


def check_settings(path: Path, stored: dict[str, Any], wanted: dict[str, Any]) -> None:
    """A UserError that names the settings in which a result or checkpoint differs from what is wanted."""
    changed = [
        f"{name} was {stored.get(name)}, is {value}"
        for name, value in wanted.items()
        if stored.get(name) != value
    ]
    if changed:
        raise UserError(f"{path}: had other settings ({'; '.join(changed)}): take another folder")
