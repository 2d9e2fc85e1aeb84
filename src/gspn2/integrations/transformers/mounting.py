"""Swapping the self-attentions of a vision encoder for mixers, and back.

A mixer needs rows and columns of its tokens, and a layer only sees (B, N, C). A pre-hook on the encoder,
which still sees the image, adds them to the keyword arguments that encoders hand on to their layers: an
argument, not a state, so that whoever runs a layer again (gradient checkpointing) or traces it
(`torch.compile`) gets the grid of that very call.

Some encoders of older versions of transformers hand nothing on. Their layers take the grid at their call,
before checkpointing binds the arguments, and give it to the attention just before they run.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from ..swapping import check_fit, sizes
from .encoders import Encoder, Patches, Place, grid_of
from .mixers import GRID, OPTIONS, AttentionMixer, VisionMixers, VisionMixersConfig

_MOUNT = "_gspn2_mount"
_CAPTURING = "_output_capturing_hooks_installed"


@dataclass
class _Mount:
    """What the hooks and `unmount` need; kept on the encoder, out of its modules and weights."""

    mixers: VisionMixers
    arguments: tuple[str, ...]
    patches: Patches | None
    places: list[Place] = field(default_factory=list)
    # Names, not modules: replicas that `nn.DataParallel` makes of a model share this with it.
    deaf: list[str] = field(default_factory=list)
    dtypes: list[torch.dtype] = field(default_factory=list)
    hooks: list[RemovableHandle] = field(default_factory=list)


def mount(
    model: nn.Module, mixers: VisionMixers | None = None, *, proxy_ratio: int = 8, **options: Any
) -> VisionMixers:
    """Replace every self-attention of a vision encoder by a GSPN-2 mixer, in place.

    Args:
        model: a vision encoder of transformers (ViT, DeiT, I-JEPA, DINOv2, DINOv3, CLIP, SigLIP, SigLIP2), or
            a model with one inside: a classifier, CLIP as a whole, a language model that sees. Everything
            else stays, text and pooling heads among it.
        mixers: trained mixers (`VisionMixers.from_pretrained`); None makes fresh ones, with `options`. Each
            is moved to the device and dtype of the attention whose place it takes.
        proxy_ratio: channels of the encoder over propagated ones, for fresh mixers.
        options: of `VisionMixersConfig`, for fresh mixers. Their output is 0 unless zero_output=False is
            given.

    Returns:
        The mixers that are now part of `model`: train them, or save them by `save_pretrained`. The state dict
        of the model has them, too, beside the weights of the attentions: what `model.save_pretrained` writes
        can be loaded with and without mixers.

    Raises:
        TypeError: no module, no `VisionMixers`, or an option that there is not.
        ValueError: the model has mixers, has no encoder whose attention can be swapped, or the given mixers
            do not fit it. Nothing has been changed.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a model of transformers, got {type(model).__name__}")
    if not isinstance(mixers, VisionMixers | None):
        raise TypeError(
            "mixers: expected VisionMixers, as VisionMixers.from_pretrained reads them, got"
            f" {type(mixers).__name__}"
        )
    if is_mounted(model):
        raise ValueError("model: mixers are mounted already; unmount them first")
    encoder = Encoder(model)
    dims = {name: place.dim for name, place in encoder.places.items()}
    if mixers is None:
        mixers = _fresh(encoder, sizes(dims, proxy_ratio), options)
    elif options:
        raise ValueError(f"{next(iter(options))}: given mixers bring their own options")
    check_fit(dims, mixers.config.layers, "encoder")
    mounted = {
        name: AttentionMixer(mixers.of(name), place.attention, encoder.prefix_tokens, mixers.config.readout)
        for name, place in encoder.places.items()
    }
    # All of what may fail comes before the first change.
    for name, place in encoder.places.items():
        like = _like(place)
        mounted[name].mixer.to(device=like.device, dtype=like.dtype)
    kept = _Mount(mixers, encoder.arguments, encoder.patches)
    for name, place in encoder.places.items():
        _swap(kept, name, place, mounted[name])
    kept.hooks.append(encoder.module.register_forward_pre_hook(_hand_down_grid, with_kwargs=True))
    if kept.deaf:
        kept.hooks.append(encoder.module.register_forward_hook(_forget_grid))
    # Past nn.Module's own __setattr__: the mixers must not become weights of the encoder twice.
    encoder.module.__dict__[_MOUNT] = kept
    return mixers


def _swap(kept: _Mount, name: str, place: Place, mixer: AttentionMixer) -> None:
    """Put a mixer into its place of that name, and note how it was there."""
    setattr(place.layer, place.attribute, mixer.train(place.layer.training))
    kept.places.append(place)
    kept.dtypes.append(_rest(place).dtype)
    if not _hears(place.layer):
        kind: Any = type(place.layer)
        place.layer.__class__ = _hearing(kind)
        kept.deaf.append(name.removesuffix(f".{place.attribute}"))
        kept.hooks.append(place.layer.register_forward_pre_hook(_pass_grid, with_kwargs=True))


