"""How fast a device copies, reads and multiplies, of which floors are made.

A floor must not be beaten. So it is made of the fastest sample of a whole run, not of a median at its
start, when a processor may still be slow or shared; of reading, and of reading more than is written, as well
as copying, because memory that is mostly read is faster than memory that is written as often; and of the
fastest of several products: on some processors PyTorch's convolutions multiply twice as fast as its BLAS.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F

from .measure import COPY_BYTES, Work, bytes_per_ms, copy, in_turn
from .results import Row, timed

Rates = dict[str, Any]
DTYPES = {"cuda": torch.bfloat16, "cpu": torch.float32}
PRODUCTS = {
    "cuda": (("matrix product", 4096), ("matrix product", 8192)),
    "cpu": (("matrix product", 512), ("matrix product", 1024), ("convolution", 512), ("convolution", 1024)),
}
"""Square products, by device: how PyTorch is asked for it, and its side."""
INTENSE = 4.0
"""Operations a byte from which on products are timed beside a case."""


class Probes:
    """What is timed in turn with every case of a device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    @cached_property
    def copy(self) -> Work:
        return copy(self.device)

    @cached_property
    def read(self) -> Work:
        """A sum over as much memory as the copy reads."""
        numbers = torch.rand(self._read_bytes // 4, device=self.device)
        return Work(lambda _: numbers.sum(), graph=False)

    @cached_property
    def mix(self) -> Work:
        """A product and a sum of three tensors, with as many bytes in all: one is written for three read."""
        a, b, c, out = (torch.rand(self._read_bytes // 16, device=self.device) for _ in range(4))
        return Work(lambda _: torch.addcmul(a, b, c, out=out), graph=False)

    @cached_property
    def products(self) -> dict[Any, Work]:
        """Those of `PRODUCTS`."""
        return {which: product(*which, self.device) for which in PRODUCTS[self.device.type]}

    @property
    def _read_bytes(self) -> int:
        return COPY_BYTES // 2 if self.device.type == "cuda" else COPY_BYTES // 128

    def start(self, rounds: int, seconds: float, doing: Callable[[Any], None] = lambda name: None) -> Rates:
        """What is found now, as it stands in the results; doing as for `in_turn`."""
        times = in_turn(self.beside(True), self.device, rounds, seconds, doing=doing)
        rates: Rates = {
            "copy_gb_per_s": bytes_per_ms(times["copy"], self.device) / 1e6,
            "fastest_gb_per_s": 0.0,
            "matrix_tflop_per_s": 0.0,
            "matrix_dtype": str(DTYPES[self.device.type]).removeprefix("torch."),
        }
        self.note(times, rates)
        return rates

    def beside(self, computes: bool) -> dict[Any, Work]:
        """To be timed in turn with passes; products only beside those that compute."""
        memory = {"copy": self.copy, "read": self.read, "mix": self.mix}
        return {**memory, **(self.products if computes else {})}

    def note(self, times: dict[Any, Any], rates: Rates) -> None:
        """Raise the rates where these times are the fastest that were seen."""
        if "copy" in times:
            copied = bytes_per_ms({"ms": times["copy"]["range"][0]}, self.device) / 1e6
            read = self._read_bytes / min(times[it]["range"][0] for it in ("read", "mix")) / 1e6
            rates["fastest_gb_per_s"] = max(rates["fastest_gb_per_s"], copied, read)
        for how, side in PRODUCTS[self.device.type]:
            if (how, side) not in times:
                continue
            found = 2 * side**3 / times[how, side]["range"][0] / 1e9
            if found > rates["matrix_tflop_per_s"]:
                rates |= {"matrix_tflop_per_s": found, "matrix_side": side, "matrix_by": how}


def product(how: str, side: int, device: torch.device) -> Work:
    """A square product, asked for as such or as a convolution of 1 x 1, channels innermost."""
    a, b = (torch.randn(side, side, device=device, dtype=DTYPES[device.type]) for _ in range(2))
    if how == "matrix product":
        return Work(lambda _: a @ b, graph=False)
    image, weight = a.view(1, 1, side, side).permute(0, 3, 1, 2), b.view(side, side, 1, 1)
    return Work(lambda _: F.conv2d(image, weight), graph=False)


def floor_ms(moved: int, flops: int, rates: Rates) -> float:
    """The time that so many bytes and operations take at least."""
    return max(moved / rates["fastest_gb_per_s"] / 1e6, flops / rates["matrix_tflop_per_s"] / 1e9)


def judge(rows: Iterable[Row], rates: dict[str, Rates]) -> None:
    """Floors by the fastest rates so far, also of rows that were measured before those were seen.

    Args:
        rows: of results; those that do not tell the kind of device keep what they have.
        rates: by kind of device.
    """
    for row in rows:
        if row.get("device") not in rates:
            continue
        for it in timed(row):
            if it["bytes"] or it["flops"]:
                it["floor_ms"] = floor_ms(it["bytes"], it["flops"], rates[row["device"]])
                it["over_floor"] = it["ms"] / it["floor_ms"]
