"""The one argument of every kernel: the structure `Params` of `kernels/common.cuh`, as bytes."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence

from torch import Tensor

from ..problem import DIRECTIONS, Problem

NAMES = ("x", "taps", "lam", "gate", "y", "dy", "dx", "dtaps", "dlam", "dgate")
SCRATCH, KNOBS = 4, 17
_FORMAT = struct.Struct(f"<{7 * len(NAMES)}q{SCRATCH}q6i1i4i{KNOBS}i")
_ABSENT = (0,) * 7


def place(name: str) -> int:
    """Where the address of the tensor called `name` lies among the packed parameters, in units of 8 bytes."""
    return 7 * NAMES.index(name)


def scratch_place(number: int) -> int:
    """The same for the address of a scratch buffer."""
    return 7 * len(NAMES) + number


def view(tensor: Tensor | None) -> tuple[int, ...]:
    """Address and strides (b, d, c, k, h, w) in elements; zeros for a tensor that is absent."""
    if tensor is None:
        return _ABSENT
    address, strides = tensor.data_ptr(), tensor.stride()
    if len(strides) == 4:
        b, c, h, w = strides
        return (address, b, 0, c, 0, h, w)
    if len(strides) == 5:
        b, d, c, h, w = strides
        return (address, b, d, c, 0, h, w)
    return (address, *strides)


def pack(
    problem: Problem,
    tensors: Mapping[str, Tensor | None],
    scratch: Sequence[int],
    knobs: Sequence[int],
) -> bytes:
    """Everything a kernel is told.

    Args:
        problem: semantics and sizes.
        tensors: by the names of `NAMES`; what is missing or None is absent.
        scratch: addresses of the scratch buffers, at most `SCRATCH`.
        knobs: the plan's numbers, at most `KNOBS`.
    """
    values: list[int] = []
    for name in NAMES:
        values += view(tensors.get(name))
    values += [*scratch, *(0,) * (SCRATCH - len(scratch))]
    lines = max(problem.height, problem.width)
    chunk = lines if problem.chunk is None else min(problem.chunk, lines)
    values += [problem.batch, problem.channels, problem.groups, problem.height, problem.width, chunk]
    directions = [DIRECTIONS.index(name) for name in problem.directions]
    values += [len(directions), *directions, *(0,) * (4 - len(directions))]
    values += [*knobs, *(0,) * (KNOBS - len(knobs))]
    return _FORMAT.pack(*values)