def unmount(model: nn.Module) -> VisionMixers:
    """Put the self-attentions back as they were; returns the mixers.

    The attentions follow the model to the device and dtype that it has now.

    Raises:
        ValueError: nothing is mounted.
    """
    encoder = _mounted(model)
    kept: _Mount = encoder.__dict__[_MOUNT]
    # What may fail, for want of memory for example, comes before the first change.
    attentions = [_released(place, dtype) for place, dtype in zip(kept.places, kept.dtypes, strict=True)]
    for handle in kept.hooks:
        handle.remove()
    for place, attention in zip(kept.places, attentions, strict=True):
        setattr(place.layer, place.attribute, attention)
    for name in kept.deaf:
        layer = encoder.get_submodule(name)
        layer.__class__ = type(layer).__mro__[2]
    del encoder.__dict__[_MOUNT]
    _forget_captures(encoder)
    return kept.mixers


def _released(place: Place, dtype: torch.dtype) -> nn.Module:
    """The attention of a place, where and as what the rest of its layer is, which was of `dtype` at first."""
    attention: nn.Module = getattr(place.layer, place.attribute).released()
    rest = _rest(place)
    attention.to(rest.device).train(place.layer.training)
    # Where nothing was cast since, an attention that is kept in another dtype than the rest stays so.
    return attention if rest.dtype == dtype else attention.to(rest.dtype)


def is_mounted(model: nn.Module) -> bool:
    """Whether `mount` has been at an encoder in this model."""
    return any(_MOUNT in module.__dict__ for module in model.modules())


def mixers_of(model: nn.Module) -> VisionMixers:
    """The mixers mounted on a model.

    Raises:
        ValueError: nothing is mounted.
    """
    return _mounted(model).__dict__[_MOUNT].mixers


def _mounted(model: nn.Module) -> nn.Module:
    """The encoder that has mixers."""
    for module in model.modules():
        if _MOUNT in module.__dict__:
            return module
    raise ValueError("model: no mixers are mounted")


def _forget_captures(encoder: nn.Module) -> None:
    """Have transformers hook its modules anew when outputs of layers are asked for.

    It does so once; if that was while mixers were mounted, attentions that are back would be missed.
    """
    for module in encoder.modules():
        for key, hook in list(module._forward_hooks.items()):
            if getattr(hook, "__module__", None) == "transformers.utils.output_capturing":
                del module._forward_hooks[key]
        if getattr(module, _CAPTURING, False):
            setattr(module, _CAPTURING, False)


def _fresh(encoder: Encoder, layers: dict[str, dict[str, int]], options: dict[str, Any]) -> VisionMixers:
    """Made where they will be: a GPU draws numbers a hundred times faster."""
    for name in options:
        if name not in OPTIONS:
            raise TypeError(f"{name}: expected an option of mixers ({', '.join(OPTIONS)})")
    with torch.device(_like(next(iter(encoder.places.values()))).device):
        return VisionMixers(VisionMixersConfig(layers, **options))


def _like(place: Place) -> torch.Tensor:
    """A tensor of the device and dtype that a mixer has to have; quantized weights do not tell."""
    parameters = [*place.attention.parameters(), *place.layer.parameters()]
    return next(parameter for parameter in parameters if parameter.is_floating_point())


def _rest(place: Place) -> torch.Tensor:
    """A parameter of the layer beside the attention."""
    return next(
        parameter
        for name, parameter in place.layer.named_parameters()
        if not name.startswith(f"{place.attribute}.") and parameter.is_floating_point()
    )


def _hand_down_grid(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Pre-hook of an encoder: the grid into its keyword arguments."""
    kept: _Mount = module.__dict__[_MOUNT]
    given = {**dict(zip(kept.arguments, args, strict=False)), **kwargs}
    asked = given.get("output_attentions")
    if asked or (asked is None and getattr(module.config, "output_attentions", False)):
        raise ValueError("output_attentions: expected False, propagation has no attention maps")
    if given.get("attention_mask") is not None:
        raise ValueError("attention_mask: expected None, propagation cannot leave tokens out")
    grid = grid_of(given, kept.patches)
    for name in kept.deaf:
        setattr(module.get_submodule(name), GRID, grid)
    return args, {**kwargs, GRID: grid}


def _forget_grid(module: nn.Module, args: Any, output: Any) -> None:
    """Hook of an encoder whose layers hold the grid: it is that of one call."""
    for name in module.__dict__[_MOUNT].deaf:
        for holder in module.get_submodule(name).modules():
            if hasattr(holder, GRID):
                delattr(holder, GRID)


def _hears(layer: nn.Module) -> bool:
    """Does a layer hand keyword arguments on to its attention?"""
    parameters = inspect.signature(type(layer).forward).parameters.values()
    return any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)


class _Hearing:
    """A layer that is called with the grid, which its encoder does not hand on."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return super().__call__(*args, **kwargs, **{GRID: getattr(self, GRID, None)})  # type: ignore[misc]

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _restored, (type(self).__mro__[2],), self.__dict__


def _restored(kind: Any) -> Any:
    """A layer without its state: no module has the classes below."""
    hearing: Any = _hearing(kind)
    return hearing.__new__(hearing)


@cache
def _hearing(kind: Any) -> type:
    return type(kind.__name__, (_Hearing, kind), {"__module__": kind.__module__})


def _pass_grid(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Pre-hook of a layer that takes no keyword arguments."""
    rest = dict(kwargs)
    grid = rest.pop(GRID)
    for child in module.children():
        if isinstance(child, AttentionMixer):
            setattr(child, GRID, grid)
    return args, rest
