"""The log of a run for TensorBoard; needs the extra `gspn2[tensorboard]`."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path

from .errors import UserError
from .log import EpochRow

FOLDER = "tensorboard"


def check_installed() -> None:
    """Raise a UserError unless TensorBoard is there: asked before an older run is replaced."""
    if find_spec("tensorboard") is None:
        raise UserError('tensorboard: not installed: pip install "gspn2[tensorboard]"')


class TensorBoard:
    """Scalars under `train/` for every step and under `test/` for every epoch, by step.

    Args:
        folder: of the run.
        step: where the run goes on, or begins; what an older or killed run wrote for later steps is hidden.

    Raises:
        UserError: tensorboard is not installed.
    """

    def __init__(self, folder: Path, step: int) -> None:
        check_installed()
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(folder / FOLDER, purge_step=step + 1)

    def steps(self, lines: Iterable[dict[str, float]]) -> None:
        """Write steps."""
        for line in lines:
            for name in ("loss", "lr", "grad_norm"):
                self._writer.add_scalar(f"train/{name}", line[name], int(line["step"]))

    def epoch(self, row: EpochRow) -> None:
        """Write an epoch."""
        for name in ("test_loss", "top1", "top5"):
            self._writer.add_scalar(f"test/{name.removeprefix('test_')}", getattr(row, name), row.step)
        self._writer.flush()

    def close(self) -> None:
        """Write what is left."""
        self._writer.close()
