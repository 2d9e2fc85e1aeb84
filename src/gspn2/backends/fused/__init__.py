"""Kernels for whole passages of a backbone's block at inference, written in Triton: norms and activations
beside matrix products, and FFNs whose hidden activations never leave the chip.

Nothing here is imported before a kernel is wanted: Triton comes with PyTorch's CUDA wheels only.
"""

from __future__ import annotations

from functools import cache, lru_cache
from importlib.util import find_spec

import torch
from torch import Tensor

DTYPES = (torch.bfloat16, torch.float16)
_OLDEST = (8, 0)
_BULK_COPIES = ((9, 0), (12, 0))
"""From the first on, below the second, which has too little shared memory for tiles of that size."""
_GRANULE = 8
"""Channels come in multiples of this: whole vectors of memory."""


def takes(x: Tensor, *channels: int, bulk: bool = False, sources: bool = False) -> bool:
    """Do kernels take rows of so many channels, on this GPU and in this dtype?

    Args:
        x: the input.
        channels: of input and output.
        bulk: with copies of whole tiles, which need an sm_90 or sm_100.
        sources: with a kernel in CUDA C++, which needs the compiler of those.
    """
    from ..cuda import toolchain

    return (
        x.is_cuda
        and torch.version.cuda is not None
        and x.dtype in DTYPES
        and x.numel() > 0
        and all(count % _GRANULE == 0 for count in channels)
        and _installed()
        and not (sources and toolchain.why_not() is not None)
        and _capability(x.get_device()) >= _OLDEST
        and (not bulk or _BULK_COPIES[0] <= _capability(x.get_device()) < _BULK_COPIES[1])
    )


@cache
def _installed() -> bool:
    return find_spec("triton") is not None


@lru_cache(maxsize=64)
def _capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)
