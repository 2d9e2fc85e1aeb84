"""Compiled kernels on disk, so that only the first process of a machine waits for the compiler.

One file a kernel, named by a digest of all it was made from (`toolchain.key`), so that a file is never stale:
it is there or it is not. Files appear whole, by renaming, and carry a digest of their content: what was cut
short or damaged counts as absent. Nothing here raises: a folder that cannot be used costs time, not results,
and is reported once.
"""

from __future__ import annotations

import hashlib
import os
import sys
import tempfile
import warnings
from contextlib import suppress
from pathlib import Path

_MAGIC = b"gspn2 kernel 1\n"
_warned: set[Path] = set()


def folder() -> Path:
    """Where compiled kernels are kept: `GSPN2_CACHE_DIR`, or `gspn2` in the user's cache folder."""
    named = os.environ.get("GSPN2_CACHE_DIR")
    if named:
        return Path(named) / "kernels"
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local"
    else:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "gspn2" / "kernels"


def load(key: str) -> bytes | None:
    """What `store` kept under this key; None if there is nothing or it is damaged."""
    try:
        content = (folder() / key).read_bytes()
    except (OSError, RuntimeError):
        return None
    start = len(_MAGIC) + hashlib.sha256().digest_size
    code = content[start:]
    return code if content[:start] == _MAGIC + hashlib.sha256(code).digest() else None


def store(key: str, code: bytes) -> None:
    """Keep `code` under `key`; processes may do so at the same time, with the same key and code."""
    try:
        place = folder()
        place.mkdir(mode=0o700, parents=True, exist_ok=True)
        handle, draft = tempfile.mkstemp(prefix=key[:16], suffix=".draft", dir=place)
    except (OSError, RuntimeError) as error:
        _warn(error)
        return
    try:
        with open(handle, "wb") as file:
            file.write(_MAGIC + hashlib.sha256(code).digest() + code)
        os.replace(draft, place / key)
    except OSError as error:
        with suppress(OSError):
            os.unlink(draft)
        # Windows refuses to replace a file that another process is reading: that one is as good as ours.
        if load(key) is None:
            _warn(error)


def _warn(error: Exception) -> None:
    # Path.home() raises RuntimeError for a user without a home folder.
    place = Path() if isinstance(error, RuntimeError) else folder()
    if place not in _warned:
        _warned.add(place)
        warnings.warn(
            f"gspn2 cannot keep its compiled CUDA kernels on disk ({error}) and compiles them anew in every "
            "process; set GSPN2_CACHE_DIR to a folder that can be written",
            UserWarning,
            stacklevel=2,
        )
