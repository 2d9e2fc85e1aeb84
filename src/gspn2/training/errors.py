"""What can go wrong in a way the caller can put right; every message is one line."""

from __future__ import annotations

import signal
from pathlib import Path


class UserError(ValueError):
    """A setting, path or file that cannot be used; nothing has been done yet."""


class DataError(UserError):
    """A data set, or an image of it, that cannot be used."""

    def __init__(self, message: str) -> None:
        # A DataLoader worker hands an exception on as one text: the message is the end of its traceback.
        last = message.strip().splitlines()[-1] if message.strip() else message
        super().__init__(last.split("DataError: ", 1)[-1])


class CheckpointError(UserError):
    """A file that is no checkpoint of ours, or does not fit."""


class TrainingFailed(RuntimeError):
    """Training cannot go on: the loss or a gradient is no longer finite, or another process has ended."""


class Interrupted(Exception):
    """SIGINT or SIGTERM stopped a run, after its state was written.

    Args:
        signum: the signal.
        checkpoint: the file to resume from.
        where: epoch and step in words.
    """

    def __init__(self, signum: int, checkpoint: Path, where: str) -> None:
        super().__init__(f"{signal.Signals(signum).name} at {where}; saved {checkpoint}")
        self.signum = signum
        self.checkpoint = checkpoint
        self.where = where
