"""Depthwise convolutions of channels_last images on CUDA: forward, gradient of the input, of the weights.

Backbones have three of them in a block, and cuDNN takes several times as long for channels_last tensors of 16
bits as the multiplications need.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from . import driver, toolchain
from .geometry import Device, Kernel, Launch
from .plan import OLDEST

SIDES = (3, 5, 7)
_STORAGE = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_FORMAT = struct.Struct("<7q8i")
_ADDRESSES = 7
_SUMS_FORMAT = struct.Struct("<3q6i")
_SUMS_ADDRESSES = 3
_MOST_TILES = 2**32 - 2**20
"""A kernel counts tiles, and adds a round of them, in 32 bits."""

_PAIRS = 64
"""Pairs of channels that a block takes at most: more only share its weights."""
_THREADS = 256
_STRIPS, _STRIP, _SLICE = 16, 8, 16
"""On tensor cores: strips of a block, columns of a strip, channels of a block."""
_ROUNDS = 4
"""Blocks for each one that the GPU has room for: the last ones to finish are short."""
_LANES, _MOST_ROWS, _EACH = 32, 32, 8
"""When groups are added up: channels of a block, its rows at most, and groups that a row reads at a time."""


Options = tuple[torch.dtype, torch.dtype, int, tuple[bool, bool, bool, bool, bool]]


class _Ready(NamedTuple):
    """A call with its kernels on a device.

    Args:
        loaded: the launch.
        aligned: the images have to begin at an address of whole vectors of 16 bytes.
        groups: of blocks, each of which leaves sums in the gradient of the weights.
        sums: the launch that adds these up; None in other calls.
    """

    loaded: driver.Loaded
    aligned: bool
    groups: int
    sums: driver.Loaded | None


def takes(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Are there kernels for this convolution, x (B, C, H, W) on a GPU and weight (C, 1, side, side)?"""
    _, _, side, across = weight.shape
    return (
        weight.dtype in _STORAGE
        and (bias is None or bias.dtype == weight.dtype)
        and side == across
        and takes_side(x, side)
    )


def takes_side(x: Tensor, side: int) -> bool:
    """The same, of weights in float32: this is what the gradient of weights comes in."""
    return (
        x.dtype in _STORAGE
        and x.shape[1] % 2 == 0
        and side in SIDES
        and x.numel() < _MOST_TILES
        and toolchain.why_not() is None
        and driver.device(x.get_device()).capability >= OLDEST
    )


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    residual: bool = False,
    silu: bool = False,
    flip: bool = False,
    other: Tensor | None = None,
) -> Tensor:
    """conv(x) [+ x] [then SiLU]: x (B, C, H, W) -> the same, channels_last.

    Args:
        x: of any strides; what is not channels_last is copied.
        weight: (C, 1, side, side).
        bias: (C,).
        residual: add x.
        silu: apply x sigmoid(x) last.
        flip: turn the weights by 180 degrees, which makes the gradient of the input from that of the output.
        other: added to x first, if it is there.
    """
    x = _channels_last(x)
    other = None if other is None else _channels_last(other.to(x.dtype))
    y = torch.empty_like(x, memory_format=torch.channels_last)
    if not x.numel():
        return y
    weight = weight.contiguous()
    index = x.get_device()
    flags = (residual, silu, flip, other is not None, False)
    options = (x.dtype, weight.dtype, weight.shape[2], flags)
    ready = _ready(tuple(x.shape), options, index)
    x = _aligned(x) if ready.aligned else x
    _run(index, (ready.loaded, (x, None, weight, bias, y, None, other)))
    return y


