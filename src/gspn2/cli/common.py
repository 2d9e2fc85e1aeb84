"""What the subcommands share: parsing of values, and errors as one line."""

from __future__ import annotations

import argparse
import ast
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..training.errors import TrainingFailed, UserError


def guarded(command: str, job: Callable[[], int]) -> int:
    """The job's exit code; an error that is not ours to mend becomes one line on stderr.

    2 where nothing has been done yet, 1 where the job failed: a loss without sense, a full disk, no memory.
    """
    import torch

    try:
        return job()
    except UserError as error:
        return complain(command, error, 2)
    except torch.OutOfMemoryError:
        return complain(command, "out of device memory: a smaller --batch-size needs less", 1)
    except BrokenPipeError:
        raise
    except (TrainingFailed, OSError) as error:
        return complain(command, error, 1)


def make_folder(out: Path) -> None:
    """Make the folder that --out names, before any work: a UserError if that cannot be."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"out: cannot write to {out}: {error.strerror}") from error


def plural(count: int, what: str) -> str:
    """A number of things."""
    return f"{count} {what}{'' if count == 1 else 's'}"


def complain(command: str, error: object, code: int) -> int:
    """Print an error as one line; returns the exit code."""
    print(f"gspn2 {command}: error: {' '.join(str(error).split())}", file=sys.stderr)
    return code


def key_value(text: str) -> tuple[str, Any]:
    """key=value, with value as Python or JSON writes it, or else as text."""
    key, equals, value = text.partition("=")
    if not equals or not key.isidentifier():
        raise argparse.ArgumentTypeError(f"expected key=value, got {text!r}")
    words = {"true": True, "false": False, "none": None, "null": None}
    if value.lower() in words:
        return key, words[value.lower()]
    try:
        return key, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return key, value


def image_size(text: str) -> tuple[int, int]:
    """224 or 224x320 (height x width)."""
    sizes = text.lower().split("x")
    if len(sizes) not in (1, 2) or not all(size.isdigit() and int(size) > 0 for size in sizes):
        raise argparse.ArgumentTypeError(f"expected SIZE or HEIGHTxWIDTH, got {text!r}")
    return int(sizes[0]), int(sizes[-1])


def floats(text: str) -> tuple[float, ...]:
    """0.9,0.999"""
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected numbers with commas between, got {text!r}") from None


def optional(kind: Callable[[str], Any]) -> Callable[[str], Any]:
    """A type that also takes the word none."""

    def parse(text: str) -> Any:
        return None if text.lower() in ("none", "off") else kind(text)

    parse.__name__ = getattr(kind, "__name__", "value")
    return parse


def positive(text: str) -> int:
    """A whole number of at least 1."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)


def whole(text: str) -> int:
    """A whole number of at least 0."""
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 0, got {text!r}")
    return int(text)


def percent(text: str) -> float:
    """A number from 0 to 100."""
    value = not_negative(text)
    if value > 100:
        raise argparse.ArgumentTypeError(f"expected at most 100, got {text!r}")
    return value


def not_negative(text: str) -> float:
    """A number of at least 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number of at least 0, got {text!r}")
    return value
