"""From a kernel's source to machine code, by NVRTC through cuda.core: no compiler on the user's machine.

The sources lie in `kernels`; of CUDA's own headers they need those of the 16-bit types, which PyTorch's
wheels bring along. Nothing here needs a GPU, or imports cuda.core before the first compilation.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import Any

from . import disk
from .geometry import Kernel

SOURCES = Path(__file__).parent / "kernels"
HEADER = "cuda_bf16.h"
INCLUDE = re.compile(r'^\s*#\s*include\s+"([^"]+)"', re.MULTILINE)
OPTIONS: dict[str, Any] = {
    "std": "c++17",
    # As nvcc has it: a lambda in a device function is one, too.
    "device_as_default_execution_space": True,
    # Unreferenced variables: one set of macros uses what another does not.
    "diag_suppress": 177,
}
"""What every kernel is compiled with, by the names of `cuda.core.ProgramOptions`."""

INSTALL = 'pip install "gspn2[cuda]"'


@dataclass(frozen=True)
class Target:
    """What code is made for: a name as NVRTC takes it (`sm_90`, `compute_120`); its kind, cubin or ptx."""

    name: str
    kind: str = "cubin"


@dataclass(frozen=True)
class Resources:
    """What the assembler reports of a function.

    Args:
        registers: of one thread.
        stack: bytes of stack frame of one thread.
        spill_stores, spill_loads: bytes.
        shared: bytes of static shared memory.
    """

    registers: int
    stack: int
    spill_stores: int
    spill_loads: int
    shared: int


@dataclass(frozen=True)
class Compiled:
    """Machine code, or PTX that ends in a zero byte; what it needs; and the compiler's messages."""

    code: bytes
    resources: Resources | None
    log: str


@cache
def why_not() -> str | None:
    """What is missing for compiling kernels, with the remedy; None if nothing is."""
    if find_spec("cuda") is None or find_spec("cuda.core") is None:
        return f"it needs cuda-core, which is not installed ({INSTALL})"
    try:
        _nvrtc_version()
    except Exception as error:
        return f"it needs NVRTC and cuda-bindings, and they do not load: {_first_line(error)} ({INSTALL})"
    if _cuda_include() is None:
        return (
            f"it needs {HEADER}, which PyTorch's CUDA wheels bring along, and finds none "
            "(pip install nvidia-cuda-runtime, or set CUDA_HOME to a CUDA toolkit)"
        )
    return None


def target(capability: tuple[int, int]) -> Target:
    """What to compile for on a device of this capability.

    Machine code of the capability itself, or of the nearest older one of its generation if NVRTC is older
    than the device; for a newer generation PTX, which the driver translates.
    """
    known = [arch for arch in _architectures() if arch <= capability]
    if not known:
        raise RuntimeError(f"NVRTC has no architecture as old as {capability[0]}.{capability[1]}")
    nearest = max(known)
    name = f"{nearest[0]}{nearest[1]}"
    return Target(f"sm_{name}") if nearest[0] == capability[0] else Target(f"compute_{name}", "ptx")


def code(kernel: Kernel, made_for: Target) -> bytes:
    """The kernel's code, from the disk cache or else compiled and put there."""
    digest = key(kernel, made_for)
    found = disk.load(digest)
    if found is None:
        found = compile_kernel(kernel, made_for).code
        disk.store(digest, found)
    return found


def key(kernel: Kernel, made_for: Target) -> str:
    """A digest of all that the code depends on."""
    settings = (kernel.function, kernel.defines, made_for.name, made_for.kind, OPTIONS, _nvrtc_version())
    digest = hashlib.sha256(repr(settings).encode())
    digest.update(_digest(SOURCES / kernel.source))
    return digest.hexdigest()