def weight_gradient(dy: Tensor, x: Tensor, side: int, other: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Gradients (C, 1, side, side) and (C,) of weight and bias, float32; the images are (B, C, H, W)."""
    x, dy = _channels_last(x), _channels_last(dy.to(x.dtype))
    other = None if other is None else _channels_last(other.to(x.dtype))
    channels, taps = x.shape[1], side * side
    if not x.numel():
        return x.new_zeros(channels, 1, side, side, dtype=torch.float32), x.new_zeros(
            channels, dtype=torch.float32
        )
    index = x.get_device()
    options = (x.dtype, torch.float32, side, (False, False, False, other is not None, True))
    ready = _ready(tuple(x.shape), options, index)
    assert ready.sums is not None
    if ready.aligned:
        x, dy = _aligned(x), _aligned(dy)
    partial = x.new_empty(ready.groups, taps + 1, channels, dtype=torch.float32)
    weight = x.new_empty(channels, 1, side, side, dtype=torch.float32)
    bias = x.new_empty(channels, dtype=torch.float32)
    images = (x, dy, None, None, None, partial, other)
    _run(index, (ready.loaded, images), (ready.sums, (partial, weight, bias)))
    return weight, bias


def plan(shape: tuple[int, int, int, int], options: Options, device: Device) -> tuple[Launch, bytes, int]:
    """The launch, its packed arguments without addresses, and the groups of blocks that share the tiles.

    Args:
        shape: of the images, (B, C, H, W).
        options: dtypes of images and weights, side, and flags: residual, silu, flip, a second input, and
            whether the gradient of the weights is asked for.
        device: the GPU.
    """
    if _on_tensor_cores(shape, options):
        return _plan_tensor(shape, options, device)
    batch, channels, height, width = shape
    storage, weights, side, (residual, silu, flip, second, gradient) = options
    tall, wide = _tile(height, width, side, most=not (gradient and side > 3 and storage == torch.float32))
    pairs = _pairs(channels // 2)
    bound = _THREADS
    slots = max(1, bound // pairs)
    threads = -(-slots * pairs // 32) * 32
    slices = -(-channels // 2 // pairs)
    tiles = batch * -(-height // tall) * -(-width // wide)
    resident = _resident(side, gradient)
    rounds = 1 if gradient else _ROUNDS
    blocks = max(1, resident * rounds * device.multiprocessors // slices)
    groups = min(-(-tiles // slots), blocks)
    defines = [
        ("STORAGE", _STORAGE[storage]),
        ("WEIGHTS", _STORAGE[weights]),
        ("SIDE", side),
        ("CHANNELS", channels),
        ("PAIRS", pairs),
        ("TALL", tall),
        ("WIDE", wide),
        ("THREADS", bound),
        ("BLOCKS", resident),
        ("SECOND", int(second)),
    ]
    if gradient:
        kernel = Kernel("depthwise_weights.cu", "depthwise_weights", tuple(defines))
        shared = 2 * 8 * slots * pairs
    else:
        defines += [("RESIDUAL", int(residual)), ("SILU", int(silu))]
        kernel = Kernel("depthwise_forward.cu", "depthwise_forward", tuple(defines))
        shared = 8 * side * side * pairs
    arguments = _FORMAT.pack(*(0,) * _ADDRESSES, batch, height, width, slots, slices, groups, int(flip), 0)
    return Launch(kernel, groups * slices, threads, shared), arguments, groups


def _on_tensor_cores(shape: Sequence[int], options: Options) -> bool:
    """Does the kernel of band matrices take it, and is there enough of it? (depthwise_tensor.cu)"""
    batch, channels, _, width = shape
    storage, _, side, (residual, _, _, second, _) = options
    return (
        side == 7
        and storage in (torch.bfloat16, torch.float16)
        and channels % 8 == 0
        and not (residual or second)
        and batch * -(-width // _STRIP) >= 2 * _STRIPS
    )


def _plan_tensor(
    shape: tuple[int, int, int, int], options: Options, device: Device
) -> tuple[Launch, bytes, int]:
    batch, channels, height, width = shape
    storage, weights, side, (_, silu, flip, _, gradient) = options
    slices = -(-channels // _SLICE)
    strips = -(-batch * -(-width // _STRIP) // _STRIPS)
    # Every part goes through the rows around it once more: no more of them than keep the GPU busy.
    parts = max(1, min(height // (2 * side), -(-2 * device.multiprocessors // (slices * strips))))
    rows = -(-height // parts)
    parts = -(-height // rows)
    defines = [
        ("STORAGE", _STORAGE[storage]),
        ("WEIGHTS", _STORAGE[weights]),
        ("SIDE", side),
        ("CHANNELS", channels),
        ("PAIRS", _SLICE // 2),
        ("SECOND", 0),
    ]
    # Two rows of inputs and two of outputs or gradients, of 16 bits; a strip is read with 8 columns more.
    shared = 2 * 2 * _SLICE * _STRIPS * (2 * _STRIP + _STRIP)
    groups = strips
    if gradient:
        kernel = Kernel("depthwise_weights_tensor.cu", "depthwise_weights_tensor", tuple(defines))
        # Every block leaves a set of sums: as few blocks as there is room for, with equal shares.
        rounds = -(-strips * parts * slices // (2 * device.multiprocessors))
        groups = -(-strips * parts // rounds)
        grid = groups * slices
    else:
        kernel = Kernel("depthwise_tensor.cu", "depthwise_tensor", (*defines, ("SILU", int(silu))))
        grid = parts * groups * slices
    arguments = _FORMAT.pack(*(0,) * _ADDRESSES, batch, height, width, rows, slices, groups, int(flip), 0)
    return Launch(kernel, grid, _SLICE // 2 * 32, shared), arguments, groups


def plan_sums(channels: int, side: int, groups: int) -> tuple[Launch, bytes]:
    """The launch that adds the groups' sums up, and its packed arguments without addresses.

    Args:
        channels: of the images.
        side: of the weights.
        groups: of blocks that left sums, (groups, side * side + 1, channels) float32.
    """
    rows = min(_MOST_ROWS, -(-groups // _EACH))
    slices = -(-channels // _LANES)
    taps = side * side
    arguments = _SUMS_FORMAT.pack(*(0,) * _SUMS_ADDRESSES, channels, taps, groups, rows, slices, 0)
    launch = Launch(_SUMS, (taps + 1) * slices, _LANES * rows, 4 * _LANES * rows)
    return launch, arguments


_SUMS = Kernel(
    "depthwise_sums.cu", "depthwise_sums", (("LANES", _LANES), ("MOST_ROWS", _MOST_ROWS), ("EACH", _EACH))
)


def representative_kernels() -> list[tuple[Kernel, bool]]:
    """Kernels that the tests compile, and whether each is hot (must not spill)."""
    bf16, full = torch.bfloat16, torch.float32
    calls = [
        ((256, 96, 56, 56), (bf16, full, 7, (False, True, False, False, False))),
        ((3, 96, 5, 5), (bf16, full, 7, (False, True, False, False, False))),
        ((256, 64, 56, 56), (bf16, full, 3, (True, False, False, True, False))),
        ((256, 96, 56, 56), (bf16, full, 7, (False, False, False, False, True))),
        ((3, 96, 5, 5), (bf16, full, 7, (False, False, False, False, True))),
        ((256, 64, 56, 56), (bf16, full, 3, (False, False, False, True, True))),
    ]
    # The gradients of 49 weights take all registers there are, and a few more.
    hot = (True, True, True, False, False, True)
    return [
        *(
            (plan(shape, options, Device())[0].kernel, flag)
            for (shape, options), flag in zip(calls, hot, strict=True)
        ),
        (_SUMS, True),
    ]


def _tile(height: int, width: int, side: int, most: bool) -> tuple[int, int]:
    """Rows and columns of a tile: the more pixels the better, unless many lie outside of the image.

    most: let it have as many as fit in the registers beside pairs of 16 bits.
    """
    choices = [(2, 7), (2, 8), *([(4, 7)] if most else [])]

    def work(choice: tuple[int, int]) -> float:
        tall, wide = choice
        pixels = -(-height // tall) * tall * -(-width // wide) * wide
        loads = (tall + side - 1) * (wide + side - 1) / (tall * wide)
        return pixels * (side * side + 2 * loads)

    return min(choices, key=work)


def _resident(side: int, gradient: bool) -> int:
    """Blocks of a multiprocessor. With the gradient of 49 weights in registers there is room for one."""
    return 1 if gradient and side > 3 else 2


def _pairs(count: int) -> int:
    """Pairs of channels of a block: all channels in equal shares, if there are such of a good size."""
    if count <= _PAIRS:
        return count
    return next((size for size in range(_PAIRS, 15, -1) if count % size == 0), 32)


@lru_cache(maxsize=1024)
def _ready(shape: tuple[int, int, int, int], options: Options, index: int) -> _Ready:
    launch, arguments, groups = plan(shape, options, driver.device(index))
    with torch.cuda.device(index):
        loaded = driver.Loaded(launch, arguments, range(_ADDRESSES), index)
        sums = _ready_sums(shape[1], options[2], groups, index) if options[3][4] else None
    return _Ready(loaded, _on_tensor_cores(shape, options), groups, sums)


def _ready_sums(channels: int, side: int, groups: int, index: int) -> driver.Loaded:
    return driver.Loaded(*plan_sums(channels, side, groups), range(_SUMS_ADDRESSES), index)


def _run(index: int, *launches: tuple[driver.Loaded, tuple[Tensor | None, ...]]) -> None:
    """Launches with the addresses of their tensors, in order, on the current stream of a device."""
    if driver.current_device() == index:
        _launch(driver.stream(index), launches)
    else:
        with torch.cuda.device(index):
            _launch(driver.stream(index), launches)


def _launch(stream: int, launches: Iterable[tuple[driver.Loaded, tuple[Tensor | None, ...]]]) -> None:
    for loaded, tensors in launches:
        loaded.run([0 if tensor is None else tensor.data_ptr() for tensor in tensors], stream)


def _channels_last(x: Tensor) -> Tensor:
    """Dense channels_last memory at an address of whole pairs of channels."""
    x = x.contiguous(memory_format=torch.channels_last)
    return x if x.data_ptr() % (2 * x.itemsize) == 0 else x.clone(memory_format=torch.channels_last)


def _aligned(x: Tensor) -> Tensor:
    """At an address of whole vectors of 16 bytes."""
    return x if x.data_ptr() % 16 == 0 else x.clone(memory_format=torch.channels_last)
