"""How kernel functions are compiled, and kept on disk."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba

_OPTIONS: dict[str, Any] = {"nogil": True, "error_model": "numpy"}


def jit(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a part of a kernel, without the GIL; division follows the hardware, not Python."""
    return numba.njit(**_OPTIONS)(function)


def jit_inline(function: Callable[..., Any]) -> Callable[..., Any]:
    """`jit` for a large part with a single caller: compiled with it, instead of once more on its own."""
    return numba.njit(inline="always", **_OPTIONS)(function)


def cached_jit(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile an entry point, into Numba's disk cache.

    Numba's cache looks at the file of the entry point alone. One that closes over `SOURCES` is compiled again
    when any file here changes, because values closed over are part of the key. Where no folder can be written
    to, it is compiled in every process.
    """
    try:
        return numba.njit(cache=True, **_OPTIONS)(function)
    except RuntimeError as error:
        warnings.warn(
            f"gspn2: CPU kernels are compiled in every process ({error}); NUMBA_CACHE_DIR may name a folder",
            UserWarning,
            stacklevel=2,
        )
        return jit(function)


def _digest() -> str:
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


SOURCES = _digest()
