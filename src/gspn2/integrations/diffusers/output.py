"""Where results go, looked at before any work is done."""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path

from gspn2.training.errors import UserError

from ..images import SUFFIXES, draft_of


def check_picture(out: Path) -> None:
    """Raise where a picture could not be written.

    Raises:
        UserError: another suffix, a name that is too long, a folder of that name, or none for it that can be
            written to.
    """
    if out.suffix.lower() not in SUFFIXES:
        raise UserError(f"out: expected a name that ends in {', '.join(SUFFIXES)}, got {out.name!r}")
    try:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            os.lstat(draft_of(out))
    except OSError as error:
        raise UserError(f"out: cannot write {out}: {error.strerror or error}") from error
    if out.is_dir() or not out.parent.is_dir():
        raise UserError(
            f"out: cannot write {out}: {'it is a' if out.is_dir() else 'there is no such'} folder"
        )
    check_writable(out.parent)


def check_writable(folder: Path) -> None:
    """Raise where nothing could be written to a folder, which need not be there yet.

    Raises:
        UserError: it, or where it would be made, is no folder or takes no files.
    """
    place = next(it for it in (folder, *folder.absolute().parents) if it.exists())
    try:
        # Only trying tells of permissions, mounts and quotas alike. The file has no name to leave behind.
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        raise UserError(f"out: cannot write to {place}: {error.strerror or error}") from error


def stages_folder(out: Path) -> Path:
    """Where the finished stages of a picture lie until it is written."""
    return out.with_name(f"{out.name}.stages")
