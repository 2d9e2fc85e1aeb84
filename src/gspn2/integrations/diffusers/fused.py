"""GroupNorm with SiLU, and GEGLU, as kernels for channels-innermost memory.

PyTorch's GroupNorm takes the statistics of a group by one block of threads, so those of one large picture by
32 of a GPU's 132 multiprocessors, and it hands channels_last images back as planes, which convolutions turn
around again. Its GEGLU is three passes. In a UNet without self-attention that is a third of the time.
"""

from __future__ import annotations

import struct
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from gspn2.backends.cuda import driver, toolchain
from gspn2.backends.cuda.geometry import Device, Kernel, Launch
from gspn2.backends.cuda.plan import OLDEST

SOURCES = Path(__file__).parent / "kernels"
_STORAGE = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_FORMAT = struct.Struct("<6q1q6i1f1i")
_ADDRESSES = 6
_THREADS, _MOST_THREADS = 512, 1024
_SLABS_A_MULTIPROCESSOR = 4
_FEWEST_ROUNDS = 8
"""Pixels that each thread should get, before another block is worth its start."""


def group_norm(
    x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float, silu: bool
) -> Tensor:
    """GroupNorm of x (B, C, H, W), then SiLU if asked for; channels_last where a kernel takes it."""
    if not takes(x) or any(it is not None and it.dtype != x.dtype for it in (weight, bias)):
        normed = F.group_norm(x, groups, weight, bias, eps)
        return F.silu(normed) if silu else normed
    x = x.contiguous(memory_format=torch.channels_last)
    affine = x.new_empty(x.shape[0], x.shape[1], 2, dtype=torch.float32)
    index = x.get_device()
    first, second, slabs = _norm_ready(tuple(x.shape), groups, eps, x.dtype, index)
    moments = x.new_empty(x.shape[0], slabs, x.shape[1], 2, dtype=torch.float32)
    tensors = (x, None, moments, affine, weight, bias)
    _run(first, tensors, index)
    _run(second, tensors, index)
    return scale_shift(x, affine, silu)


def scale_shift(x: Tensor, affine: Tensor, silu: bool) -> Tensor:
    """y = scale x + shift by channel, then SiLU if asked for.

    Args:
        x: (B, C, H, W).
        affine: scale and shift, float32 (B, C, 2).
        silu: see above.
    """
    if not takes(x):
        wide = affine.to(x.dtype)[..., None, None]
        y = torch.addcmul(wide[:, :, 1], x, wide[:, :, 0])
        return F.silu(y) if silu else y
    x = x.contiguous(memory_format=torch.channels_last)
    y = torch.empty_like(x, memory_format=torch.channels_last)
    index = x.get_device()
    _run(_apply_ready(tuple(x.shape), silu, x.dtype, index), (x, y, None, affine, None, None), index)
    return y


