"""What stands in for self-attention, and the set of them for one UNet with its own config and weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from types import NoneType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn
from torch.nn import Parameter

from gspn2.functional import DIRECTIONS
from gspn2.nn import Mixer, Pointwise, TokenMixer
from gspn2.nn.layers import is_bare
from gspn2.nn.mixer import INITIAL_TURNS
from gspn2.ops.eager import plain

from ..swapping import check_loaded, place, zero_output
from .scan import Geometry, Size, propagate

_VECTOR = 8
"""Elements of 16 bits in 16 bytes: pixels begin where vectors do."""
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
        self._fixed = False
        self._kept: dict[tuple[int, int], tuple[Any, Prepared]] = {}

    @property
    def fixed(self) -> bool:
        """The weights will not change any more, and a CUDA graph may read what was made from them."""
        return self._fixed

    @fixed.setter
    def fixed(self, value: bool) -> None:
        if value and not self._fixed:
            state = self._state()
            self._kept = {size: kept for size, kept in self._kept.items() if kept[0] == state}
        self._fixed = value

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
        if self._quick(hidden_states):
            return self._inference(hidden_states, grid)
        return self.tokens(hidden_states, grid)

    def _parts(self) -> tuple[Any, Any, Any, Any]:
        """The mixer and its projections, past `nn.Module.__getattr__`, which takes longer than a check."""
        mixer: Any = self._modules["tokens"]._modules["mixer"]  # type: ignore[union-attr]
        parts = mixer._modules
        return mixer, parts["to_proxy"], parts["to_operands"], parts["from_proxy"]

    def _quick(self, x: Tensor) -> bool:
        """Can `_inference` stand for the mixer: no gradients, and nothing that has to see its parts?"""
        if torch.is_grad_enabled() or not x.is_cuda or not plain(x):
            return False
        tokens: Any = self._modules["tokens"]
        mixer, *projections = self._parts()
        merge = mixer._parameters["merge"]
        return (
            type(merge) is Parameter
            and x.dtype == merge.dtype
            and x.is_contiguous()
            and mixer.operands_from == "proxy"
            and all(mixer.sizes)
            and is_bare(mixer)
            and is_bare(tokens)
            and _bare(projections[0])
            and _bare(projections[1])
            and _bare(projections[2])
            and not torch.is_autocast_enabled("cuda")
        )

    def _inference(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """The mixer in four launches: at small sizes a step waits for the host, which is to be no slower with
        mixers than with attention."""
        mixer, _, _, from_proxy = self._parts()
        height, width = grid
        if x.shape[1] != height * width:
            return self.tokens(x, grid)  # which says what is wrong
        ready = self._prepared(height, width)
        proxy = F.linear(x, ready.to_proxy, ready.proxy_bias)
        packed = F.linear(proxy, ready.to_operands)
        mixed = propagate(proxy, packed, ready.geometry, Size(x.shape[0], height, width), mixer.backend)
        return F.linear(mixed, from_proxy._parameters["weight"], from_proxy._parameters["bias"])

    def _prepared(self, height: int, width: int) -> Prepared:
        """What a size and `merge` make of the weights, kept for as long as those are the same."""
        kept = self._kept.get((height, width))
        if self._fixed and kept is not None:
            return kept[1]
        mixer, state = self._parts()[0], self._state()
        capturing = mixer._parameters["merge"].is_cuda and torch.cuda.is_current_stream_capturing()
        # A graph has to own what it reads and to see weights that were changed.
        if state is None or (capturing and not self._fixed):
            return Prepared.of(mixer, height, width)
        if kept is None or kept[0] != state:
            if not self._fixed:
                self._kept.clear()
            kept = self._kept[height, width] = state, Prepared.of(mixer, height, width)
        return kept[1]

    def _state(self) -> Any:
        """What changes with the weights; None for tensors of inference mode, which do not tell."""
        mixer, to_proxy, to_operands, _ = self._parts()
        sources = [
            mixer._parameters["merge"],
            *to_proxy._parameters.values(),
            *to_operands._parameters.values(),
        ]
        if any(it is not None and it.is_inference() for it in sources):
            return None
        return mixer.chunk, [None if it is None else (it._version, it.data_ptr(), it.dtype) for it in sources]

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_kept": {}}

    def zero_output(self) -> None:
        """Make the output 0, whatever comes in, until training changes that."""
        zero_output(self.tokens.mixer)


class Prepared(NamedTuple):
    """The projections of a mixer at a size, so that only the first of them has a bias.

    Its output has a column of ones, whose weights are the biases of the operands: cuBLAS takes up to twice as
    long for a product of so few columns if it has to add a bias.

    Args:
        to_proxy: (geometry.proxy, dim).
        proxy_bias: (geometry.proxy,).
        to_operands: (geometry.record, geometry.proxy), the gate's rows scaled by `merge` and the size.
        geometry: of the propagation.
    """

    to_proxy: Tensor
    proxy_bias: Tensor
    to_operands: Tensor
    geometry: Geometry

    @staticmethod
    def of(mixer: Mixer, height: int, width: int) -> Prepared:
        """From the weights as they are now."""
        operands, biases = mixer._operand_rows(mixer._merge(height, width))
        channels = mixer.proxy_dim
        more = 1 + -(channels + 1) % _VECTOR
        weight, bias = mixer.to_proxy.weight, mixer.to_proxy.bias
        bias = weight.new_zeros(channels) if bias is None else bias
        ones = F.pad(bias.new_ones(1), (0, more - 1))
        geometry = Geometry(
            channels, mixer.groups, mixer.directions, mixer.chunk, channels + more, operands.shape[0]
        )
        return Prepared(
            F.pad(weight, (0, 0, 0, more)),
            torch.cat([bias, ones]),
            F.pad(torch.cat([operands, biases[:, None]], dim=1), (0, more - 1)),
            geometry,
        )


def _bare(projection: nn.Module) -> bool:
    """Is its product all there is to it: no adapter in its place, no parametrization, no hooks?"""
    weights = projection._parameters
    return (
        type(projection) is Pointwise
        and is_bare(projection)
        and type(weights["weight"]) is Parameter
        and type(weights["bias"]) in (Parameter, NoneType)
    )


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
        for number, (name, sizes) in enumerate(layers.items()):
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
                initial_taps=INITIAL_TURNS[number % len(INITIAL_TURNS)],
            )
            if zero_output:
                mixer.zero_output()
            place(self, name, mixer)

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
        check_loaded(info, pretrained_model_name_or_path)
        return (model, info) if asked else model
