"""What stands in for self-attention, and the set of them for one encoder with its own config and weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel

from gspn2.functional import DIRECTIONS
from gspn2.nn import TokenMixer
from gspn2.nn.mixer import INITIAL_TURNS

from ..swapping import check_loaded, move_into_place, place, zero_output
from .readout import Readout

GRID = "gspn2_grid"
"""The keyword argument under which the token grid travels."""
READOUTS = ("attention", "average")
_TYPE = "gspn2_vision_mixers"


class AttentionMixer(nn.Module):
    """A GSPN-2 mixer with the call of a self-attention of transformers, in its place in an encoder.

    Tokens of the grid are mixed by propagation. Class, distillation and register tokens have no place on a
    grid, so they take no part in that; what they get is up to `readout`. Tokens of the grid get nothing from
    them.

    Args:
        mixer: of the tokens of the grid.
        attention: what it stands in for. A state dict has its weights under the names that they had; only
            those that a readout uses are parameters.
        prefix_tokens: tokens before those of the grid.
        readout: "attention", the tokens of the prefix attend to all tokens by the projections of `attention`;
            "average", each of them gets the average of the mixed tokens.
    """

    _replaced: nn.Module

    def __init__(
        self, mixer: TokenMixer, attention: nn.Module, prefix_tokens: int = 0, readout: str = "attention"
    ) -> None:
        super().__init__()
        self.prefix_tokens = prefix_tokens
        self.reads = Readout.of(attention) if prefix_tokens and readout == "attention" else None
        # Those that are nested return their output alone, the others a pair.
        self._bare = isinstance(attention._modules.get("attention"), nn.Module)
        # Past nn.Module's own __setattr__: nothing of it that does not run is to be trained or moved.
        self.__dict__["_replaced"] = attention
        for name, child in attention.named_children():
            if self.reads is not None:
                self.add_module(name, child)
            else:
                # Names in the state dict lead somewhere: checkpoints of sharded models look them up.
                self.__dict__[name] = child
        self.mixer = mixer

    def forward(
        self,
        hidden_states: Tensor,  # (B, N, dim)
        attention_mask: Tensor | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Mix the tokens of the grid that comes as `gspn2_grid`.

        The mask of padding is known from the grids already, other masks the encoder's hook refuses.

        Returns:
            (B, N, dim), in a pair with None for the attention maps where the attention returned a pair. Where
            there is padding it is 0.

        Raises:
            ValueError: there is no grid, or not one of so many tokens.
        """
        grid = kwargs[GRID] if GRID in kwargs else getattr(self, GRID, None)
        if grid is None:
            raise ValueError(
                f"{GRID}: expected the token grid, got none; the layer was called without the encoder around"
                " it, whose hook hands the grid down"
            )
        patches = hidden_states[:, self.prefix_tokens :] if self.prefix_tokens else hidden_states
        mixed = self.mixer(patches, grid) if isinstance(grid, tuple) else self._each(patches, grid)
        if self.reads is not None:
            read = self.reads(self, hidden_states, self.prefix_tokens, position_embeddings)
            mixed = torch.cat([read, mixed], dim=1)
        elif self.prefix_tokens:
            average = mixed.mean(dim=1, keepdim=True)
            mixed = torch.cat([average.expand(-1, self.prefix_tokens, -1), mixed], dim=1)
        return mixed if self._bare else (mixed, None)

    def _each(self, x: Tensor, grids: list[tuple[int, int]]) -> Tensor:
        """Images of several grids, padded to one number of tokens: those of one grid are mixed together."""
        rows: list[Tensor] = [x.new_empty(0)] * len(grids)
        for height, width in dict.fromkeys(grids):
            chosen = [i for i, grid in enumerate(grids) if grid == (height, width)]
            tokens = height * width
            images = torch.stack([x[i, :tokens] for i in chosen])
            mixed = F.pad(self.mixer(images, (height, width)), (0, 0, 0, x.shape[1] - tokens))
            for i, row in zip(chosen, mixed.unbind(0), strict=True):
                rows[i] = row
        return torch.stack(rows)

    def released(self) -> nn.Module:
        """The attention, with what has taken the place of its projections since."""
        attention: nn.Module = self._replaced
        if self.reads is not None:
            for name, child in self.named_children():
                if child is not self.mixer:
                    attention.add_module(name, child)
        return attention

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        """With the weights that do not run: what is saved can be loaded without gspn2."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.reads is None:
            self._replaced.state_dict(destination=destination, prefix=prefix, keep_vars=keep_vars)

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Mapping[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        rest = dict(state_dict)
        if self.reads is None:
            names = [name for name in self._replaced.state_dict() if prefix + name in rest]
            given = {name: rest.pop(prefix + name) for name in names}
            assign = local_metadata.get("assign_to_params_buffers", False)
            try:
                missing = self._replaced.load_state_dict(given, strict=False, assign=assign).missing_keys
                missing_keys += [prefix + name for name in missing] if strict else []
            except RuntimeError as error:
                error_msgs.append(f"{prefix}: {error}")
        super()._load_from_state_dict(
            rest, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def extra_repr(self) -> str:
        text = f"in place of {type(self._replaced).__name__}"
        if self.prefix_tokens:
            readout = "average" if self.reads is None else "attention"
            text += f", prefix_tokens={self.prefix_tokens}, readout={readout!r}"
        return text


class VisionMixersConfig(PreTrainedConfig):
    """What mixers of one encoder are like.

    Args:
        layers: for the name of each self-attention in its encoder (`encoder.layers.0.self_attn`) its `dim`
            and `proxy_dim`.
        readout: what class, distillation and register tokens get (`AttentionMixer`).
        groups, directions, chunk, operands_from, lam, gate, bias: as for `gspn2.nn.Mixer`.
        zero_output: start with outputs of 0.
    """

    model_type = _TYPE

    def __init__(
        self,
        layers: Mapping[str, Mapping[str, int]] | None = None,
        readout: str = "attention",
        groups: int = 1,
        directions: Sequence[str] = DIRECTIONS,
        chunk: int | None = None,
        operands_from: str = "proxy",
        lam: bool = True,
        gate: bool = True,
        bias: bool = True,
        zero_output: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.layers = {name: dict(sizes) for name, sizes in (layers or {}).items()}
        self.readout = readout
        self.groups = groups
        self.directions = list(directions)
        self.chunk = chunk
        self.operands_from = operands_from
        self.lam = lam
        self.gate = gate
        self.bias = bias
        self.zero_output = zero_output

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Of what a file tells; options as for any config of transformers.

        Raises:
            ValueError: it is the config of another model, or of none.
        """
        kind = config_dict.get("model_type")
        if kind != _TYPE:
            found = "no config.json of a model is there" if kind is None else "this is another model's config"
            raise ValueError(f"model_type: expected {_TYPE!r}, got {kind!r}: {found}")
        return super().from_dict(config_dict, **kwargs)


