"""SDXL as its published configuration describes it, with random weights; a tiny model of that shape for CPUs.

Weights are not needed to measure: a step takes the same time whatever they are.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

UNET: dict[str, Any] = {
    "sample_size": 128,
    "in_channels": 4,
    "out_channels": 4,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "block_out_channels": [320, 640, 1280],
    "layers_per_block": 2,
    "attention_head_dim": [5, 10, 20],
    "cross_attention_dim": 2048,
    "transformer_layers_per_block": [1, 2, 10],
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
VAE: dict[str, Any] = {
    "sample_size": 1024,
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2,
    "latent_channels": 4,
    "norm_num_groups": 32,
    "scaling_factor": 0.13025,
}
SCHEDULER: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "epsilon",
    "steps_offset": 1,
    "timestep_spacing": "leading",
}
TINY_UNET = {
    **UNET,
    "sample_size": 16,
    "block_out_channels": [32, 64, 128],
    "layers_per_block": 1,
    "attention_head_dim": [1, 2, 4],
    "cross_attention_dim": 64,
    "transformer_layers_per_block": [1, 1, 2],
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 6 * 8 + 32,
    "norm_num_groups": 8,
}
TINY_VAE = {**VAE, "sample_size": 128, "block_out_channels": [8, 8, 16, 16], "norm_num_groups": 4}
SCALE = 8
"""Pixels of a picture over places of its latents, each way."""
TEXT_TOKENS = 77


@dataclass(frozen=True, eq=False)
class Shape:
    """Configurations of one pipeline.

    Args:
        name: in results.
        unet, vae: as diffusers' `from_config` takes them.
    """

    name: str
    unet: dict[str, Any]
    vae: dict[str, Any]

    @property
    def base(self) -> int:
        """Pixels of a side that the UNet was trained on."""
        return SCALE * self.unet["sample_size"]

    @property
    def self_attentions(self) -> dict[int, int]:
        """Number of self-attentions by channels."""
        config = self.unet
        found: dict[int, int] = {}
        for kind, dim, depth in zip(
            config["down_block_types"],
            config["block_out_channels"],
            config["transformer_layers_per_block"],
            strict=True,
        ):
            if kind.startswith("CrossAttn"):
                # One more in each block on the way up.
                found[dim] = depth * (2 * config["layers_per_block"] + 1)
        found[dim] += depth  # in the middle, as deep as the last level
        return found

    def write(self, folder: Path) -> None:
        """The configuration files of a pipeline, without weights."""
        index = {
            "_class_name": "StableDiffusionXLPipeline",
            "unet": ["diffusers", "UNet2DConditionModel"],
            "vae": ["diffusers", "AutoencoderKL"],
            "scheduler": ["diffusers", "EulerDiscreteScheduler"],
        }
        (folder / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
        parts = {
            "unet/config.json": self.unet,
            "vae/config.json": self.vae,
            "scheduler/scheduler_config.json": SCHEDULER,
        }
        for name, config in parts.items():
            (folder / name).parent.mkdir()
            (folder / name).write_text(json.dumps(config), encoding="utf-8")


SDXL = Shape("SDXL", UNET, VAE)
TINY = Shape("tiny UNet", TINY_UNET, TINY_VAE)


def dtype_on(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "cpu" else torch.bfloat16


def conditions(unet: Any, base: int) -> dict[str, Any]:
    """What a step of a UNet is given beside the latents, for a picture told to have `base` pixels a side."""
    config, device, dtype = unet.config, unet.device, unet.dtype
    pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
    return {
        "timestep": torch.tensor(500.0, device=device),
        "encoder_hidden_states": _normal(unet, 1, TEXT_TOKENS, config.cross_attention_dim),
        "added_cond_kwargs": {
            "text_embeds": _normal(unet, 1, pooled),
            "time_ids": torch.tensor([[base, base, 0, 0, base, base]], device=device, dtype=dtype),
        },
        "return_dict": False,
    }


def latents(unet: Any, height: int, width: int) -> Tensor:
    """Noise for a picture of so many pixels."""
    return _normal(unet, 1, unet.config.in_channels, height // SCALE, width // SCALE)


def embeddings(unet: Any) -> dict[str, Tensor]:
    """Encoded prompts as an SDXL pipeline takes them."""
    given = {name: conditions(unet, SCALE) for name in ("", "negative_")}
    found = {f"{name}prompt_embeds": it["encoder_hidden_states"] for name, it in given.items()}
    pooled = {
        f"{name}pooled_prompt_embeds": it["added_cond_kwargs"]["text_embeds"] for name, it in given.items()
    }
    return found | pooled


def _normal(unet: Any, *size: int) -> Tensor:
    return torch.randn(*size, device=unet.device, dtype=unet.dtype)
