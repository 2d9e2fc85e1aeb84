"""Any problem: any strides, sizes, groups. Correct everywhere, at its best on nothing."""

from __future__ import annotations

from .. import states_sum
from ..geometry import Case, Kernel, Launch, Plan, options

SEGMENT = 16
"""Lines between kept states in backward."""


def why_not(case: Case) -> str | None:
    """It takes every problem."""
    return None


def plan(case: Case) -> Plan:
    """A block for the channels of one image that fit; states in shared memory if a line of them does."""
    return _backward(case) if case.backward else _forward(case)


def _forward(case: Case) -> Plan:
    problem = case.problem
    span = _span(case)
    longest = max(problem.height, problem.width)
    fast = _channels_fast(case)
    # Enough blocks for the GPU first, then enough work for a block's threads.
    wanted = max(1, span * _sections(case) * problem.batch // (2 * case.device.multiprocessors))
    channels = min(span, max(wanted, 16 if fast else 1, 256 // longest))
    while channels > 1 and 8 * channels * longest > case.device.shared_memory:
        channels //= 2
    states = 8 * channels * longest
    in_scratch = states > case.device.shared_memory
    threads = _threads(channels * longest)
    items = 1 if channels * longest <= threads else 2
    blocks = problem.batch * _sections(case) * -(-span // channels)
    sums = 4 * problem.batch * problem.channels * problem.height * problem.width
    kernel = Kernel(
        "generic_forward.cu",
        "generic_forward",
        (*options(case), ("THREADS", threads), ("ITEMS", items)),
    )
    knobs = (channels, int(fast), _width(channels if fast else longest, threads), int(in_scratch))
    launch = Launch(kernel, blocks, threads, 0 if in_scratch else states, knobs=knobs)
    scratch = (_needs_sums(case) * sums, in_scratch * blocks * states)
    return Plan("generic", (launch,), scratch, _reasons(case, channels, in_scratch))


def _backward(case: Case) -> Plan:
    problem = case.problem
    per_group = problem.channels // problem.groups
    longest = max(problem.height, problem.width)
    fast = _channels_fast(case)
    channels = per_group
    if per_group == 1:
        wanted = problem.channels * problem.batch // (2 * case.device.multiprocessors)
        channels = min(problem.channels, max(1, wanted, 16 if fast else 1))
        while channels > 1 and 32 * channels * longest > case.device.shared_memory:
            channels //= 2
    rows = 32 * channels * longest
    in_scratch = rows > case.device.shared_memory
    threads = min(256, _threads(channels * longest))
    blocks = problem.batch * _sections(case) * -(-_span(case) // channels)
    segments = -(-longest // SEGMENT)
    sums = 4 * problem.batch * problem.channels * problem.height * problem.width
    hidden = "y" in case.views
    line = 4 * channels * longest * (not hidden)
    kernel = Kernel(
        "generic_backward.cu",
        "generic_backward",
        (*options(case), ("THREADS", threads), ("SEGMENT", SEGMENT), ("HAS_HIDDEN", int(hidden))),
    )
    knobs = (channels, int(fast), _width(channels if fast else longest, threads), int(in_scratch))
    launch = Launch(kernel, blocks, threads, 0 if in_scratch else rows, knobs=knobs)
    scratch = (
        (_needs_sums(case) and "dx" in case.views) * sums,
        blocks * segments * line,
        blocks * (SEGMENT + 1) * line,
        in_scratch * blocks * rows,
    )
    return Plan("generic", (launch,), scratch, _reasons(case, channels, in_scratch))


def representative_kernels() -> list[tuple[Kernel, bool]]:
    """Kernels that the tests compile, and whether each is hot (must not spill)."""
    plain = (("STORAGE", 1), ("NORMALIZE", 1), ("HAS_LAM", 1), ("HAS_GATE", 1))
    backward = (*plain, ("THREADS", 256), ("SEGMENT", SEGMENT))
    return [
        (Kernel("generic_forward.cu", "generic_forward", (*plain, ("THREADS", 512), ("ITEMS", 2))), False),
        *(
            (Kernel("generic_backward.cu", "generic_backward", (*backward, ("HAS_HIDDEN", hidden))), False)
            for hidden in (0, 1)
        ),
        *states_sum.representative_kernels(),
    ]


def _span(case: Case) -> int:
    """Channels among which a block's may be chosen: all with taps of their own, else those of a group."""
    problem = case.problem
    per_group = problem.channels // problem.groups
    return problem.channels if per_group == 1 else per_group


def _sections(case: Case) -> int:
    return case.problem.channels // _span(case)


def _needs_sums(case: Case) -> bool:
    return len(case.problem.directions) > 1 and case.itemsize < 4


def _channels_fast(case: Case) -> bool:
    x = case.views["x"]
    return case.problem.channels > 1 and x.c < min(x.h, x.w)


def _threads(items: int) -> int:
    threads = 32
    while threads < items and threads < 512:
        threads *= 2
    return threads


def _width(fast: int, threads: int) -> int:
    """log2 of the thread grid's width: the fast axis, filled up to a power of two."""
    return min((fast - 1).bit_length(), threads.bit_length() - 1)


def _reasons(case: Case, channels: int, in_scratch: bool) -> tuple[str, ...]:
    line = "each line's states are in global memory: a line is too long for shared memory"
    return (
        f"reads through arbitrary strides; {channels} of {case.problem.channels} channels a block",
        *((line,) if in_scratch else ()),
    )
