"""The reference: line-scan propagation in plain PyTorch, one statement for each line of the maths.

Ground truth of every test and the fallback on devices without a kernel. Any floating dtype, any device, any
strides. The forward functions are differentiable by autograd; the adjoint is written out as well, because a
custom operator needs it and because it documents what every kernel has to compute (`docs/math.md`).

Shapes: x (B, C, H, W), taps (B, D, G, 3, H, W), lam and gate (B, D, C, H, W) or None. Inside, an image is
turned so that lines come first in scan order: (L, ..., P) with L lines of P places.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .keeping import states_of
from .problem import Problem, accumulation_dtype

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]


def why_not(problem: Problem) -> str | None:
    """The reference takes every problem."""
    return None


def lines_first(image: Tensor, direction: str) -> Tensor:
    """(..., H, W) -> (L, ..., P): lines in scan order, places along a line in image order."""
    lines = image if direction in ("down", "up") else image.transpose(-2, -1)
    if direction in ("up", "left"):
        lines = lines.flip(-2)
    return lines.movedim(-2, 0)


def lines_back(lines: Tensor, direction: str) -> Tensor:
    """Inverse of `lines_first`: (L, ..., P) -> (..., H, W)."""
    image = lines.movedim(0, -2)
    if direction in ("up", "left"):
        image = image.flip(-2)
    return image if direction in ("down", "up") else image.transpose(-2, -1)


def neighbour_exists(places: int, device: torch.device) -> Tensor:
    """(3, P) mask: does place j have the neighbour j - 1, j, j + 1?"""
    exists = torch.ones(3, places, dtype=torch.bool, device=device)
    exists[0, 0] = exists[2, -1] = False
    return exists


def tap_weights(logits: Tensor) -> Tensor:
    """Logits (..., 3, P) -> row-stochastic weights; a missing neighbour has weight 0 and no share of the sum.

    w_k = sigmoid(a_k) / sum over existing m of sigmoid(a_m), written as a softmax of log-sigmoids: the same
    number, and no 0 / 0 where all three logits are very negative.
    """
    exists = neighbour_exists(logits.shape[-1], logits.device)
    return F.logsigmoid(logits).masked_fill(~exists, -torch.inf).softmax(dim=-2)


def given_weights(w: Tensor) -> Tensor:
    """Weights (..., 3, P) as given, with those of missing neighbours (which must never be read) set to 0."""
    return w.masked_fill(~neighbour_exists(w.shape[-1], w.device), 0)


def from_neighbours(w: Tensor, h: Tensor) -> Tensor:
    """sum_k w_k[j] h[j + k] for w (B, G, 1, 3, P) and the previous line h (B, G, C/G, P)."""
    padded = F.pad(h, (1, 1))
    return w[..., 0, :] * padded[..., :-2] + w[..., 1, :] * padded[..., 1:-1] + w[..., 2, :] * padded[..., 2:]


def to_neighbours(w: Tensor, g: Tensor) -> Tensor:
    """Adjoint of `from_neighbours` in h: place j hands w_k[j] g[j] to place j + k of the previous line."""
    return (
        F.pad(w[..., 0, :] * g, (0, 1))[..., 1:]
        + w[..., 1, :] * g
        + F.pad(w[..., 2, :] * g, (1, 0))[..., :-1]
    )


def scan_lines(u: Tensor, w: Tensor, chunk: int | None) -> Tensor:
    """h_i = w_i h_(i-1) + u_i over lines: u (L, B, G, C/G, P), w (L, B, G, 1, 3, P) -> h like u."""
    hidden: list[Tensor] = []
    # Taken apart at once: autograd would fill a whole tensor for the gradient of every line.
    for i, (u_i, w_i) in enumerate(zip(u.unbind(), w.unbind(), strict=True)):
        restart = i == 0 or (chunk is not None and i % chunk == 0)
        hidden.append(u_i if restart else from_neighbours(w_i, hidden[-1]) + u_i)
    return torch.stack(hidden)


def scan_direction(
    x: Tensor, taps: Tensor, lam: Tensor | None, direction: str, chunk: int | None, normalize: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """One direction: x (B, C, H, W), taps (B, G, 3, H, W), lam (B, C, H, W).

    Returns h and u = lam x, both (L, B, G, C/G, P), and the weights (L, B, G, 1, 3, P), in the accumulation
    dtype.
    """
    dtype = accumulation_dtype(x.dtype)
    groups = taps.shape[1]
    # (L, B, G, 3, P): the tap axis stays next to the places.
    a = lines_first(taps.to(dtype), direction)
    w = (tap_weights(a) if normalize else given_weights(a)).unsqueeze(3)
    u = x.to(dtype) if lam is None else x.to(dtype) * lam.to(dtype)
    u = lines_first(u, direction).unflatten(2, (groups, -1))
    return scan_lines(u, w, chunk), u, w


def propagate(x: Tensor, taps: Tensor, lam: Tensor | None, gate: Tensor | None, problem: Problem) -> Tensor:
    """y = sum over directions of gate_d h_d, rounded to the dtype of x once."""
    y = torch.zeros(x.shape, dtype=accumulation_dtype(x.dtype), device=x.device)
    if x.numel() == 0:
        return torch.empty_like(x)
    for d, direction in enumerate(problem.directions):
        lam_d = None if lam is None else lam[:, d]
        h, _, _ = scan_direction(x, taps[:, d], lam_d, direction, problem.chunk, problem.normalize)
        h = lines_back(h.flatten(2, 3), direction)
        y = y + (h if gate is None else h * gate[:, d].to(h.dtype))
    return torch.empty_like(x).copy_(y)


def propagate_keeping(
    x: Tensor, taps: Tensor, lam: Tensor | None, gate: Tensor | None, problem: Problem
) -> tuple[Tensor, Tensor]:
    """y, and h (B, D, C, H, W) of every direction as it is rounded to storage, laid out by `empty_states`.

    A backend may form y from the states as they were rounded; this one does not.
    """
    return propagate(x, taps, lam, gate, problem), states_of(propagate, x, taps, lam, problem)


def propagate_backward(
    dy: Tensor,
    x: Tensor,
    taps: Tensor,
    lam: Tensor | None,
    gate: Tensor | None,
    problem: Problem,
    needs: tuple[bool, bool, bool, bool],
    hidden: Tensor | None = None,
) -> Gradients:
    """Gradients of sum(y dy) in x, taps, lam and gate; None where `needs` says so or the input is None.

    hidden: h rounded to storage. Either what `propagate_keeping` left, (B, D, C, H, W), or for a single
    direction without gate y as forward returned it. A backend may use it instead of computing h again; this
    one does not.
    """
    dtype = accumulation_dtype(x.dtype)
    dx = torch.zeros(x.shape, dtype=dtype, device=x.device)
    dtaps = torch.empty_like(taps) if needs[1] else None
    dlam = torch.empty_like(lam) if lam is not None and needs[2] else None
    dgate = torch.empty_like(gate) if gate is not None and needs[3] else None
    if x.numel() == 0:
        return (torch.empty_like(x) if needs[0] else None), dtaps, dlam, dgate
    for d, direction in enumerate(problem.directions):
        lam_d = None if lam is None else lam[:, d]
        h, _, w = scan_direction(x, taps[:, d], lam_d, direction, problem.chunk, problem.normalize)
        dh = dy.to(dtype) if gate is None else dy.to(dtype) * gate[:, d].to(dtype)
        g, dw = scan_lines_adjoint(lines_first(dh, direction).unflatten(2, h.shape[2:4]), h, w, problem.chunk)
        if dtaps is not None:
            if problem.normalize:
                dw = tap_weights_adjoint(dw, w.squeeze(3), lines_first(taps[:, d].to(dtype), direction))
            dtaps[:, d] = lines_back(dw, direction)
        g = lines_back(g.flatten(2, 3), direction)
        dx += g if lam_d is None else g * lam_d.to(dtype)
        if dlam is not None:
            dlam[:, d] = g * x.to(dtype)
        if dgate is not None:
            dgate[:, d] = lines_back(h.flatten(2, 3), direction) * dy.to(dtype)
    return (torch.empty_like(x).copy_(dx) if needs[0] else None), dtaps, dlam, dgate


def scan_lines_adjoint(dh: Tensor, h: Tensor, w: Tensor, chunk: int | None) -> tuple[Tensor, Tensor]:
    """Adjoint of `scan_lines`: dh, h (L, B, G, C/G, P), w (L, B, G, 1, 3, P).

    Returns g = dL/du, which is also the whole gradient that reaches h_i, and dw (L, B, G, 3, P), summed over
    the channels of a group.
    """
    g = torch.empty_like(dh)
    dw = torch.zeros(w.shape[:3] + w.shape[4:], dtype=w.dtype, device=w.device)
    carried = torch.zeros_like(dh[0])
    for i in reversed(range(dh.shape[0])):
        g[i] = dh[i] + carried
        if i == 0 or (chunk is not None and i % chunk == 0):
            carried = torch.zeros_like(carried)
            continue
        previous = F.pad(h[i - 1], (1, 1))
        shifted = torch.stack((previous[..., :-2], previous[..., 1:-1], previous[..., 2:]), dim=-2)
        dw[i] = (g[i].unsqueeze(-2) * shifted).sum(dim=2)
        carried = to_neighbours(w[i], g[i])
    return g, dw.masked_fill(~neighbour_exists(dw.shape[-1], dw.device), 0)


def tap_weights_adjoint(dw: Tensor, w: Tensor, logits: Tensor) -> Tensor:
    """dL/da_k = w_k (1 - sigmoid(a_k)) (dw_k - sum_m w_m dw_m), all (..., 3, P); 0 for missing neighbours."""
    mean = (w * dw).sum(dim=-2, keepdim=True)
    # sigmoid(-a) is 1 - sigmoid(a) without the cancellation.
    dlogits = w * torch.sigmoid(-logits) * (dw - mean)
    return dlogits.masked_fill(~neighbour_exists(w.shape[-1], w.device), 0)
