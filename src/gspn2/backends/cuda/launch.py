"""From tensors to launches: the cache of ready calls, output and scratch memory.

Planning, packing and loading are done once for all that share sizes, strides, alignment, options and device.
A call after that looks itself up, allocates, fills in addresses and launches on PyTorch's current stream.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..keeping import empty_states, one_direction
from ..problem import Problem
from ..reference import Gradients
from . import driver, params, states_sum
from .geometry import Case, View
from .plan import OLDEST, choose, too_old

CAPACITY = 1024
"""Calls kept ready. A program that varies its sizes without end plans anew now and then, but never grows."""

ALIGNMENT = 128
"""Bytes: the most that a plan asks of an address (`geometry.View`)."""

SCRATCH_ALIGNMENT = 512

_FORWARD = ("x", "taps", "lam", "gate", "y")
_SUM = states_sum.NAMES
_BACKWARD = ("x", "taps", "lam", "gate", "y", "dy", "dx", "dtaps", "dlam", "dgate")

_ready: dict[tuple[object, ...], Call] = {}


def propagate(x: Tensor, taps: Tensor, lam: Tensor | None, gate: Tensor | None, problem: Problem) -> Tensor:
    """As `reference.propagate`."""
    y = torch.empty_like(x)
    if problem.batch:
        _run(_FORWARD, (x, taps, lam, gate, y), problem)
    return y


def propagate_keeping(
    x: Tensor, taps: Tensor, lam: Tensor | None, gate: Tensor | None, problem: Problem
) -> tuple[Tensor, Tensor]:
    """As `reference.propagate_keeping`: a scan for each direction, whose output is h, and one launch for y.

    A single scan writes h as fast as a kernel of all directions would write y, and adds to nothing.
    """
    y, h = torch.empty_like(x), empty_states(x, len(problem.directions))
    if problem.batch:
        for d in range(len(problem.directions)):
            lam_d = None if lam is None else lam[:, d : d + 1]
            _run(_FORWARD, (x, taps[:, d : d + 1], lam_d, None, h[:, d]), one_direction(problem, d))
        _run(_SUM, (h, gate, y), problem)
    return y, h


def propagate_backward(
    dy: Tensor,
    x: Tensor,
    taps: Tensor,
    lam: Tensor | None,
    gate: Tensor | None,
    problem: Problem,
    needs: tuple[bool, bool, bool, bool],
    hidden: Tensor | None = None,
) -> Gradients:
    """As `reference.propagate_backward`; kernels find `hidden` as y."""
    inputs = (x, taps, lam, gate)
    dx, dtaps, dlam, dgate = (
        torch.empty_like(tensor) if tensor is not None and needed else None
        for tensor, needed in zip(inputs, needs, strict=True)
    )
    if problem.batch and not (dx is dtaps is dlam is dgate is None):
        if 0 in dy.stride():
            # Expanded, as sum and mean hand it back: no fast kernel reads that, and a copy takes less time.
            dy = torch.empty_like(x).copy_(dy)
        _run(_BACKWARD, (*inputs, hidden, dy, dx, dtaps, dlam, dgate), problem)
    return dx, dtaps, dlam, dgate


def _run(names: tuple[str, ...], tensors: tuple[Tensor | None, ...], problem: Problem) -> None:
    """Look the call up, or make it ready, and launch; the first of the tensors is there in any case."""
    x = tensors[0]
    assert x is not None
    index = x.get_device()
    addresses: list[int] = []
    # The operator hands out one object for equal problems, and a call that is ready keeps it alive.
    key: list[object] = [id(problem), names, index]
    bits = 0
    for tensor in tensors:
        if tensor is None:
            key.append(None)
        else:
            address = tensor.data_ptr()
            addresses.append(address)
            bits |= address
            key.append(tensor.stride())
    if bits & (ALIGNMENT - 1):
        # Not as PyTorch's allocator aligns whole tensors: what each one has tells such calls apart.
        key += [address & -address & (ALIGNMENT - 1) for address in addresses]
    if driver.current_device() == index:
        call = _ready.get(tuple(key)) or _make_ready(tuple(key), problem, names, tensors, index)
        call.run(addresses, x)
    else:
        with torch.cuda.device(index):
            call = _ready.get(tuple(key)) or _make_ready(tuple(key), problem, names, tensors, index)
            call.run(addresses, x)


def _make_ready(
    key: tuple[object, ...],
    problem: Problem,
    names: tuple[str, ...],
    tensors: tuple[Tensor | None, ...],
    index: int,
) -> Call:
    present = {name: tensor for name, tensor in zip(names, tensors, strict=True) if tensor is not None}
    call = Call(problem, present, index)
    while len(_ready) >= CAPACITY:
        _ready.pop(next(iter(_ready)), None)
    _ready[key] = call
    return call


class Call:
    """A plan made ready on a device: kernels loaded, arguments packed, addresses still to come.

    Args:
        problem: semantics and sizes.
        tensors: by name, those that are there; only their layout matters.
        index: of the device, which is the current one.
    """

    def __init__(self, problem: Problem, tensors: Mapping[str, Tensor], index: int) -> None:
        device = driver.device(index)
        if device.capability < OLDEST:
            raise RuntimeError(f"gspn2: {too_old(device.capability)}; pass backend='reference'")
        views = {name: View.of(tensor) for name, tensor in tensors.items()}
        case = Case(problem, device, views, backward="dy" in views)
        self.plan = choose(case) if "taps" in views else states_sum.plan(case)
        self.problem = problem
        self.index = index
        places = [params.place(name) for name in tensors]
        # Where each scratch buffer starts within one allocation.
        self.starts: list[int] = []
        self.scratch_bytes = 0
        for number, size in enumerate(self.plan.scratch):
            if size:
                places.append(params.scratch_place(number))
                self.starts.append(self.scratch_bytes)
                self.scratch_bytes += -(-size // SCRATCH_ALIGNMENT) * SCRATCH_ALIGNMENT
        self.launches = [
            driver.Loaded(launch, params.pack(problem, tensors, (), launch.knobs), places, index)
            for launch in self.plan.launches
        ]

    def run(self, addresses: list[int], x: Tensor) -> None:
        """Launch on the current stream of the device of x, which is the current device.

        Args:
            addresses: of the tensors that are there, in order; those of scratch are added here.
            x: any of the tensors.
        """
        if self.scratch_bytes:
            # Freed on return, while a kernel may still use it: only later work of the same stream can get it.
            scratch = torch.empty(self.scratch_bytes, dtype=torch.uint8, device=x.device)
            start = scratch.data_ptr()
            addresses += [start + offset for offset in self.starts]
        stream = driver.stream(self.index)
        for launch in self.launches:
            launch.run(addresses, stream)