OPTIONS = (
    *("readout", "groups", "directions", "chunk", "operands_from", "lam", "gate", "bias", "zero_output"),
)
"""Of `VisionMixersConfig`, for fresh mixers."""


class VisionMixers(PreTrainedModel):
    """The mixers of one vision encoder, under the names that the self-attentions have there.

    A transformers model of its own: `save_pretrained` writes `config.json` and a safetensors file with these
    weights only; `from_pretrained`, that of `AutoModel` as well, reads them. It is not called; `mount` puts
    its parts into a model. Names are those inside of the encoder: mixers that were trained on the encoder fit
    into a model around it.

    Raises:
        ValueError: the config has no layers, or no such readout.
    """

    config_class = VisionMixersConfig
    main_input_name = "pixel_values"
    input_modalities = ("image",)

    def __init__(self, config: VisionMixersConfig) -> None:
        super().__init__(config)
        # A module of their own: names of encoders are those of attributes here, too.
        self.mixers = nn.Module()
        if not config.layers:
            raise ValueError("layers: expected at least one self-attention, got none")
        if config.readout not in READOUTS:
            raise ValueError(f"readout: expected one of {', '.join(READOUTS)}, got {config.readout!r}")
        for number, (name, sizes) in enumerate(config.layers.items()):
            mixer = TokenMixer(
                sizes["dim"],
                sizes["proxy_dim"],
                groups=config.groups,
                directions=tuple(config.directions),
                chunk=config.chunk,
                operands_from=config.operands_from,
                lam=config.lam,
                gate=config.gate,
                bias=config.bias,
                initial_taps=INITIAL_TURNS[number % len(INITIAL_TURNS)],
            )
            if config.zero_output:
                zero_output(mixer.mixer)
            place(self.mixers, name, mixer)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Mixers have their initial weights from their own constructors."""

    def layers(self) -> Iterator[tuple[str, TokenMixer]]:
        """Names and mixers."""
        for name in self.config.layers:
            yield name, self.of(name)

    def of(self, name: str) -> TokenMixer:
        """The mixer for the self-attention of that name."""
        mixer = self.mixers.get_submodule(name)
        assert isinstance(mixer, TokenMixer)
        return mixer

    def save_pretrained(self, save_directory: Any, **kwargs: Any) -> Any:
        """Write config and weights, each file whole or not at all; options as for any transformers model."""
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        if kwargs.get("push_to_hub"):
            kwargs.setdefault("repo_id", folder.name)
        with TemporaryDirectory(dir=folder, prefix=".", suffix=".tmp") as temporary:
            told = super().save_pretrained(temporary, **kwargs)
            # The config last: a folder that has one has all that it describes.
            written = sorted(Path(temporary).iterdir(), key=lambda path: path.name == "config.json")
            for file in written:
                move_into_place(file, folder / file.name)
        return told

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Read a folder that `save_pretrained` wrote; options as for any transformers model.

        Raises:
            ValueError: a weight is missing, has another shape, or belongs to no layer; or it is the folder of
                another model.
            OSError: no such folder, or not one of transformers.
        """
        asked = kwargs.pop("output_loading_info", False)
        kwargs["ignore_mismatched_sizes"] = True  # they are told of below, like all that does not fit
        model, info = super().from_pretrained(
            pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs
        )
        check_loaded(info, pretrained_model_name_or_path)
        return (model, info) if asked else model


AutoConfig.register(_TYPE, VisionMixersConfig, exist_ok=True)
AutoModel.register(VisionMixersConfig, VisionMixers, exist_ok=True)
