"""The mixer for token sequences: a drop-in where self-attention takes (B, N, C)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .mixer import Mixer


class TokenMixer(nn.Module):
    """A `Mixer` on tokens (B, N, dim) that lie on a grid (H, W) in row-major order.

    The grid is always given, never guessed from N. Tokens that are no pixels (class or register tokens) have
    no place on the grid, so they are refused unless announced by `prefix_tokens`; then the first
    `prefix_tokens` tokens are handed through as they came and take no part in the mixing (an open limitation
    of propagation).

    Args:
        dim: channels of a token.
        proxy_dim: channels that are propagated.
        prefix_tokens: tokens before the grid's to hand through untouched.
        mixer: further options of `Mixer`.
    """

    def __init__(self, dim: int, proxy_dim: int, *, prefix_tokens: int = 0, **mixer: Any) -> None:
        super().__init__()
        if isinstance(prefix_tokens, bool) or not isinstance(prefix_tokens, int):
            raise TypeError(f"prefix_tokens: expected an int, got {prefix_tokens!r}")
        if prefix_tokens < 0:
            raise ValueError(f"prefix_tokens: expected at least 0, got {prefix_tokens}")
        self.prefix_tokens = prefix_tokens
        self.mixer = Mixer(dim, proxy_dim, **mixer)

    def forward(
        self,
        x: Tensor,  # (B, N, dim)
        grid: tuple[int, int],
    ) -> Tensor:  # (B, N, dim)
        """Mix the tokens of a grid of H rows and W columns.

        Raises:
            ValueError: x is no (B, N, dim), or N is not prefix_tokens + H * W.
            TypeError: the grid is no pair of whole numbers.
        """
        if x.ndim != 3 or x.shape[2] != self.mixer.dim:
            raise ValueError(f"x: expected (B, N, {self.mixer.dim}), got shape {tuple(x.shape)}")
        # SymInt stands for a size under torch.compile.
        pair = isinstance(grid, Sequence) and len(grid) == 2
        if not pair or not all(isinstance(side, int | torch.SymInt) for side in grid):
            raise TypeError(f"grid: expected (H, W), two whole numbers, got {grid!r}")
        height, width = grid
        tokens = x.shape[1]
        if height < 1 or width < 1 or tokens != self.prefix_tokens + height * width:
            raise ValueError(
                f"grid: expected H * W = N - prefix_tokens = {tokens} - {self.prefix_tokens} ="
                f" {tokens - self.prefix_tokens}, got {height} x {width} = {height * width}"
                " (class or register tokens have to be announced by prefix_tokens)"
            )
        prefix, pixels = x[:, : self.prefix_tokens], x[:, self.prefix_tokens :]
        image = pixels.unflatten(1, (height, width)).permute(0, 3, 1, 2)
        mixed = self.mixer(image).permute(0, 2, 3, 1).flatten(1, 2)
        return torch.cat([prefix, mixed], dim=1) if self.prefix_tokens else mixed

    def extra_repr(self) -> str:
        return f"prefix_tokens={self.prefix_tokens}"
