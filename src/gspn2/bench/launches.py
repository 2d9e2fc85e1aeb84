"""Kernels that belong to the bench, run by the toolchain and driver of the CUDA backend.

They are written as plans, like those of the backend, so that the emulator of the tests runs them, too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from ..backends import Problem
from ..backends.cuda import driver, params
from ..backends.cuda.geometry import Kernel, Plan

SOURCES = Path(__file__).parent / "kernels"
recorded: dict[Kernel, None] | None = None
"""While it is no None, kernels are noted there and nothing is run (`ahead`)."""
_STORAGE = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def kernel(source: str, function: str, dtype: torch.dtype, **macros: int) -> Kernel:
    """A kernel of the bench: weights as given, an input scale, no gate."""
    options = {"STORAGE": _STORAGE[dtype], "NORMALIZE": 0, "HAS_LAM": 1, "HAS_GATE": 0, **macros}
    return Kernel(str(SOURCES / source), function, tuple(options.items()))


def ready(plan: Plan, problem: Problem, tensors: Mapping[str, Tensor]) -> Callable[[], None]:
    """Compile and load what a plan needs; the result launches it on the current stream.

    Args:
        plan: launches in order, each with its knobs; scratch memory is allocated here, once.
        problem: what the tensors hold.
        tensors: by the names of `params.NAMES`, all on one CUDA device; kept alive by the result.
    """
    if recorded is not None:
        recorded.update(dict.fromkeys(launch.kernel for launch in plan.launches))
        return lambda: None
    device = next(iter(tensors.values())).device
    index = device.index or 0
    scratch = [torch.empty(size, dtype=torch.uint8, device=device) for size in plan.scratch]
    addresses = [it.data_ptr() for it in scratch]
    with torch.cuda.device(index):
        loaded = [
            driver.Loaded(launch, params.pack(problem, tensors, addresses, launch.knobs), (), index)
            for launch in plan.launches
        ]
    held = (*tensors.values(), *scratch)

    def run() -> None:
        assert held
        stream = driver.stream(index)
        for launch in loaded:
            launch.run((), stream)

    return run