def geglu(x: Tensor) -> Tensor:
    """a gelu(b) of x (..., 2 C), whose first C channels are a."""
    channels = x.shape[-1] // 2
    if not (x.is_contiguous() and x.numel() and _fits(x, channels)):
        a, b = x.chunk(2, dim=-1)
        return a * F.gelu(b)
    y = x.new_empty(*x.shape[:-1], channels)
    index = x.get_device()
    _run(_geglu_ready(x.numel() // (2 * channels), channels, x.dtype, index), (x, y, *(None,) * 4), index)
    return y


def takes(x: Tensor) -> bool:
    """Is there a kernel for the norm of an image x (B, C, H, W)?"""
    return (
        x.ndim == 4
        and x.numel() > 0
        and x.shape[1] <= _MOST_THREADS * 16 // x.itemsize
        and _fits(x, x.shape[1])
    )


def _fits(x: Tensor, channels: int) -> bool:
    """Whole vectors of channels on a GPU that the kernels are for."""
    return (
        x.is_cuda
        and x.dtype in _STORAGE
        and channels * x.itemsize % 16 == 0
        and x.data_ptr() % 16 == 0
        and not (torch.is_grad_enabled() and x.requires_grad)
        and toolchain.why_not() is None
        and driver.device(x.get_device()).capability >= OLDEST
    )


Planned = tuple[Launch, bytes]
"""A launch, and its packed arguments without addresses: x, y, moments, affine, weight, bias come first."""


def norm_plan(
    shape: tuple[int, ...], groups: int, eps: float, dtype: torch.dtype, device: Device
) -> tuple[Planned, Planned, int]:
    """Launches for the moments of slabs and for scale and shift, and the number of slabs of an image."""
    batch, channels, height, width = shape
    vectors, rows, slabs = _split(channels, height * width, batch, dtype, device)
    packed = _packed(height * width, batch, channels, groups, slabs, vectors, rows, eps)
    first = Launch(_kernel("norm_moments", dtype), batch * slabs, vectors * rows, 8 * rows * channels)
    second = Launch(_kernel("norm_affine", dtype), batch * groups, 256, 4 * 256)
    return (first, packed), (second, packed), slabs


def apply_plan(shape: tuple[int, ...], silu: bool, dtype: torch.dtype, device: Device) -> Planned:
    """The launch for scale and shift."""
    batch, channels, height, width = shape
    vectors, rows, slabs = _split(channels, height * width, batch, dtype, device)
    launch = Launch(_kernel("norm_apply", dtype, SILU=int(silu)), batch * slabs, vectors * rows, 0)
    return launch, _packed(height * width, batch, channels, 0, slabs, vectors, rows, 0.0)


def geglu_plan(tokens: int, channels: int, dtype: torch.dtype, device: Device) -> Planned:
    """The launch for so many tokens of twice so many channels."""
    vectors, rows, slabs = _split(channels, tokens, 1, dtype, device)
    launch = Launch(_kernel("geglu", dtype), slabs, vectors * rows, 0)
    return launch, _packed(tokens, 1, channels, 0, slabs, vectors, rows, 0.0)


def _split(
    channels: int, pixels: int, batch: int, dtype: torch.dtype, device: Device
) -> tuple[int, int, int]:
    """Threads side by side for the channels, pixels that a block takes at once, and blocks for an image."""
    vectors = channels * dtype.itemsize // 16
    vectors = min(vectors, _THREADS) if vectors > _MOST_THREADS else vectors
    rows = max(1, min(_THREADS // vectors, pixels))
    most = -(-_SLABS_A_MULTIPROCESSOR * device.multiprocessors // batch)
    return vectors, rows, max(1, min(most, pixels // (rows * _FEWEST_ROUNDS), pixels))


def _packed(*sizes: float) -> bytes:
    return _FORMAT.pack(*(0,) * _ADDRESSES, *sizes, 0)


@lru_cache(maxsize=256)
def _norm_ready(
    shape: tuple[int, ...], groups: int, eps: float, dtype: torch.dtype, index: int
) -> tuple[driver.Loaded, driver.Loaded, int]:
    first, second, slabs = norm_plan(shape, groups, eps, dtype, driver.device(index))
    return _load(first, index), _load(second, index), slabs


@lru_cache(maxsize=256)
def _apply_ready(shape: tuple[int, ...], silu: bool, dtype: torch.dtype, index: int) -> driver.Loaded:
    return _load(apply_plan(shape, silu, dtype, driver.device(index)), index)


@lru_cache(maxsize=256)
def _geglu_ready(tokens: int, channels: int, dtype: torch.dtype, index: int) -> driver.Loaded:
    return _load(geglu_plan(tokens, channels, dtype, driver.device(index)), index)


def _kernel(function: str, dtype: torch.dtype, **macros: int) -> Kernel:
    defines = {"STORAGE": _STORAGE[dtype], **macros}
    return Kernel(str(SOURCES / f"{function}.cu"), function, tuple(defines.items()))


def _load(planned: Planned, index: int) -> driver.Loaded:
    with torch.cuda.device(index):
        return driver.Loaded(*planned, range(_ADDRESSES), index)


def _run(loaded: driver.Loaded, tensors: tuple[Tensor | None, ...], index: int) -> None:
    addresses = [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
    if driver.current_device() == index:
        loaded.run(addresses, driver.stream(index))
    else:
        with torch.cuda.device(index):
            loaded.run(addresses, driver.stream(index))
