"""Line-scan propagation as functions of tensors: the public operator.

Arguments are checked here, once, by name; everything below trusts them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import ops
from .backends.problem import DIRECTIONS

STORAGE_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# torch.amp.is_autocast_available cannot be traced by torch.compile in PyTorch 2.11.
AUTOCAST_DEVICES = ("cpu", "cuda", "xpu", "mps", "hpu")


def propagate(
    x: Tensor,  # (B, C, H, W)
    logits: Tensor,  # (B, D, G, 3, H, W)
    lam: Tensor | None = None,  # (B, D, C, H, W)
    gate: Tensor | None = None,  # (B, D, C, H, W)
    *,
    directions: Sequence[str] = DIRECTIONS,
    chunk: int | None = None,
    backend: str | None = None,
    keep_hidden: bool = False,
) -> Tensor:  # (B, C, H, W)
    """Propagate an image line by line in several directions and sum the gated results.

    For every direction d, with i counting lines in scan order and j the place along the line::

        h[i, j] = sum over k in (-1, 0, 1) of w_k[i, j] * h[i-1, j+k]  +  lam[i, j] * x[i, j]
        w_k     = sigmoid(a_k) / sum over existing neighbours m of sigmoid(a_m)
        y       = sum over d of gate_d * h_d

    A missing neighbour has weight 0 and no share of the sum. Taps are in image order: left, centre, right
    neighbour for "down" and "up", upper, centre, lower for "right" and "left". (GSPN-2, arXiv 2512.07884:
    recurrence, stability-context condition, channel-shared affinity.)

    Args:
        x: input (B, C, H, W).
        logits: affinity logits a (B, D, G, 3, H, W), D in the order of `directions`. G divides C; channel c
            uses group c // (C / G): G = 1 shares the taps between all channels (GSPN-2), G = C gives every
            channel its own (GSPN-1).
        lam: input scale (B, D, C, H, W), or None for 1.
        gate: output gate (B, D, C, H, W), or None for 1.
        directions: the scans to run, each out of "down", "up", "right", "left", none twice.
        chunk: the state restarts at 0 every `chunk` lines, counted from the line where a direction starts;
            None for one scan over the whole image. The last segment may be short.
        backend: name of the implementation ("cuda", "cpu", "reference"); None for the fastest that takes the
            problem.
        keep_hidden: where a gradient will be asked for, forward leaves h of every direction, (B, D, C, H, W)
            in the dtype of x, for backward to read instead of computing it again: faster on large images, for
            D times the memory of x until backward has run. y is then formed from h as it was rounded. Only
            the CUDA backend gains by it; elsewhere, in float64, and for a single direction without gate
            (where y is h, and always kept) it changes nothing.

    Returns:
        y (B, C, H, W), with the dtype of x and, where x is dense, its strides. State and sums are float32
        (float64 for float64), rounded once.

    All tensors share a device and a dtype out of float32, bfloat16, float16, float64; under autocast they are
    cast to its dtype. Any strides are legal. Every tensor argument gets a gradient (first order).

    Raises:
        ValueError: a shape, device, direction, chunk or backend name is wrong.
        TypeError: an argument is no tensor, or its dtype is wrong.
        RuntimeError: the backend asked for cannot run the problem; the message says why.
    """
    _check_tensor("x", x, 4, "(B, C, H, W)")
    _check_tensor("logits", logits, 6, "(B, D, G, 3, H, W)")
    names = _check_directions(directions)
    batch, channels, height, width = x.shape
    _check_not_empty(channels, height, width)
    groups = logits.shape[2]
    _check_groups("logits", groups, channels)
    _check_shape("logits", logits, (batch, len(names), groups, 3, height, width), "(B, D, G, 3, H, W)")
    per_channel = (batch, len(names), channels, height, width)
    for name, tensor in (("lam", lam), ("gate", gate)):
        if tensor is not None:
            _check_tensor(name, tensor, 5, "(B, D, C, H, W)")
            _check_shape(name, tensor, per_channel, "(B, D, C, H, W)")
    _check_options(chunk, backend)
    x, logits, lam, gate = _follow_autocast(x, logits, lam, gate)
    _check_alike(x, ("logits", "lam", "gate"), (logits, lam, gate))
    run = ops.propagate_keeping if keep_hidden else ops.propagate
    return run(x, logits, lam, gate, names, chunk, True, backend)


def line_scan(
    x: Tensor,  # (B, C, H, W)
    lam: Tensor | None,  # (B, C, H, W)
    w: Tensor,  # (B, G, 3, H, W)
    *,
    direction: str,
    chunk: int | None = None,
    backend: str | None = None,
) -> Tensor:  # (B, C, H, W)
    """Propagate in one direction with the weights as given; returns the hidden state h.

    The recurrence of `propagate` for one direction, without normalisation, gate or sum: stability is the
    caller's matter. Weights of missing neighbours are never read and get gradient 0.

    Args:
        x: input (B, C, H, W).
        lam: input scale (B, C, H, W), or None for 1.
        w: taps (B, G, 3, H, W); G as for `propagate`.
        direction: "down", "up", "right" or "left".
        chunk, backend: as for `propagate`.

    Returns:
        h (B, C, H, W), in image order.

    Raises:
        ValueError, TypeError, RuntimeError: as for `propagate`.
    """
    _check_tensor("x", x, 4, "(B, C, H, W)")
    _check_tensor("w", w, 5, "(B, G, 3, H, W)")
    if not isinstance(direction, str):
        raise TypeError(f"direction: expected a str, got {type(direction).__name__}")
    names = _check_directions((direction,), "direction")
    batch, channels, height, width = x.shape
    _check_not_empty(channels, height, width)
    groups = w.shape[1]
    _check_groups("w", groups, channels)
    _check_shape("w", w, (batch, groups, 3, height, width), "(B, G, 3, H, W)")
    if lam is not None:
        _check_tensor("lam", lam, 4, "(B, C, H, W)")
        _check_shape("lam", lam, (batch, channels, height, width), "(B, C, H, W)")
    _check_options(chunk, backend)
    x, w, lam, _ = _follow_autocast(x, w, lam, None)
    _check_alike(x, ("w", "lam"), (w, lam))
    lam = None if lam is None else lam.unsqueeze(1)
    return ops.propagate(x, w.unsqueeze(1), lam, None, names, chunk, False, backend)


def _check_tensor(name: str, value: object, ndim: int, layout: str) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor {layout}, got {type(value).__name__}")
    if value.layout is not torch.strided:
        raise TypeError(f"{name}: expected a dense tensor {layout}, got one of layout {value.layout}")
    if value.ndim != ndim:
        raise ValueError(f"{name}: expected {ndim} dimensions {layout}, got shape {tuple(value.shape)}")


def _check_shape(name: str, tensor: Tensor, expected: tuple[int, ...], layout: str) -> None:
    if tensor.shape != expected:
        raise ValueError(f"{name}: expected {layout} = {tuple(expected)}, got {tuple(tensor.shape)}")


def _check_not_empty(channels: int, height: int, width: int) -> None:
    if channels == 0 or height == 0 or width == 0:
        raise ValueError(
            f"x: expected at least one channel, row and column, got C, H, W = {channels}, {height}, {width}"
        )


def _check_groups(name: str, groups: int, channels: int) -> None:
    if groups == 0 or channels % groups:
        raise ValueError(f"{name}: expected G to divide C = {channels}, got G = {groups}")


def _check_directions(directions: Sequence[str], name: str = "directions") -> tuple[str, ...]:
    # Their order is that of an axis: a set has none.
    if not isinstance(directions, Sequence):
        raise TypeError(f"{name}: expected a sequence of names, got {directions!r}")
    names = (directions,) if isinstance(directions, str) else tuple(directions)
    if not names:
        raise ValueError(f"{name}: expected at least one of {', '.join(DIRECTIONS)}, got none")
    for direction in names:
        if direction not in DIRECTIONS:
            raise ValueError(f"{name}: expected one of {', '.join(DIRECTIONS)}, got {direction!r}")
    if len(set(names)) != len(names):
        raise ValueError(f"{name}: expected no direction twice, got {names}")
    return names


def _check_options(chunk: int | None, backend: str | None) -> None:
    if backend is not None and not isinstance(backend, str):
        raise TypeError(f"backend: expected a str or None, got {type(backend).__name__}")
    if chunk is None:
        return
    # SymInt stands for a size under torch.compile.
    if isinstance(chunk, bool) or not isinstance(chunk, int | torch.SymInt):
        raise TypeError(f"chunk: expected an int or None, got {type(chunk).__name__}")
    if chunk < 1:
        raise ValueError(f"chunk: expected at least 1 line, got {chunk}")


def _check_alike(x: Tensor, names: tuple[str, ...], others: tuple[Tensor | None, ...]) -> None:
    """One storage dtype, one device."""
    dtype, device = x.dtype, x.device
    if dtype not in STORAGE_DTYPES:
        expected = ", ".join(str(dtype) for dtype in STORAGE_DTYPES)
        raise TypeError(f"x: expected dtype {expected}, got {dtype}")
    for name, tensor in zip(names, others, strict=True):
        if tensor is None:
            continue
        if tensor.dtype != dtype:
            raise TypeError(f"{name}: expected dtype {dtype} like x, got {tensor.dtype}")
        if tensor.device != device:
            raise ValueError(f"{name}: expected device {device} like x, got {tensor.device}")


def _follow_autocast(
    x: Tensor, taps: Tensor, lam: Tensor | None, gate: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Under autocast, cast to its dtype what autocast may cast: anything floating but float64."""
    device = x.device.type
    if device not in AUTOCAST_DEVICES or not torch.is_autocast_enabled(device):
        return x, taps, lam, gate
    dtype = torch.get_autocast_dtype(device)

    def cast(tensor: Tensor) -> Tensor:
        eligible = tensor.is_floating_point() and tensor.dtype != torch.float64
        return tensor.to(dtype) if eligible else tensor

    return (
        cast(x),
        cast(taps),
        None if lam is None else cast(lam),
        None if gate is None else cast(gate),
    )
