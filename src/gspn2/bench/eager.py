"""The operator as a careful user would write it in plain PyTorch: a vectorised loop over lines.

All directions advance together wherever their lines have the same length, so that the loop runs once over the
lines and every statement is one large tensor operation.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def propagate(x: Tensor, logits: Tensor, lam: Tensor | None, gate: Tensor | None) -> Tensor:
    """Four directions (down, up, right, left), shared taps: logits (B, 4, 1, 3, H, W)."""
    vertical, horizontal = slice(0, 2), slice(2, 4)
    pairs = [(_oriented(x, logits, lam, part, turned), part, turned) for part, turned in
             ((vertical, False), (horizontal, True))]  # fmt: skip
    if x.shape[2] == x.shape[3]:
        u = torch.cat([inputs[0] for inputs, _, _ in pairs], dim=1)
        w = torch.cat([inputs[1] for inputs, _, _ in pairs], dim=1)
        scanned = scan(u, w).split(2, dim=2)
    else:
        scanned = tuple(scan(*inputs) for inputs, _, _ in pairs)
    y = torch.zeros_like(x)
    for h, (_, part, turned) in zip(scanned, pairs, strict=True):
        image = _back(h, turned)
        y = y + (image if gate is None else image * gate[:, part]).sum(dim=1)
    return y


def _oriented(
    x: Tensor, logits: Tensor, lam: Tensor | None, part: slice, turned: bool
) -> tuple[Tensor, Tensor]:
    """u (B, 2, C, L, P) and w (B, 2, 1, 3, L, P) of a pair of opposite directions, in scan order."""
    u = x.unsqueeze(1).expand(-1, 2, -1, -1, -1) if lam is None else x.unsqueeze(1) * lam[:, part]
    a = logits[:, part]
    if turned:
        u, a = u.transpose(-2, -1), a.transpose(-2, -1)
    u = torch.stack((u[:, 0], u[:, 1].flip(-2)), dim=1)
    s = torch.sigmoid(torch.stack((a[:, 0], a[:, 1].flip(-2)), dim=1))
    exists = torch.ones(3, 1, s.shape[-1], dtype=s.dtype, device=s.device)
    exists[0, 0, 0] = exists[2, 0, -1] = 0
    s = s * exists
    return u, s / s.sum(dim=3, keepdim=True)


def scan(u: Tensor, w: Tensor) -> Tensor:
    """h (L, B, D, C, P) from u (B, D, C, L, P) and w (B, D, 1, 3, L, P)."""
    lines_u, lines_w = u.unbind(dim=3), w.unbind(dim=4)
    h = [lines_u[0]]
    for u_i, w_i in zip(lines_u[1:], lines_w[1:], strict=True):
        before = F.pad(h[-1], (1, 1))
        left, centre, right = w_i.unbind(dim=3)
        h.append(left * before[..., :-2] + centre * before[..., 1:-1] + right * before[..., 2:] + u_i)
    return torch.stack(h)


def _back(h: Tensor, turned: bool) -> Tensor:
    """(L, B, 2, C, P) in scan order to (B, 2, C, H, W) in image order."""
    image = h.movedim(0, 3)
    image = torch.stack((image[:, 0], image[:, 1].flip(-2)), dim=1)
    return image.transpose(-2, -1) if turned else image
