"""Kernels compiled for the host, each once for each preprocessed text."""

from __future__ import annotations

import ctypes
import fcntl
import functools
import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from gspn2.backends import cuda
from gspn2.backends.cuda.geometry import Kernel
from kept import kept_folder

HERE = Path(__file__).parent
KERNELS = Path(cuda.__file__).parent / "kernels"

_OPTIONS = (
    *("-std=c++17", "-O0", "-g1", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-Wall", "-Wextra"),
    *("-Wno-unknown-pragmas", "-Wno-unused-function", "-Wno-unused-parameter", "-Wno-unused-variable"),
    *("-fno-exceptions", "-fno-strict-aliasing", "-U_FORTIFY_SOURCE"),
    *(("-fcf-protection=none",) if platform.machine() == "x86_64" else ()),
)
_CHECKS = (
    # Not signed-integer-overflow, which takes as long to compile as all others: sizes are small here, and a
    # place that is wrong for it is found where it is used.
    *("-fsanitize=thread,alignment,bounds,shift,integer-divide-by-zero", "-fwrapv"),
    "--param=tsan-instrument-func-entry-exit=0",
    "-ftrivial-auto-var-init=pattern",
)
# Traps instead of calls that say what was wrong: half the time to compile.
_TRAP = "-fsanitize-undefined-trap-on-error"
_RUNTIME = ("schedule", "barriers", "copies", "races", "launch")


class KernelError(AssertionError):
    """A kernel did what it must not do."""


@functools.cache
def compiler() -> str | None:
    """The C++ compiler, if there is one that can do what is asked of it: g++ 12 or newer, on Linux."""
    gxx = shutil.which("g++") if sys.platform == "linux" else None
    if gxx is None:
        return None
    version = subprocess.run([gxx, "-dumpversion"], capture_output=True, text=True).stdout
    return gxx if version and int(version.split(".")[0]) >= 12 else None


def _gxx(arguments: Sequence[str], given: str | None = None) -> str:
    gxx = compiler()
    if gxx is None:
        raise RuntimeError("the emulator needs g++ 12 or newer, on Linux")
    result = subprocess.run([gxx, *arguments], input=given, capture_output=True, text=True, cwd=HERE)
    if result.returncode:
        raise KernelError(f"g++ fails:\n{result.stderr[-6000:]}")
    return result.stdout


def _cached(kind: str, arguments: Sequence[str], text: str | None = None) -> Path:
    """What g++ makes with these arguments of `text`, made once, also where several processes ask for it."""
    key = hashlib.sha256(repr((arguments, text)).encode()).hexdigest()[:24]
    path = kept_folder() / f"{key}.{kind}"
    if path.exists():
        return path
    with (path.parent / f"{key}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            partial = path.with_suffix(f".{os.getpid()}.{kind}")
            _gxx([*arguments, "-o", str(partial)], text)
            partial.replace(path)
    return path


def _stamp() -> tuple[int, ...]:
    """Changes with every file: somebody may be at work on a kernel while this process runs."""
    return tuple(file.stat().st_mtime_ns for file in sorted((*KERNELS.iterdir(), *HERE.glob("*.*"))))


def _relative(path: Path) -> str:
    """As g++ is told of it: the text with its lines' files, and so the key, is the same in every checkout."""
    return os.path.relpath(path, HERE)


def _object(source: Path, options: Sequence[str], checks: Sequence[str]) -> str:
    text = _gxx([*_OPTIONS, *options, "-E", "-x", "c++", _relative(source)])
    return str(_cached("o", [*_OPTIONS, *checks, "-c", "-x", "c++-cpp-output", "-"], text))


@functools.cache
def _runtime(stamp: tuple[int, ...]) -> tuple[str, ...]:
    return tuple(_object(HERE / f"{name}.cpp", (), ("-O2",)) for name in _RUNTIME)


@functools.cache
def _linker() -> tuple[str, ...]:
    """A third of the time, for some hundred libraries, where it is installed."""
    return ("-fuse-ld=gold",) if shutil.which("ld.gold") else ()


@functools.cache
def _library(kernel: Kernel, capability: tuple[int, int], explain: bool, stamp: tuple[int, ...]) -> Path:
    major, minor = capability
    defines = (*kernel.defines, ("__CUDA_ARCH__", 100 * major + 10 * minor), ("GSPN2_EMULATE", 1))
    macros = (f"-D{name}={value}" for name, value in defines)
    options = (*macros, f"-I{_relative(KERNELS)}", "-include", "./emulate.h")
    checks = _CHECKS if explain else (*_CHECKS, _TRAP)
    objects = [_object(KERNELS / kernel.source, options, checks), *_runtime(stamp)]
    return _cached("so", ["-shared", *_linker(), *objects])


def build(kernel: Kernel, capability: tuple[int, int], explain: bool = False) -> Path:
    """The shared library of a kernel.

    Args:
        kernel: what to compile; a source that is an absolute path is found there.
        capability: of the device, for `__CUDA_ARCH__`.
        explain: undefined behaviour is told apart, which takes longer to compile.
    """
    return _library(kernel, capability, explain, _stamp())


@functools.cache
def load(path: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(path))
    library.gspn2_emulate.restype = ctypes.c_bool
    return library


def with_lines(message: str, path: Path) -> str:
    """The message with @{address} replaced by the lines of the kernel, innermost first."""
    tool = shutil.which("addr2line")
    rows = Path("/proc/self/maps").read_text().splitlines()
    base = next((int(row.split("-")[0], 16) for row in rows if row.endswith(str(path))), 0)

    def line(match: re.Match[str]) -> str:
        offset = int(match[1], 16) - 1 - base
        if tool is None or offset < 0:
            return ""
        command = [tool, "-i", "-s", "-e", str(path), hex(offset)]
        frames = subprocess.run(command, capture_output=True, text=True).stdout.splitlines()
        frames = [re.sub(r" \(.*", "", frame) for frame in frames]
        ours = [frame for frame in frames if re.match(r".*\.cuh?:", frame)] or frames
        return f"({' < '.join(ours)})"

    return re.sub(r"@\{(0x[0-9a-f]+)\}", line, message)
