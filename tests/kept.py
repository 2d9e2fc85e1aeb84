"""Where tests keep what takes long to make: compiled kernels, and verdicts on them."""

from __future__ import annotations

import contextlib
import functools
import getpass
import os
import tempfile
import time
from pathlib import Path


@functools.cache
def kept_folder() -> Path:
    """A folder of this user, for all checkouts, and for a day: each change of a source makes new files."""
    user = os.getuid() if hasattr(os, "getuid") else getpass.getuser()
    folder = Path(tempfile.gettempdir()) / f"gspn2-tests-{user}"
    folder.mkdir(mode=0o700, exist_ok=True)
    for file in folder.iterdir():
        with contextlib.suppress(FileNotFoundError):  # another process was quicker
            if time.time() - file.stat().st_mtime > 86400:
                file.unlink()
    return folder
