"""The optimisation ladder: from one launch a line to the shipped kernel, one idea at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch

from ..backends import Problem, reference
from . import ladder_kernels
from .case import Absent, Case, Contender, Part, Pass
from .check import refuse_if_far
from .contenders import gspn1, launched, operator
from .launches import ready
from .measure import Work
from .operator import Scan, short

SIZES = [(16, 8, 1024, 1024), (256, 1, 1024, 1024)]
SMALL = [(2, 8, 128, 128)]
COMPACT = 2
"""Proxy channels of the compact rung."""
RUNGS = (
    "baseline",
    "fused",
    "coalesced",
    "on-chip state",
    "2D blocks",
    "compact channels",
    "shipped",
)
ROUNDING_SLACK = {torch.float32: 1e-4, torch.bfloat16: 0.1}
"""As for the baseline: states in memory, in the storage type."""


def cases(device: torch.device) -> Iterator[Case]:
    """Both sizes of the paper, in both dtypes."""
    on_cpu = device.type == "cpu"
    for size in SMALL if on_cpu else SIZES:
        for dtype in (torch.float32,) if on_cpu else (torch.bfloat16, torch.float32):
            right = Scan(size, dtype, "per-channel", ("right",), scan=True)
            name = f"{'x'.join(map(str, size))} {short(dtype)}"
            facts = {"size": list(size), "dtype": str(dtype).removeprefix("torch."), "rungs": list(RUNGS)}
            yield Case(
                "ladder",
                name,
                facts,
                lambda device, right=right: rungs(right, device),  # type: ignore[misc]
                first=True,
                seconds=4.0,
            )


def rungs(right: Scan, device: torch.device) -> list[Contender]:
    """One contender a rung, in order. Down is the direction in which lines are contiguous in memory."""
    down = replace(right, directions=("down",))
    slack = ROUNDING_SLACK[right.dtype]
    return [
        gspn1(right, device),
        launched("fused", ladder_kernels.fused, right, device, slack),
        launched("coalesced", ladder_kernels.fused, down, device, slack),
        launched("on-chip state", ladder_kernels.onchip, down, device),
        launched("2D blocks", ladder_kernels.blocks, down, device),
        compact(down, device),
        operator("shipped", right, device),
        operator("shipped, lines contiguous", down, device),
    ]


def compact(scan: Scan, device: torch.device) -> Contender:
    """The rung before on 2 proxy channels, with the projections from and to all channels around it."""

    def make() -> dict[str, Pass]:
        if device.type == "cpu":
            raise Absent("a CUDA kernel")
        if scan.size[1] <= COMPACT:
            raise Absent(f"there are no more than {COMPACT} channels to compress")
        return {"forward": _compact(scan, device)}

    return Contender("compact channels", make)


def _compact(scan: Scan, device: torch.device) -> Pass:
    batch, channels, height, width = scan.size
    inner = replace(scan, size=(batch, COMPACT, height, width))
    problem, wide = inner.problem(), scan.problem()
    like = {"device": device, "dtype": scan.dtype}
    x = torch.randn(scan.size, **like)  # type: ignore[call-overload]
    proxy, hidden = (torch.empty(inner.size, **like) for _ in range(2))  # type: ignore[call-overload]
    y = torch.empty_like(x)
    lam = torch.randn(batch, 1, COMPACT, height, width, **like)  # type: ignore[call-overload]
    taps = torch.randn(batch, 1, COMPACT, 3, height, width, **like).softmax(dim=3)  # type: ignore[call-overload]
    matrices = [
        torch.randn(1, 1, *shape, **like) / shape[1] ** 0.5  # type: ignore[call-overload]
        for shape in ((COMPACT, channels), (channels, COMPACT))
    ]
    steps = [
        ready(
            ladder_kernels.project(wide, channels, COMPACT), wide, {"x": x, "lam": matrices[0], "y": proxy}
        ),
        ready(ladder_kernels.blocks(problem), problem, {"x": proxy, "lam": lam, "taps": taps, "y": hidden}),
        ready(
            ladder_kernels.project(problem, COMPACT, channels),
            problem,
            {"x": hidden, "lam": matrices[1], "y": y},
        ),
    ]

    def run(_: int) -> torch.Tensor:
        for step in steps:
            step()
        return y

    def check() -> dict[str, float]:
        for it in (proxy, hidden, y):
            it.fill_(torch.nan)
        found = run(0)[:1]
        p = torch.einsum("oc,bchw->bohw", matrices[0][0, 0].double(), x[:1].double())
        sizes = {"batch": 1, "dtype": torch.float64}
        exact: Problem = replace(problem, **sizes)  # type: ignore[arg-type]
        h = reference.propagate(p, taps[:1].double(), lam[:1].double(), None, exact)
        truth = torch.einsum("oc,bchw->bohw", matrices[1][0, 0].double(), h)
        # The proxy and the state are rounded to storage between the three launches.
        return {"y": refuse_if_far("y", found, truth, 2 * torch.finfo(scan.dtype).eps)}

    pixels = batch * height * width
    planes = 2 * channels + 4 * COMPACT
    flops = 4 * pixels * channels * COMPACT + inner.flops("forward")
    return Pass(Work(run), check, planes * pixels * scan.dtype.itemsize, flops)


PART = Part(
    "ladder",
    "The optimisation ladder",
    "One direction, forward, per-channel taps. Each rung adds one idea to the one before it: GSPN-1 "
    "launches a kernel a line; fused into one launch; lines contiguous in memory; states in shared memory; "
    "blocks of places by planes with 16-byte accesses; 2 proxy channels instead of 8, projections "
    "included; and what the package runs for the first rung's problem.",
    cases,
)
