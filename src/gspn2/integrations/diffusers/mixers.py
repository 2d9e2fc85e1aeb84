"""What stands in for self-attention, and the set of them for one UNet with its own config and weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from gspn2.functional import DIRECTIONS
from gspn2.nn import TokenMixer

GRID = "gspn2_grid"
"""The key in `cross_attention_kwargs` under which rows and columns of the token grid travel."""


class AttentionMixer(nn.Module):
    """A GSPN-2 mixer with the call of a self-attention of diffusers.

    Args:
        dim: channels of a token.
        proxy_dim: channels that are propagated.
        mixer: further options of `gspn2.nn.Mixer`.
    """

    def __init__(self, dim: int, proxy_dim: int, **mixer: Any) -> None:
        super().__init__()
        self.tokens = TokenMixer(dim, proxy_dim, **mixer)

    def forward(
        self,
        hidden_states: Tensor,  # (B, N, dim)
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **cross_attention_kwargs: Any,
    ) -> Tensor:  # (B, N, dim)
        """Mix the tokens of the grid that `cross_attention_kwargs` tells.

        What else is in there is meant for the cross-attention: a self-attention ignores it, too.

        Raises:
            ValueError: there is no grid, or a mask or tokens of another sequence came.
        """
        grid = cross_attention_kwargs.get(GRID)
        if grid is None:
            raise ValueError(
                f"cross_attention_kwargs: expected the token grid under {GRID!r}, got none; the block was"
                " called without the Transformer2DModel around it, whose hook hands the grid down"
            )
        if attention_mask is not None:
            raise ValueError("attention_mask: expected None, propagation cannot leave tokens out")
        if encoder_hidden_states is not None:
            raise ValueError("encoder_hidden_states: expected None, a mixer replaces self-attention only")
        return self.tokens(hidden_states, grid)

    def zero_output(self) -> None:
        """Make the output 0, whatever comes in, until training changes that."""
        projection = self.tokens.mixer.from_proxy
        nn.init.zeros_(projection.weight)
        if projection.bias is not None:
            nn.init.zeros_(projection.bias)


class UNetMixers(ModelMixin, ConfigMixin):
    """The mixers of one UNet, under the names that the self-attentions have there.

    A diffusers model of its own: `save_pretrained` writes `config.json` and a safetensors file with these
    weights only, `from_pretrained` reads them. It is not called; `mount` puts its parts into a UNet.

    Args:
        layers: for the name of each self-attention (`down_blocks.1.attentions.0.transformer_blocks.0.attn1`)
            its `dim` and `proxy_dim`.
        groups, directions, chunk, operands_from, lam, gate, bias: as for `gspn2.nn.Mixer`.
        zero_output: start with outputs of 0.
    """

    @register_to_config
    def __init__(
        self,
        layers: Mapping[str, Mapping[str, int]],
        groups: int = 1,
        directions: Sequence[str] = DIRECTIONS,
        chunk: int | None = None,
        operands_from: str = "proxy",
        lam: bool = True,
        gate: bool = True,
        bias: bool = True,
        zero_output: bool = True,
    ) -> None:
        super().__init__()
        if not layers:
            raise ValueError("layers: expected at least one self-attention, got none")
        for name, sizes in layers.items():
            mixer = AttentionMixer(
                sizes["dim"],
                sizes["proxy_dim"],
                groups=groups,
                directions=tuple(directions),
                chunk=chunk,
                operands_from=operands_from,
                lam=lam,
                gate=gate,
                bias=bias,
            )
            if zero_output:
                mixer.zero_output()
            _place(self, name, mixer)

    def layers(self) -> Iterator[tuple[str, AttentionMixer]]:
        """Names and mixers, in the order of the UNet."""
        for name in self.config.layers:
            yield name, self.get_submodule(name)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
        """Read a folder that `save_pretrained` wrote; options as for any diffusers model.

        Raises:
            ValueError: a weight is missing, has another shape, or belongs to no layer.
            OSError: no such folder, or not one of ours.
        """
        asked = kwargs.pop("output_loading_info", False)
        model, info = super().from_pretrained(
            pretrained_model_name_or_path, output_loading_info=True, **kwargs
        )
        for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
            if info[kind]:
                shown = ", ".join(str(key) for key in sorted(info[kind], key=str)[:3])
                raise ValueError(
                    f"{pretrained_model_name_or_path}: expected exactly the weights that its config"
                    f" describes, got {len(info[kind])} {kind.replace('_', ' ')}: {shown}"
                )
        return (model, info) if asked else model


def _place(root: nn.Module, name: str, module: nn.Module) -> None:
    """Register a module under a dotted name, with containers on the way."""
    *path, last = name.split(".")
    for part in path:
        if part not in root._modules:
            root.add_module(part, nn.Module())
        root = root.get_submodule(part)
    root.add_module(last, module)
