"""The propagation of a mixer between its two projections, with as little work for the host as can be.

`gspn2.propagate` makes views, looks at what it is given, chooses a backend and looks its plan up: on a GPU
that is a third of the time the host takes for a mixer, and a small UNet waits for its host. The tensors here
are made a line before and lie as they always do, so all of that is the same from call to call.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from gspn2 import ops
from gspn2.backends import DIRECTIONS, Problem, cuda
from gspn2.backends.cuda import driver, params
from gspn2.backends.cuda.geometry import Case, Plan, View
from gspn2.backends.cuda.launch import ALIGNMENT, Call
from gspn2.backends.cuda.plan import choose
from gspn2.backends.cuda.variants import pixels_forward
from gspn2.backends.cuda.variants.pixels_layout import Tiling, blocks_of, roles_of, rounded, vector_of


class Geometry(NamedTuple):
    """What the propagation of a mixer is, apart from the size of the image.

    Args:
        channels: that are propagated, C.
        groups: of taps, G.
        directions, chunk: as for `gspn2.propagate`.
        proxy: elements of a pixel in the tensor whose first C are propagated.
        record: elements of a pixel in the packed tensor: lam (D C), gate (D C), logits (D G 3), padding.
    """

    channels: int
    groups: int
    directions: tuple[str, ...]
    chunk: int | None
    proxy: int
    record: int


class Size(NamedTuple):
    """Images (B, ..., H, W)."""

    batch: int
    height: int
    width: int


def propagate(proxy: Tensor, packed: Tensor, geometry: Geometry, size: Size, backend: str | None) -> Tensor:
    """The sum of the gated scans, (B, H * W, C).

    Args:
        proxy: (B, H * W, geometry.proxy), contiguous.
        packed: (B, H * W, geometry.record), contiguous.
        geometry: see there.
        size: see there.
        backend: as for `gspn2.propagate`.
    """
    if proxy.is_cuda and backend in (None, "cuda"):
        y = launched(proxy, packed, geometry, size)
        if y is not None:
            return y
    x, logits, lam, gate = views(proxy, packed, geometry, size)
    y = ops.propagate(x, logits, lam, gate, geometry.directions, geometry.chunk, True, backend)
    return y.permute(0, 2, 3, 1).reshape(size.batch, size.height * size.width, geometry.channels)


def launched(proxy: Tensor, packed: Tensor, geometry: Geometry, size: Size) -> Tensor | None:
    """As `propagate`, by the kernels themselves; None where they do not take it as it lies."""
    index = proxy.get_device()
    ready = _ready(geometry, size, proxy.dtype, index)
    y = proxy.new_empty(size.batch, size.height * size.width, geometry.channels)
    x, start, end = proxy.data_ptr(), packed.data_ptr(), y.data_ptr()
    if ready is None or (x | start | end) & (ALIGNMENT - 1):
        return None
    call, logits, lam, gate = ready
    addresses = [x, start + logits, start + lam, start + gate, end]
    if driver.current_device() == index:
        call.run(addresses, proxy)
    else:
        with torch.cuda.device(index):
            call.run(addresses, proxy)
    return y


def _offsets(geometry: Geometry) -> tuple[int, int, int]:
    """Elements of a pixel before its logits, lam and gate: the order in which kernels take them."""
    per_channel = len(geometry.directions) * geometry.channels
    return 2 * per_channel, 0, per_channel


def views(
    proxy: Tensor, packed: Tensor, geometry: Geometry, size: Size
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x (B, C, H, W), logits (B, D, G, 3, H, W), lam and gate (B, D, C, H, W), without a copy."""
    (batch, height, width), (channels, groups, directions, _, step, record) = size, geometry
    pixels, scans = height * width, len(directions)
    x = proxy.as_strided((batch, channels, height, width), (pixels * step, 1, width * step, step))
    logits, lam, gate = (packed.storage_offset() + it for it in _offsets(geometry))
    image, row = pixels * record, width * record
    per_channel = (batch, scans, channels, height, width), (image, channels, 1, row, record)
    taps = (batch, scans, groups, 3, height, width), (image, 3 * groups, 3, 1, row, record)
    return (
        x,
        packed.as_strided(*taps, logits),
        packed.as_strided(*per_channel, lam),
        packed.as_strided(*per_channel, gate),
    )


