"""Swapping the self-attentions of a UNet for mixers, and back.

A mixer needs rows and columns of its tokens, and a `BasicTransformerBlock` only sees (B, N, C). A pre-hook on
the `Transformer2DModel` around it, which still sees the image, puts them into `cross_attention_kwargs`: an
argument, not a state, so that whoever runs a block again (gradient checkpointing) or traces it
(`torch.compile`) gets the grid of that very call. A second pre-hook takes them out before the attentions
that stay, which would warn of an argument they do not know.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import Transformer2DModel, UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention
from torch import nn
from torch.utils.hooks import RemovableHandle

from ..swapping import check_fit, sizes
from .mixers import GRID, AttentionMixer, UNetMixers

_MOUNT = "_gspn2_mount"
# Where `cross_attention_kwargs` is among the positional arguments of Transformer2DModel.forward.
_POSITION = 5


@dataclass
class _Mount:
    """What `unmount` needs; kept on the UNet, out of its modules and weights."""

    mixers: UNetMixers
    attentions: dict[str, Attention]
    hooks: list[RemovableHandle] = field(default_factory=list)


def mount(
    unet: UNet2DConditionModel, mixers: UNetMixers | None = None, *, proxy_ratio: int = 8, **options: Any
) -> UNetMixers:
    """Replace every self-attention of a UNet by a GSPN-2 mixer, in place.

    Args:
        unet: of SDXL, SD-1.5 or alike. Cross-attention, IP-Adapters and LoRA on it, gradient checkpointing
            and `torch.compile` go on as before; a LoRA's weights for self-attention have nothing to act on.
        mixers: trained mixers (`UNetMixers.from_pretrained`); None makes fresh ones, with `options`. They are
            moved to the device and dtype of the UNet.
        proxy_ratio: channels of the UNet over propagated ones, for fresh mixers.
        options: of `UNetMixers`, for fresh mixers. Their output is 0 unless zero_output=False is given.

    Returns:
        The mixers that are now part of `unet`: train them, or save them by `save_pretrained`.

    Raises:
        TypeError: not a UNet2DConditionModel.
        ValueError: the UNet has mixers, has a self-attention that cannot be swapped, is offloaded layer by
            layer, or the given mixers do not fit it.
    """
    if not isinstance(unet, UNet2DConditionModel):
        raise TypeError(f"unet: expected a UNet2DConditionModel, got {type(unet).__name__}")
    if not isinstance(mixers, UNetMixers | None):
        raise TypeError(
            "mixers: expected UNetMixers, as UNetMixers.from_pretrained reads them, got"
            f" {type(mixers).__name__}"
        )
    if is_mounted(unet):
        raise ValueError("unet: mixers are mounted already; unmount them first")
    _check_not_offloaded(unet)
    attentions = dict(_self_attentions(unet))
    dims = {name: attention.query_dim for name, attention in attentions.items()}
    if mixers is None:
        layers = sizes(dims, proxy_ratio)
        with torch.device(unet.device):  # made where they will be: a GPU draws numbers a hundred times faster
            mixers = UNetMixers(layers, **options)
    elif options:
        raise ValueError(f"{next(iter(options))}: given mixers bring their own options")
    check_fit(dims, mixers.config.layers, "UNet")
    mounted = _Mount(mixers, attentions)
    for _, mixer in mixers.layers():
        mixer.to(device=unet.device, dtype=unet.dtype).train(unet.training)
    for name, mixer in mixers.layers():
        unet.set_submodule(name, mixer)
    for module in unet.modules():
        if isinstance(module, Transformer2DModel):
            mounted.hooks.append(module.register_forward_pre_hook(_hand_down_grid, with_kwargs=True))
        elif isinstance(module, BasicTransformerBlock):
            mounted.hooks += [
                attention.register_forward_pre_hook(_drop_grid, with_kwargs=True)
                for attention in (module.attn1, module.attn2)
                if attention is not None and not isinstance(attention, AttentionMixer)
            ]
    # Past nn.Module's own __setattr__: the attentions must not become weights of the UNet again.
    unet.__dict__[_MOUNT] = mounted
    unet.__dict__["save_pretrained"] = _refuse_to_save
    return mixers


def unmount(unet: UNet2DConditionModel) -> UNetMixers:
    """Put the self-attentions back as they were; returns the mixers.

    The attentions follow the UNet to the device and dtype that it has now.

    Raises:
        ValueError: nothing is mounted, or the UNet is offloaded layer by layer.
    """
    mounted = _mount_of(unet)
    _check_not_offloaded(unet)
    # What may fail, for want of memory for example, comes before the first change.
    for attention in mounted.attentions.values():
        attention.to(device=unet.device, dtype=unet.dtype).train(unet.training)
    for handle in mounted.hooks:
        handle.remove()
    for name, attention in mounted.attentions.items():
        unet.set_submodule(name, attention)
    del unet.__dict__[_MOUNT], unet.__dict__["save_pretrained"]
    return mounted.mixers


def is_mounted(unet: nn.Module) -> bool:
    """Whether `mount` has been at this UNet."""
    return _MOUNT in unet.__dict__


def mixers_of(unet: UNet2DConditionModel) -> UNetMixers:
    """The mixers mounted on a UNet.

    Raises:
        ValueError: nothing is mounted.
    """
    return _mount_of(unet).mixers


def _mount_of(unet: nn.Module) -> _Mount:
    if not is_mounted(unet):
        raise ValueError("unet: no mixers are mounted")
    return unet.__dict__[_MOUNT]


def _check_not_offloaded(unet: nn.Module) -> None:
    """Weights that are brought for the call of each layer are those of the layers that were there before."""
    for name, module in unet.named_modules():
        registry = getattr(module, "_diffusers_hook", None)
        grouped = registry is not None and registry.get_hook("group_offloading") is not None
        if grouped or getattr(getattr(module, "_hf_hook", None), "offload", False):
            raise ValueError(
                f"unet: its weights are offloaded layer by layer ({name or 'as a whole'}); mount before that,"
                " and remove the offloading (pipe.remove_all_hooks()) before unmounting"
            )


def _self_attentions(unet: UNet2DConditionModel) -> Iterator[tuple[str, Attention]]:
    """Names and modules to swap; raises where a self-attention is of another kind."""
    inside: set[str] = set()
    found = False
    for path, transformer in unet.named_modules():
        if not isinstance(transformer, Transformer2DModel):
            continue
        if not transformer.is_input_continuous:
            raise ValueError(f"unet: cannot swap {path}: its input is no image, tokens have no grid")
        for name, block in transformer.named_modules(prefix=path):
            if not isinstance(block, BasicTransformerBlock) or block.only_cross_attention:
                continue
            inside.add(f"{name}.attn1")
            found = True
            if not isinstance(block.attn1, Attention):
                raise ValueError(
                    f"unet: cannot swap {name}.attn1: expected an Attention, got {type(block.attn1).__name__}"
                )
            yield f"{name}.attn1", block.attn1
    for name, module in unet.named_modules():
        if isinstance(module, Attention) and not module.is_cross_attention and name not in inside:
            raise ValueError(
                f"unet: cannot swap {name}: a self-attention that is no attn1 of a BasicTransformerBlock in a"
                " Transformer2DModel"
            )
    if not found:
        raise ValueError("unet: expected at least one Transformer2DModel with self-attention, got none")


def _hand_down_grid(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Pre-hook of a Transformer2DModel: rows and columns of its input into `cross_attention_kwargs`."""
    image: torch.Tensor = args[0] if args else kwargs["hidden_states"]
    grid = {GRID: (image.shape[2], image.shape[3])}
    if len(args) > _POSITION:
        handed = {**(args[_POSITION] or {}), **grid}
        return (*args[:_POSITION], handed, *args[_POSITION + 1 :]), kwargs
    return args, {
        **kwargs,
        "cross_attention_kwargs": {**(kwargs.get("cross_attention_kwargs") or {}), **grid},
    }


def _drop_grid(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Pre-hook of an attention that stays."""
    return args, {name: value for name, value in kwargs.items() if name != GRID}


def _refuse_to_save(*args: Any, **kwargs: Any) -> None:
    """Stands in for `save_pretrained`: nothing could load a UNet's file with mixers in it."""
    raise ValueError(
        "unet: mixers are mounted; mixers_of(unet).save_pretrained(folder) saves those, and unmount(unet)"
        " gives the UNet back that can be saved"
    )
