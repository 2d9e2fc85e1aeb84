"""Nothing is timed before its result was found right: what that means."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class Wrong(Exception):
    """A result that is not what it should be; nothing is timed then."""


def poisoned_twice(call: Callable[[int], Any], which: str) -> tuple[Tensor, ...]:
    """The outputs of two runs on memory full of NaN.

    Raises:
        Wrong: they are not finite everywhere, or not the same.
    """
    before = torch.are_deterministic_algorithms_enabled()
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        first, second = (call(0) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(before)
    pair = ((first,), (second,)) if isinstance(first, Tensor) else (first, second)
    for one, other in zip(*pair, strict=True):
        if not one.isfinite().all():
            raise Wrong(f"{which}: {int((~one.isfinite()).sum())} of {one.numel()} numbers are not finite")
        if not torch.equal(one, other):
            raise Wrong(f"{which}: two runs differ")
    return pair[0]


def refuse_if_far(name: str, found: Tensor, truth: Tensor, floor: float) -> float:
    norm = truth.norm()
    error = float((found.double() - truth).norm() / norm)
    rounding = float((truth.to(found.dtype).double() - truth).norm() / norm)
    if not error <= 2 * rounding + floor:
        raise Wrong(f"{name}: relative error {error:.2e}, {rounding:.2e} of it from rounding")
    return error