@lru_cache(maxsize=256)
def _ready(
    geometry: Geometry, size: Size, dtype: torch.dtype, index: int
) -> tuple[_Launches, int, int, int] | None:
    """The launch for tensors that are aligned as PyTorch's allocator does it.

    Beside it: bytes of a pixel before its logits, lam and gate. None if there is nothing to launch, or CUDA
    declines it.
    """
    (batch, height, width), pixels = size, size.height * size.width
    channels = geometry.channels
    problem = Problem(
        geometry.directions,
        geometry.chunk,
        True,
        batch,
        channels,
        geometry.groups,
        height,
        width,
        dtype,
        "cuda",
    )
    if not batch or cuda.why_not(problem) is not None:
        return None
    # Only their layout matters.
    proxy, packed, y = (
        torch.empty(batch, pixels, elements, dtype=dtype, device="meta")
        for elements in (geometry.proxy, geometry.record, channels)
    )
    x, logits, lam, gate = views(proxy, packed, geometry, size)
    image = y.as_strided(x.shape, (pixels * channels, 1, width * channels, channels))
    tensors = {"x": x, "taps": logits, "lam": lam, "gate": gate, "y": image}
    with torch.cuda.device(index):
        case = Case(problem, driver.device(index), {name: View.of(it) for name, it in tensors.items()}, False)
        plan = two_threads_a_vector(case)
        call = Call(problem, tensors, index) if plan is None else _Planned(plan, problem, tensors, index)
    first, second, third = (packed.itemsize * it for it in _offsets(geometry))
    return call, first, second, third


class _Launches(Protocol):
    """What is ready to be launched."""

    def run(self, addresses: list[int], x: Tensor) -> None: ...


class _Planned:
    """As `Call`, of a plan that needs no memory of its own."""

    def __init__(self, plan: Plan, problem: Problem, tensors: Mapping[str, Tensor], index: int) -> None:
        places = [params.place(name) for name in tensors]
        self._index = index
        self._loaded = [
            driver.Loaded(it, params.pack(problem, tensors, (), it.knobs), places, index)
            for it in plan.launches
        ]

    def run(self, addresses: list[int], x: Tensor) -> None:
        stream = driver.stream(self._index)
        for loaded in self._loaded:
            loaded.run(addresses, stream)


TAP_LINES = DEPTH = 4
"""Lines of taps that are normalised together, and lines on their way from memory."""
WIDTHS = {(80, 128): 8, (160, 64): 16}
"""Bytes of a pixel that a block takes, by channels and side of a square image: those of SDXL at 2048 x 2048.

Only what has run right on a GPU is here; of other sizes the kernel has run in the emulator alone.
"""


def two_threads_a_vector(case: Case) -> Plan | None:
    """A plan for a small image of a UNet: a line in one block, sums on chip, and twice the threads.

    Its one image leaves multiprocessors with a warp or two, each of which waits for its own arithmetic.
    Narrower vectors halve that, and narrower blocks leave room for the sums of a larger image, which needs no
    splits then. The results are the same, bit for bit.

    None where the planner has something else than `pixels` in mind, or the size is not in `WIDTHS`.
    """
    device, problem = case.device, case.problem
    width = WIDTHS.get((problem.channels, problem.height)) if problem.height == problem.width else None
    usual = (problem.directions, problem.chunk, problem.groups, problem.batch) == (DIRECTIONS, None, 1, 1)
    if width is None or not usual or problem.dtype != torch.bfloat16 or choose(case).variant != "pixels":
        return None
    vector = width // 2
    roles = roles_of(case, blocks_of(case, vector, 2))
    threads = rounded(2 * problem.width)
    runs = (problem.width, problem.height)
    plan = pixels_forward.plan(case, Tiling(vector, 2, 1, roles, 1, runs, threads, 0, TAP_LINES, DEPTH, True))
    fits = (vector_of(case) or 0) >= vector and plan.launches[0].shared <= device.shared_memory
    return plan if roles == 4 and fits else None
