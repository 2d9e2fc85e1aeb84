"""What a device asks of a plan: limits that hold for every launch, whatever its kernel does."""

from __future__ import annotations

from collections.abc import Iterator

from gspn2.backends.cuda import params
from gspn2.backends.cuda.driver import LARGEST_GRID, PORTABLE_CLUSTER
from gspn2.backends.cuda.geometry import Case, Device, Launch, Plan

from .build import KERNELS

REGISTERS = 65536
"""Of a multiprocessor."""

LEAST_REGISTERS = 16
"""Of a thread: no kernel here does with fewer."""


def threads_of(device: Device) -> int:
    """Threads that a multiprocessor holds at most."""
    return 2048 if device.capability[0] in (9, 10) or device.capability == (8, 0) else 1536


def blocks_of_a_cluster(device: Device) -> int:
    """At most; more than `PORTABLE_CLUSTER`, which the driver has to be asked for, on large GPUs only."""
    if device.capability < (9, 0):
        return 1
    return 16 if device.capability[0] in (9, 10) else PORTABLE_CLUSTER


def broken(plan: Plan, case: Case) -> Iterator[str]:
    """A sentence for each rule that a plan breaks on the device of its case."""
    if len(plan.scratch) > params.SCRATCH:
        yield f"{len(plan.scratch)} scratch buffers; kernels are told of {params.SCRATCH}"
    for number, size in enumerate(plan.scratch):
        if size < 0 or size % 4:
            yield f"scratch buffer {number} of {size} bytes"
    if not plan.launches:
        yield "no launch"
    for launch in plan.launches:
        for sentence in _broken(launch, case):
            yield f"{launch.kernel.function}: {sentence}"


def _broken(launch: Launch, case: Case) -> Iterator[str]:
    device, defines = case.device, dict(launch.kernel.defines)
    if not 1 <= launch.grid <= LARGEST_GRID:
        yield f"{launch.grid} blocks"
    if launch.cluster < 1 or launch.grid % launch.cluster:
        yield f"{launch.grid} blocks in clusters of {launch.cluster}"
    if launch.cluster > blocks_of_a_cluster(device):
        yield f"clusters of {launch.cluster}"
    if not 32 <= launch.block <= 1024 or launch.block % 32:
        yield f"blocks of {launch.block} threads"
    bound = defines.get("THREADS", launch.block)
    if not launch.block <= bound <= 1024:
        yield f"blocks of {launch.block} threads, compiled for {bound}"
    resident = defines.get("MIN_BLOCKS", defines.get("BLOCKS", 1)) * bound
    if resident > threads_of(device) or REGISTERS // resident < LEAST_REGISTERS:
        yield f"compiled for {resident} threads on a multiprocessor"
    if not 0 <= launch.shared <= device.shared_memory:
        yield f"{launch.shared} bytes of shared memory; a block has {device.shared_memory}"
    if len(launch.knobs) > params.KNOBS or not all(-(2**31) <= knob < 2**31 for knob in launch.knobs):
        yield f"knobs {launch.knobs}"
    elif all(isinstance(knob, int) for knob in launch.knobs):
        params.pack(case.problem, {}, (), launch.knobs)
    else:
        yield f"knobs {launch.knobs} that are no numbers"
    source = KERNELS / launch.kernel.source
    if not source.is_file() or f"{launch.kernel.function}(CONSTANT_PARAMS" not in source.read_text():
        yield f"no such kernel in {launch.kernel.source}"
