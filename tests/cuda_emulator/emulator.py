"""Builds and runs the CUDA kernels on the CPU: README.md says how to use it and what it finds."""

from __future__ import annotations

import ctypes
import fcntl
import functools
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from gspn2.backends import cuda
from gspn2.backends.cuda import params
from gspn2.backends.cuda.geometry import Case, Device, Kernel, Launch, Plan, View
from gspn2.backends.cuda.plan import choose
from gspn2.backends.problem import Problem

from .memory import Memory

HERE = Path(__file__).parent
KERNELS = Path(cuda.__file__).parent / "kernels"
OPTIONS = (
    *("-std=c++17", "-O1", "-g", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-Wall", "-Wextra"),
    *("-Wno-unknown-pragmas", "-Wno-unused-function", "-Wno-unused-parameter", "-Wno-unused-variable"),
    *("-fno-exceptions", "-fno-strict-aliasing", "-U_FORTIFY_SOURCE", "-fcf-protection=none"),
)
SANITIZE = (
    "-fsanitize=thread,alignment,bounds,shift,signed-integer-overflow,integer-divide-by-zero",
    "--param=tsan-instrument-func-entry-exit=0",
    "-ftrivial-auto-var-init=pattern",
)
RUNTIME = ("schedule", "barriers", "copies", "races", "launch")
_lock = threading.Lock()


class KernelError(AssertionError):
    """A kernel did what it must not do."""


def compiler() -> str | None:
    """The C++ compiler, if there is one."""
    return shutil.which("g++")


def _sources(path: Path) -> Iterator[Path]:
    """A source file and what it includes, beside it or in the folder of kernels."""
    yield path
    for name in re.findall(r'^\s*#\s*include\s+"([^"]+)"', path.read_text(), re.MULTILINE):
        for folder in (path.parent, KERNELS):
            if (folder / name).exists():
                yield from _sources(folder / name)
                break


@functools.cache
def _folder() -> Path:
    folder = Path(tempfile.gettempdir()) / f"gspn2-emulator-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder


def _cached(kind: str, sources: Sequence[Path], command: Sequence[str]) -> Path:
    """The file that `command OUTPUT` makes from the sources, made once for each content of all of them."""
    files = sorted({file for source in sources for file in _sources(source)})
    content = repr(command).encode() + b"".join(file.read_bytes() for file in files)
    path = _folder() / f"{hashlib.sha256(content).hexdigest()[:24]}.{kind}"
    with (path.parent / f"{path.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            partial = path.with_suffix(f".{os.getpid()}.{kind}")
            result = subprocess.run([*command, "-o", str(partial)], capture_output=True, text=True)
            if result.returncode:
                raise KernelError(f"g++ fails:\n{result.stderr[-6000:]}")
            partial.replace(path)
    return path


def build(kernel: Kernel, device: Device | None = None) -> Path:
    """The shared library of a kernel for the capability of `device`."""
    gxx = compiler()
    if gxx is None:
        raise RuntimeError("the emulator needs g++")
    major, minor = (device or Device()).capability
    defines = (*kernel.defines, ("__CUDA_ARCH__", 100 * major + 10 * minor), ("GSPN2_EMULATE", 1))
    source = KERNELS / kernel.source
    compile_ = [gxx, *OPTIONS, "-c"]
    parts = [HERE / f"{name}.cpp" for name in RUNTIME]
    runtime = [_cached("o", [part], [*compile_, str(part)]) for part in parts]
    macros = [f"-D{name}={value}" for name, value in defines]
    host = HERE / "emulate.h"
    kernel_object = _cached(
        "o",
        [source, host],
        [*compile_, *SANITIZE, *macros, f"-I{KERNELS}", "-include", str(host), "-x", "c++", str(source)],
    )
    link = [gxx, "-shared", str(kernel_object), *map(str, runtime)]
    return _cached("so", [], [*link])


@functools.cache
def _load(path: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(path))
    library.gspn2_emulate.restype = ctypes.c_bool
    return library


def _with_lines(message: str, path: Path, base: int) -> str:
    """The message with @{address} replaced by file and line of the innermost frame of the kernel."""
    tool = shutil.which("addr2line")

    def line(match: re.Match[str]) -> str:
        offset = int(match[1], 16) - 1 - base
        if tool is None or offset < 0:
            return ""
        result = subprocess.run(
            [tool, "-i", "-s", "-e", str(path), hex(offset)], capture_output=True, text=True
        )
        frames = [re.sub(r" \(.*", "", frame) for frame in result.stdout.split()]
        ours = [f for f in frames if re.match(r".*\.cuh?:", f)] or frames
        return f"({' < '.join(ours)})"

    return re.sub(r"@\{(0x[0-9a-f]+)\}", line, message)


def _base(path: Path) -> int:
    for row in Path("/proc/self/maps").read_text().splitlines():
        if row.endswith(str(path)):
            return int(row.split("-")[0], 16)
    return 0


def run_launch(
    launch: Launch,
    arguments: bytes,
    memory: Memory,
    seed: int = 0,
    device: Device | None = None,
) -> None:
    """One kernel launch.

    Raises:
        KernelError: what the kernel did wrong, in which thread and line.
    """
    device = device or Device()
    name = f"{Path(launch.kernel.source).name}: {launch.kernel.function}"
    if launch.shared > device.shared_memory:
        raise KernelError(
            f"{name}: {launch.shared} bytes of shared memory; a block has {device.shared_memory}"
        )
    path = build(launch.kernel, device)
    library = _load(path)
    message = ctypes.create_string_buffer(1 << 14)
    ranges = memory.ranges()
    aligned = ctypes.create_string_buffer(arguments, len(arguments))
    with _lock:
        fine = library.gspn2_emulate(
            ctypes.cast(getattr(library, launch.kernel.function), ctypes.c_void_p),
            aligned,
            ctypes.c_uint32(launch.grid),
            ctypes.c_int(launch.block),
            ctypes.c_uint64(launch.shared),
            ctypes.c_int(launch.cluster),
            ctypes.c_uint64(seed),
            ranges,
            ctypes.c_int(len(ranges)),
            message,
            ctypes.c_size_t(len(message)),
        )
    if not fine:
        text = message.value.decode(errors="replace")
        raise KernelError(f"{name}: {_with_lines(text, path, _base(path))}")


def run_plan(
    plan: Plan,
    problem: Problem,
    tensors: Mapping[str, Tensor | None],
    seed: int = 0,
    device: Device | None = None,
) -> None:
    """Runs the launches of a plan on CPU tensors, by the names of `params.NAMES`.

    The kernels see copies of the tensors that end at a page nobody may touch; what they wrote into outputs is
    copied back. Scratch memory starts as NaN.

    Raises:
        KernelError: what a kernel did wrong, also writes to an input or outside of an output's elements.
    """
    present = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    outputs = {"dx", "dtaps", "dlam", "dgate"} if "dy" in present else {"y"}
    memory = Memory(present, outputs)
    scratch = [memory.scratch(size, f"scratch {i}") for i, size in enumerate(plan.scratch)]
    for i, launch in enumerate(plan.launches):
        packed = params.pack(problem, memory.tensors, scratch, launch.knobs)
        run_launch(launch, packed, memory, seed + i, device)
    wrong = memory.wrongly_written()
    if wrong:
        raise KernelError(f"{plan.variant}: {wrong}")
    memory.copy_back()


@dataclass(frozen=True)
class Inputs:
    """What `emulate` is given: shapes as in `backends.reference`; dy None asks for y."""

    x: Tensor
    taps: Tensor
    lam: Tensor | None
    gate: Tensor | None
    dy: Tensor | None
    needs: tuple[bool, bool, bool, bool]
    hidden: Tensor | None = None


def case_of(inputs: Inputs, problem: Problem, device: Device) -> tuple[Case, dict[str, Tensor]]:
    """The planner's case, and every tensor by name: outputs are there, filled with NaN."""
    tensors = {"x": inputs.x, "taps": inputs.taps}
    tensors |= {n: t for n, t in (("lam", inputs.lam), ("gate", inputs.gate)) if t is not None}
    if inputs.dy is None:
        outputs = {"y": inputs.x}
    else:
        asked = dict(zip(("x", "taps", "lam", "gate"), inputs.needs, strict=True))
        outputs = {f"d{name}": tensor for name, tensor in tensors.items() if asked[name]}
        tensors["dy"] = inputs.dy
        if inputs.hidden is not None:
            tensors["y"] = inputs.hidden
    tensors |= {name: torch.empty_like(like).fill_(torch.nan) for name, like in outputs.items()}
    # Alignment is that of memory on the device, where `Memory` puts them.
    views = {name: View.of(tensor) for name, tensor in Memory(tensors, outputs=set()).tensors.items()}
    return Case(problem, device, views, backward=inputs.dy is not None), tensors


def emulate(
    x: Tensor,
    taps: Tensor,
    lam: Tensor | None,
    gate: Tensor | None,
    problem: Problem,
    variant: ModuleType | None = None,
    dy: Tensor | None = None,
    needs: tuple[bool, bool, bool, bool] = (True, True, True, True),
    seed: int = 0,
    device: Device | None = None,
    hidden: Tensor | None = None,
) -> dict[str, Tensor]:
    """y, or with dy the gradients asked for: by name "y" or "dx", "dtaps", "dlam", "dgate".

    Args:
        variant: a module of `backends.cuda.variants`; None for the planner's choice.
        seed: of the order in which threads run.
        hidden: with dy, what forward returned for a single direction without gate; kernels find it as y.

    Raises:
        Declined: `variant` does not take the case; the message is its reason.
        KernelError: see `run_plan`.
    """
    device = device or Device()
    problem = replace(problem, device="cuda")
    case, tensors = case_of(Inputs(x, taps, lam, gate, dy, needs, hidden), problem, device)
    run_plan(plan_of(case, variant), problem, tensors, seed, device)
    outputs = ("y",) if dy is None else ("dx", "dtaps", "dlam", "dgate")
    return {name: tensors[name] for name in outputs if name in tensors}


class Declined(Exception):
    """A variant does not take a case."""


def plan_of(case: Case, variant: ModuleType | None) -> Plan:
    if variant is None:
        return choose(case)
    reason = variant.why_not(case)
    if reason is not None:
        raise Declined(reason)
    return variant.plan(case)
