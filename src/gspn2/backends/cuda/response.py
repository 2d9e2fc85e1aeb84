"""LayerNorm and GRN at the end of a GSPN module on CUDA: statistics of images, or all of it for small ones.

See `kernels/response.cu`, and `backends/fused/launch.py` for what follows the statistics of larger images.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from . import driver
from .geometry import Device, Kernel, Launch

STORAGE = {torch.bfloat16: 1, torch.float16: 2}
PARAMETERS = {torch.float32: 0, **STORAGE}
_FORMAT = struct.Struct("<12q4i2f")
_ADDRESSES = 12
_THREADS = 256
_MOST_PIXELS = 2048
"""Whose means and scales a block keeps in shared memory."""
_MOST_BYTES = 2**20
"""Of an image that is still in the cache when it is read again."""
_ROUNDS = 2
"""Blocks for each one that the GPU has room for, with shares of images."""


class Problem(NamedTuple):
    """Shape and dtypes: images (batch, pixels, channels) of `storage`, parameters of `parameters`."""

    batch: int
    pixels: int
    channels: int
    proxies: int
    storage: torch.dtype
    parameters: torch.dtype


class Norms(NamedTuple):
    """LayerNorm's gain and shift (C,) and eps, then GRN's weight, bias and eps."""

    gain: Tensor
    shift: Tensor
    norm_eps: float
    weight: Tensor
    bias: Tensor
    eps: float


def in_one_block(p: Problem, device: Device) -> bool:
    """Are the images so small, and so many, that a block does all of one?"""
    return (
        p.pixels <= _MOST_PIXELS
        and p.pixels * p.channels * p.storage.itemsize <= _MOST_BYTES
        and p.batch >= device.multiprocessors // 2
    )


def whole(x: Tensor, proxies: Sequence[Tensor | None], norms: Norms) -> Tensor:
    """GRN(LayerNorm(x + y weight^T + bias)): x (B, pixels, C) -> the same, for images `in_one_block`.

    Args:
        x: dense.
        proxies: y (B, pixels, P), weight (C, P), bias (C,), or None for each.
        norms: the parameters.
    """
    to = torch.empty_like(x)
    _run(x, proxies, norms, True, (None, None, None, to))
    return to


def statistics(x: Tensor, proxies: Sequence[Tensor | None], norms: Norms) -> tuple[Tensor, Tensor, Tensor]:
    """What `whole` begins with, in float32.

    Returns:
        Means of pixels, one over their standard deviations, (B, pixels) each; and sums, over shares of an
        image, of the normalized channels and of their squares, (B, shares, 2, C).
    """
    batch, pixels, channels = x.shape
    means, scales = x.new_empty(2, batch, pixels, dtype=torch.float32)
    problem = _problem(x, proxies, norms)
    shares = -(-pixels // _share(problem, driver.device(x.get_device())))
    sums = x.new_empty(batch, shares, 2, channels, dtype=torch.float32)
    _run(x, proxies, norms, False, (means, scales, sums, None))
    return means, scales, sums


def plan(p: Problem, eps: tuple[float, float], in_one: bool, device: Device) -> tuple[Launch, bytes]:
    """The launch and its packed arguments without addresses.

    Args:
        p: the problem.
        eps: LayerNorm's and GRN's.
        in_one: all of an image in a block, or statistics of shares.
        device: the GPU.
    """
    lanes, step, blocks = _lanes(p.channels // 2)
    share = p.pixels if in_one else _share(p, device)
    shares = -(-p.pixels // share)
    defines = (
        ("STORAGE", STORAGE[p.storage]),
        ("WEIGHTS", PARAMETERS[p.parameters]),
        ("CHANNELS", p.channels),
        ("PROXIES", p.proxies),
        ("LANES", lanes),
        ("STEP", step),
        ("THREADS", _THREADS),
        ("BLOCKS", blocks),
        ("WHOLE", int(in_one)),
    )
    arguments = _FORMAT.pack(*(0,) * _ADDRESSES, p.pixels, share, shares, 0, *eps)
    shared = 8 * (p.proxies + 3) * (p.channels // 2) + 4 * 32 + (8 * p.pixels if in_one else 0)
    return Launch(Kernel("response.cu", "response", defines), p.batch * shares, _THREADS, shared), arguments


def representative_kernels() -> list[Kernel]:
    """Kernels that the tests compile, all of them hot."""
    half, full = torch.bfloat16, torch.float32
    problems = [
        (Problem(256, 196, 576, 2, half, half), True),
        (Problem(256, 49, 768, 2, half, full), True),
        (Problem(256, 3136, 96, 2, half, half), False),
        (Problem(256, 784, 192, 2, half, full), False),
    ]
    return [plan(problem, (1e-6, 1e-6), in_one, Device())[0].kernel for problem, in_one in problems]


def _lanes(pairs: int) -> tuple[int, int, int]:
    """Lanes of a pixel, pixels at a time, and blocks of a multiprocessor, for so many pairs of channels."""
    lanes = min((32, 16), key=lambda count: -(-pairs // count) * count)
    each = -(-pairs // lanes)
    return lanes, 4 if each <= 3 else 2 if each <= 9 else 1, 3 if each <= 3 else 2 if each <= 12 else 1


def _share(p: Problem, device: Device) -> int:
    """Pixels of a block: images are cut where there are too few of them."""
    lanes, step, blocks = _lanes(p.channels // 2)
    at_a_time = _THREADS // lanes * step
    wanted = -(-_ROUNDS * blocks * device.multiprocessors // p.batch)
    return max(-(-p.pixels // wanted), min(p.pixels, 2 * at_a_time))


def _problem(x: Tensor, proxies: Sequence[Tensor | None], norms: Norms) -> Problem:
    (batch, pixels, channels), y = x.shape, proxies[0]
    count = 0 if y is None else y.shape[2]
    return Problem(batch, pixels, channels, count, x.dtype, norms.gain.dtype)


def _run(
    x: Tensor,
    proxies: Sequence[Tensor | None],
    norms: Norms,
    in_one: bool,
    outputs: Sequence[Tensor | None],
) -> None:
    parameters = (norms.gain, norms.shift, norms.weight, norms.bias)
    problem, index = _problem(x, proxies, norms), x.get_device()
    tensors = (x, *proxies, *parameters, *outputs)
    addresses = [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
    if driver.current_device() == index:
        _ready(problem, (norms.norm_eps, norms.eps), in_one, index).run(addresses, driver.stream(index))
        return
    with torch.cuda.device(index):
        _ready(problem, (norms.norm_eps, norms.eps), in_one, index).run(addresses, driver.stream(index))


@lru_cache(maxsize=1024)
def _ready(p: Problem, eps: tuple[float, float], in_one: bool, index: int) -> driver.Loaded:
    launch, arguments = plan(p, eps, in_one, driver.device(index))
    return driver.Loaded(launch, arguments, range(_ADDRESSES), index)