def compile_kernel(kernel: Kernel, made_for: Target) -> Compiled:
    """Compile now, whatever the disk holds.

    Raises:
        RuntimeError: the toolchain is incomplete, or the source does not compile; the message holds the
            log of NVRTC.
    """
    reason = why_not()
    if reason is not None:
        raise RuntimeError(f"gspn2 cannot compile {kernel.source}: {reason}")
    from cuda.core import Program, ProgramOptions

    options = ProgramOptions(
        name=kernel.source,
        arch=made_for.name,
        define_macro=[(name, str(value)) for name, value in kernel.defines],
        include_path=[str(SOURCES), str(_cuda_include())],
        ptxas_options=["-v"] if made_for.kind == "cubin" else None,
        **OPTIONS,
    )
    log = StringIO()
    try:
        made = Program(_source(kernel), "c++", options).compile(made_for.kind, logs=log)
    except Exception as error:
        macros = " ".join(f"-D{name}={value}" for name, value in kernel.defines)
        raise RuntimeError(
            f"gspn2: NVRTC {_nvrtc_version()} cannot compile {kernel.source} for {made_for.name} "
            f"with {macros}: {error}\n{log.getvalue()}".rstrip()
        ) from error
    messages = log.getvalue().replace("\0", "")
    content = bytes(made.code)
    if made_for.kind == "ptx" and not content.endswith(b"\0"):
        content += b"\0"
    return Compiled(content, resources(messages), messages)


def resources(log: str) -> Resources | None:
    """The assembler's report of the one function in its log, or None if it holds none."""
    used = re.search(r"Used (\d+) registers", log)
    spills = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", log)
    if used is None or spills is None:
        return None
    shared = re.search(r"(\d+) bytes smem", log)
    return Resources(
        registers=int(used[1]),
        stack=int(spills[1]),
        spill_stores=int(spills[2]),
        spill_loads=int(spills[3]),
        shared=int(shared[1]) if shared else 0,
    )


def _source(kernel: Kernel) -> str:
    return (SOURCES / kernel.source).read_text(encoding="utf-8")


@cache
def _digest(source: Path) -> bytes:
    """Of a source and the headers of ours that it includes: a change of others compiles nothing anew."""
    digest = hashlib.sha256()
    for path in _with_headers(source):
        digest.update(f"{path.name}\n".encode() + path.read_bytes())
    return digest.digest()


def _with_headers(source: Path) -> list[Path]:
    """The source and all that it includes by name in quotes, however deep, each once."""
    files = [source]
    for file in files:
        for name in INCLUDE.findall(file.read_text(encoding="utf-8")):
            found = next((it for it in (file.parent / name, SOURCES / name) if it.exists()), None)
            if found is not None and found not in files:
                files.append(found)
    return files


@cache
def _nvrtc_version() -> str:
    from cuda.bindings import nvrtc

    status, major, minor = nvrtc.nvrtcVersion()
    if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        raise RuntimeError(f"nvrtcVersion: {status.name}")
    return f"{major}.{minor}"


@cache
def _architectures() -> tuple[tuple[int, int], ...]:
    """Compute capabilities that NVRTC makes code for."""
    from cuda.bindings import nvrtc

    status, found = nvrtc.nvrtcGetSupportedArchs()
    if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        raise RuntimeError(f"nvrtcGetSupportedArchs: {status.name}")
    return tuple(divmod(number, 10) for number in found)


@cache
def _cuda_include() -> Path | None:
    """The folder of CUDA's headers: the one next to PyTorch's wheel, or of an installed toolkit."""
    return next((path for path in _include_candidates() if (path / HEADER).is_file()), None)


def _include_candidates() -> Iterator[Path]:
    try:
        from cuda.pathfinder import find_nvidia_header_directory

        found = find_nvidia_header_directory("cudart")
    except Exception:
        found = None  # It raises on platforms and layouts it does not know; the places below remain.
    if found:
        yield Path(found)
    package = find_spec("nvidia")
    for place in (package.submodule_search_locations or []) if package else []:
        yield from sorted(Path(place).glob("cu[0-9]*/include"), reverse=True)
        yield Path(place) / "cuda_runtime" / "include"
    for name in ("CUDA_HOME", "CUDA_PATH"):
        if os.environ.get(name):
            yield Path(os.environ[name]) / "include"


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
