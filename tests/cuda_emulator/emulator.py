"""Builds and runs the CUDA kernels on the CPU: README.md says how to use it and what it finds."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from gspn2.backends.cuda import params
from gspn2.backends.cuda.geometry import Case, Device, Launch, Plan, View
from gspn2.backends.cuda.plan import choose
from gspn2.backends.problem import Problem

from .build import KernelError, build, load, with_lines
from .memory import Memory

_lock = threading.Lock()


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
    message = _emulated(launch, arguments, memory, seed, device)
    if message is not None and "undefined behaviour" in message:
        message = _emulated(launch, arguments, memory, seed, device, explain=True) or message
    if message is not None:
        raise KernelError(f"{name}: {message}")


def _emulated(
    launch: Launch, arguments: bytes, memory: Memory, seed: int, device: Device, explain: bool = False
) -> str | None:
    """Runs the launch; returns what went wrong."""
    path = build(launch.kernel, device.capability, explain)
    library = load(path)
    message = ctypes.create_string_buffer(1 << 14)
    ranges = memory.ranges()
    with _lock:
        fine = library.gspn2_emulate(
            ctypes.cast(getattr(library, launch.kernel.function), ctypes.c_void_p),
            ctypes.create_string_buffer(arguments, len(arguments)),
            ctypes.c_uint32(launch.grid),
            ctypes.c_int(launch.block),
            ctypes.c_uint64(launch.shared),
            ctypes.c_int(launch.cluster),
            ctypes.c_int(10 * device.capability[0] + device.capability[1]),
            ctypes.c_uint64(seed),
            ranges,
            ctypes.c_int(len(ranges)),
            message,
            ctypes.c_size_t(len(message)),
        )
    return None if fine else with_lines(message.value.decode(errors="replace"), path)


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
