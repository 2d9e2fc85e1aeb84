"""What class and register tokens get: their own rows of the self-attention that was swapped."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

# Names of the projections in an attention: query, key, value, and what comes after the sum.
_LAYOUTS: tuple[tuple[str, str, str, tuple[str, ...]], ...] = (
    ("q_proj", "k_proj", "v_proj", ("o_proj",)),
    ("q_proj", "k_proj", "v_proj", ("out_proj",)),
    ("attention.query", "attention.key", "attention.value", ("output.dense", "output.dropout")),
)


@dataclass(frozen=True)
class Readout:
    """The rows of a self-attention that belong to the first tokens.

    Queries of `prefix_tokens` tokens, keys and values of all: what the attention itself would give them, at a
    cost that grows with the number of tokens and not with its square.

    Args:
        query, key, value, output: dotted names of its projections.
        heads, scale, dropout: of the attention.
        rotate: turns keys by their positions, where the encoder does.
    """

    query: str
    key: str
    value: str
    output: tuple[str, ...]
    heads: int
    scale: float
    dropout: float
    rotate: Callable[..., tuple[Tensor, Tensor]] | None

    @staticmethod
    def of(attention: nn.Module) -> Readout:
        """Of a self-attention of transformers.

        Raises:
            ValueError: its projections have other names.
        """
        names = {name for name, _ in attention.named_modules()}
        for query, key, value, output in _LAYOUTS:
            if names.issuperset((query, key, value, output[0])):
                inner = attention.get_submodule(query.rpartition(".")[0])
                module = sys.modules[type(attention).__module__]
                return Readout(
                    query,
                    key,
                    value,
                    tuple(name for name in output if name in names),
                    heads=_number(inner, "num_attention_heads", "num_heads"),
                    scale=_number(inner, "scaling", "scale"),
                    dropout=_number(inner, "attention_dropout", "dropout_prob", "dropout"),
                    rotate=getattr(module, "apply_rotary_pos_emb", None),
                )
        shown = ", ".join(name for name, _ in attention.named_children())
        raise ValueError(
            f"readout: expected an attention with projections q_proj, k_proj, v_proj and o_proj, got a"
            f" {type(attention).__name__} of {shown}; take readout='average'"
        )

    def __call__(
        self, module: nn.Module, x: Tensor, prefix_tokens: int, positions: tuple[Tensor, Tensor] | None
    ) -> Tensor:
        """(B, N, C) -> (B, prefix_tokens, C).

        Args:
            module: holds the projections.
            x: tokens, those of the prefix first.
            positions: cosines and sines of the encoder's rotary position embedding.
        """
        query = self._heads(_part(module, self.query)(x[:, :prefix_tokens]))
        key = self._heads(_part(module, self.key)(x))
        value = self._heads(_part(module, self.value)(x))
        if self.rotate is not None and positions is not None:
            # Tokens of the prefix have no position: their queries stay as they are.
            key = self.rotate(key, key, *positions)[1]
        dropout = self.dropout if module.training else 0.0
        mixed = F.scaled_dot_product_attention(query, key, value, dropout_p=dropout, scale=self.scale)
        mixed = mixed.transpose(1, 2).flatten(2)
        for name in self.output:
            mixed = _part(module, name)(mixed)
        return mixed

    def _heads(self, x: Tensor) -> Tensor:
        """(B, N, heads * d) -> (B, heads, N, d)."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


def _part(module: Any, name: str) -> Any:
    """A submodule as it is now: adapters take a projection's place."""
    for part in name.split("."):
        module = module._modules[part]
    return module


def _number(module: nn.Module, *names: str) -> Any:
    """The first of the attributes that is a number."""
    return next(value for name in names if isinstance(value := getattr(module, name, None), int | float))
