"""Very small vision encoders of transformers, made here: nothing is downloaded."""

from __future__ import annotations

from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn

from gspn2.integrations.transformers import AttentionMixer

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}
TEXT = {**{name: SIZES[name] for name in list(SIZES)[:4]}, "vocab_size": 50, "max_position_embeddings": 8}
GRIDS = [(4, 4), (4, 6), (5, 2)]

# Configurations that are not those of all.
_MORE: dict[str, dict[str, Any]] = {
    "Dinov2": {"mlp_ratio": 2},
    "Dinov2WithRegisters": {"mlp_ratio": 2, "num_register_tokens": 3},
    "DINOv3ViT": {"num_register_tokens": 2},
}
PREFIX = {
    "ViT": 1,
    "DeiT": 2,
    "IJepa": 0,
    "Dinov2": 1,
    "Dinov2WithRegisters": 4,
    "DINOv3ViT": 3,
    "CLIPVision": 1,
    "SiglipVision": 0,
}
"""Encoders of square patches, and how many tokens they have before those of the grid."""


def encoder(name: str, **more: Any) -> nn.Module:
    """One of `PREFIX`, ready for inference."""
    torch.manual_seed(0)
    config = getattr(hf, f"{name}Config")(**SIZES, **_MORE.get(name, {}), **more)
    model = getattr(hf, f"{name}Model")(config)
    with torch.no_grad():
        for parameter in model.parameters():
            # What would hide a fault: fresh weights of some models are next to 0.
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.eval()


def images(grid: tuple[int, int], batch: int = 2) -> Tensor:
    """Pixels of so many patches."""
    generator = torch.Generator().manual_seed(grid[0] * 100 + grid[1])
    return torch.randn(batch, 3, 8 * grid[0], 8 * grid[1], generator=generator)


def tokens(model: nn.Module, pixels: Tensor) -> Tensor:
    """What an encoder makes of images of any size: (B, N, C)."""
    name = type(getattr(model, "_orig_mod", model)).__name__  # of what is compiled
    more = {} if name.startswith("D") and not name.startswith("DeiT") else {"interpolate_pos_encoding": True}
    return model(pixels, **more).last_hidden_state


def siglip2(**more: Any) -> nn.Module:
    """An encoder of images whose grids differ."""
    torch.manual_seed(0)
    sizes = {name: value for name, value in SIZES.items() if name != "image_size"}
    return hf.Siglip2VisionModel(hf.Siglip2VisionConfig(**sizes, num_patches=16, **more)).eval()


def padded(grids: list[tuple[int, int]], tokens: int) -> dict[str, Tensor]:
    """Inputs of a SigLIP2: patches of images, padded with something that must not matter."""
    pixels = torch.full((len(grids), tokens, 3 * 8 * 8), 7.0)
    mask = torch.zeros(len(grids), tokens, dtype=torch.long)
    for row, (height, width) in enumerate(grids):
        generator = torch.Generator().manual_seed(height * 100 + width)
        pixels[row, : height * width] = torch.randn(height * width, 3 * 8 * 8, generator=generator)
        mask[row, : height * width] = 1
    return {"pixel_values": pixels, "pixel_attention_mask": mask, "spatial_shapes": torch.tensor(grids)}


def run(model: nn.Module, grid: tuple[int, int]) -> Tensor:
    """Tokens of images of so many places, without gradients."""
    with torch.no_grad():
        return tokens(model, images(grid))


def swapped(model: nn.Module) -> dict[str, AttentionMixer]:
    """The mixers in the places of self-attentions, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, AttentionMixer)}
