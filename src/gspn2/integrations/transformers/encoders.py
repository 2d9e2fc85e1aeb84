"""Which vision encoders there are, where their self-attentions are, and on what grid their tokens lie."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import transformers
from torch import Tensor, nn

OLDEST = (5, 17)
"""Encoders of older versions of transformers are built in other ways."""
if tuple(int(part) for part in transformers.__version__.split(".")[:2]) < OLDEST:
    raise ImportError(f"transformers: expected version 5.17 or newer, got {transformers.__version__}")

Grid = tuple[int, int] | list[tuple[int, int]]
"""Rows and columns of all images, or those of each image, whose tokens are padded to one number."""
Patches = tuple[tuple[int, ...], tuple[int, ...]]
"""Sides and strides of a patch, in pixels."""


@dataclass(frozen=True)
class Family:
    """How encoders of one kind are built.

    Args:
        layer: class of a layer.
        attention: name of the self-attention in a layer.
        prefix_tokens: class and distillation tokens before those of the grid; register tokens come on top.
        shapes: the grid of each image is an argument of its own, and tokens are padded.
    """

    layer: str
    attention: str = "attention"
    prefix_tokens: int = 0
    shapes: bool = False


FAMILIES = {
    "ViTModel": Family("ViTLayer", prefix_tokens=1),
    "DeiTModel": Family("DeiTLayer", prefix_tokens=2),
    "IJepaModel": Family("IJepaLayer"),
    "Dinov2Model": Family("Dinov2Layer", prefix_tokens=1),
    "Dinov2Backbone": Family("Dinov2Layer", prefix_tokens=1),
    "Dinov2WithRegistersModel": Family("Dinov2WithRegistersLayer", prefix_tokens=1),
    "Dinov2WithRegistersBackbone": Family("Dinov2WithRegistersLayer", prefix_tokens=1),
    "DINOv3ViTModel": Family("DINOv3ViTLayer", prefix_tokens=1),
    "DINOv3ViTBackbone": Family("DINOv3ViTLayer", prefix_tokens=1),
    "CLIPVisionModel": Family("CLIPEncoderLayer", "self_attn", prefix_tokens=1),
    "SiglipVisionModel": Family("SiglipEncoderLayer", "self_attn"),
    "Siglip2VisionModel": Family("Siglip2EncoderLayer", "self_attn", shapes=True),
}
"""By the class that sees the image and hands its keyword arguments on to the layers."""


@dataclass
class Place:
    """A self-attention and where it is.

    Args:
        layer: the module around it.
        attribute: its name there.
        attention: the module itself.
    """

    layer: nn.Module
    attribute: str
    attention: nn.Module

    @property
    def dim(self) -> int:
        """Channels of a token."""
        linear: Any = next(module for module in self.attention.modules() if hasattr(module, "in_features"))
        return linear.in_features


class Encoder:
    """A vision encoder inside of a model.

    Args:
        model: of transformers; the encoder itself, or anything around one.

    Raises:
        ValueError: there is none that is known, more than one, or one with something else for attention.
    """

    def __init__(self, model: nn.Module) -> None:
        name, self.module, self.family = _only(model)
        path = f"{name}." if name else ""
        self.places: dict[str, Place] = {}
        for inner, layer in self.module.named_modules():
            if _is(layer, self.family.layer):
                attention = getattr(layer, self.family.attention)
                place = f"{inner}.{self.family.attention}"
                kind = type(attention)
                if not (_of_transformers(kind) and kind.__name__.endswith("Attention")):
                    raise ValueError(
                        f"model: cannot swap {path}{place}: expected an attention of transformers, got"
                        f" {kind.__name__}"
                    )
                if any(parameter.is_meta for parameter in attention.parameters()) and not _all_meta(model):
                    raise ValueError(
                        f"model: cannot swap {path}{place}: its weights are not in memory (offloaded?)"
                    )
                self.places[place] = Place(layer, self.family.attention, attention)
        if not self.places:
            raise ValueError(f"model: expected layers in {name or type(model).__name__}, got none")
        registers = getattr(self.module.config, "num_register_tokens", 0)
        self.prefix_tokens = self.family.prefix_tokens + registers
        self.arguments = tuple(inspect.signature(type(self.module).forward).parameters)[1:]
        patches = next((it for it in self.module.modules() if isinstance(it, nn.Conv2d)), None)
        if patches is None and not self.family.shapes:
            raise ValueError(f"model: expected a convolution that makes patches in {name}, got none")
        self.patches: Patches | None = None if patches is None else (patches.kernel_size, patches.stride)


def grid_of(arguments: Mapping[str, Any], patches: Patches | None) -> Grid | None:
    """The grid that the arguments of an encoder tell.

    Args:
        arguments: by name.
        patches: None where `spatial_shapes` tell the grid.

    Returns:
        None where the argument is missing, about which the encoder itself complains.

    Raises:
        ValueError: shapes that are none of the tokens, or of their mask.
    """
    pixels: Tensor | None = arguments.get("pixel_values")
    if patches is None:
        shapes: Tensor | None = arguments.get("spatial_shapes")
        if pixels is None or shapes is None:
            return None
        return _shapes(pixels, shapes, arguments.get("pixel_attention_mask"))
    if pixels is None or pixels.ndim != 4:
        return None
    (side_y, side_x), (stride_y, stride_x) = patches
    return (pixels.shape[2] - side_y) // stride_y + 1, (pixels.shape[3] - side_x) // stride_x + 1


def _shapes(pixels: Tensor, shapes: Tensor, mask: Tensor | None) -> Grid:
    """Rows and columns of each of the images (B, N, ...)."""
    if shapes.shape != (pixels.shape[0], 2):
        raise ValueError(
            f"spatial_shapes: expected ({pixels.shape[0]}, 2), a grid for each image, got shape"
            f" {tuple(shapes.shape)}"
        )
    sides = shapes.tolist()
    grids = [(height, width) for height, width in sides]
    tokens = pixels.shape[1]
    for height, width in grids:
        if not 1 <= height * width <= tokens:
            raise ValueError(
                f"spatial_shapes: expected 1 to {tokens} tokens an image, got {height} x {width}"
            )
    if mask is not None and mask.sum(dim=1).tolist() != [height * width for height, width in grids]:
        raise ValueError(
            "pixel_attention_mask: expected ones for the H * W tokens that spatial_shapes tell, got"
            f" {mask.sum(dim=1).tolist()} for {grids}"
        )
    if len(set(grids)) == 1 and grids[0][0] * grids[0][1] == tokens:
        return grids[0]
    return grids


def _only(model: nn.Module) -> tuple[str, nn.Module, Family]:
    found = list(_encoders(model))
    if len(found) == 1:
        return found[0]
    if found:
        names = ", ".join(f"{name} ({type(encoder).__name__})" for name, encoder, _ in found)
        raise ValueError(f"model: expected one vision encoder, got {names}; mount each of them by itself")
    raise ValueError(
        f"model: cannot swap the attention of {type(model).__name__}: {_reason(model)} (expected one of, or a"
        f" model around one of: {', '.join(FAMILIES)})"
    )


def _encoders(model: nn.Module) -> Iterator[tuple[str, nn.Module, Family]]:
    for name, module in model.named_modules():
        for family, told in FAMILIES.items():
            if _is(module, family):
                yield name, module, told


def _reason(model: nn.Module) -> str:
    """Why there is nothing to mount on."""
    configs = [module.config for module in model.modules() if hasattr(module, "config")]
    if any(getattr(config, "window_size", None) for config in configs):
        return "it attends in windows, for which there is no mixer"
    if any(getattr(config, "mask_ratio", None) for config in configs):
        return "it leaves tokens out, and what is left lies on no grid"
    modalities = getattr(model, "input_modalities", ())
    if tuple(modalities if not isinstance(modalities, str) else (modalities,)) == ("text",):
        return "its tokens are text and lie on no grid"
    return "it has no vision encoder that is known here"


def _is(module: nn.Module, name: str) -> bool:
    """By class, subclasses included, without an import of every model there is."""
    return any(it.__name__ == name and _of_transformers(it) for it in type(module).__mro__)


def _of_transformers(kind: type) -> bool:
    return kind.__module__.startswith("transformers.")


def _all_meta(model: nn.Module) -> bool:
    return all(parameter.is_meta for parameter in model.parameters())
