"""The operator on the CPU, beside an eager loop over lines and beside attention."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backends import DIRECTIONS
from . import eager
from .case import Absent, Case, Contender, Part, Pass
from .check import Wrong
from .contenders import operator, single
from .measure import Work
from .operator import Scan, Size, check

SIZES: list[Size] = [(1, 8, 128, 128), (8, 8, 56, 56), (8, 64, 14, 14), (1, 64, 64, 64)]
MOST_TOKENS = 4096
"""Attention is measured up to here."""
BOTH = ("forward", "backward")
HOST = torch.device("cpu")


def cases(device: torch.device) -> Iterator[Case]:
    """Four directions with lam and gate, as a mixer runs them, in the layout of the papers."""
    for size in SIZES:
        scan = Scan(size, torch.float32, "shared", DIRECTIONS, scaled=True, passes=BOTH)
        facts = {"size": list(size), "dtype": "float32", "threads": torch.get_num_threads()}
        yield Case(
            "cpu",
            "x".join(map(str, size)),
            facts,
            lambda _, scan=scan: contenders(scan),  # type: ignore[misc]
            first=size == SIZES[0],
            host=True,
            rounds=5,
            seconds=5.0,
        )


def contenders(scan: Scan) -> list[Contender]:
    return [
        Contender("loop in PyTorch", lambda: _loop(scan)),
        operator("gspn2", scan, HOST),
        Contender("SDPA", lambda: _attention(scan)),
    ]


def _loop(scan: Scan) -> dict[str, Pass]:
    """A vectorised loop over lines, all directions at once, and autograd."""
    operands = single(scan, HOST)
    leaves = [it.detach().requires_grad_() for it in operands[:4] if it is not None]

    def forward(_: int) -> Tensor:
        with torch.no_grad():
            return eager.propagate(*operands[:4])

    def backward(_: int) -> tuple[Tensor, ...]:
        return torch.autograd.grad(eager.propagate(*leaves), leaves, operands.dy)

    calls: dict[str, Callable[[int], Any]] = {"forward": forward, "backward": backward}
    notes = {"backward": {"note": "autograd: forward and backward"}}
    return {
        which: Pass(
            Work(calls[which]),
            lambda which=which: check(replace(scan, passes=(which,)), operands, calls),  # type: ignore[misc]
            scan.bytes(which),
            scan.flops(which),
            notes.get(which, {}),
        )
        for which in scan.passes
    }


def _attention(scan: Scan) -> dict[str, Pass]:
    """One head over all pixels: global mixing of as many channels."""
    batch, channels, height, width = scan.size
    tokens = height * width
    if tokens > MOST_TOKENS:
        raise Absent(f"{tokens} tokens take too long")
    q, k, v = (torch.randn(batch, 1, tokens, channels) for _ in range(3))

    def forward(_: int) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v)

    def right() -> dict[str, float]:
        weights = (q[:1, :, :8].double() @ k[:1].double().transpose(-2, -1) / channels**0.5).softmax(dim=-1)
        error = (forward(0)[:1, :, :8] - weights @ v[:1].double()).abs().max()
        if not error < 1e-4:
            raise Wrong(f"y: error {error:.1e}")
        return {"y": float(error)}

    flops = 4 * batch * tokens**2 * channels
    return {"forward": Pass(Work(forward), right, 4 * q.nbytes, flops)}


PART = Part(
    "cpu",
    "On the CPU",
    "The native CPU operator, four directions, shared taps, lam and gate, float32, beside a vectorised "
    "loop over lines in PyTorch (all directions at once, autograd for backward) and beside attention over "
    "the same pixels and channels.",
    cases,
)
