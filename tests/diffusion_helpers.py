"""Tiny text-to-image pipelines of the real shape, made from configurations: nothing is downloaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

SDXL_UNET: dict[str, Any] = {
    "block_out_channels": (32, 64, 64),
    "layers_per_block": 1,
    "sample_size": 16,
    "in_channels": 4,
    "out_channels": 4,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": (2, 4, 4),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "transformer_layers_per_block": (1, 1, 2),
    "projection_class_embeddings_input_dim": 6 * 8 + 32,
    "cross_attention_dim": 64,
    "norm_num_groups": 8,
}
SD15_UNET: dict[str, Any] = {
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "sample_size": 16,
    "in_channels": 4,
    "out_channels": 4,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "attention_head_dim": 4,
    "cross_attention_dim": 32,
    "norm_num_groups": 8,
}
VAE: dict[str, Any] = {
    "block_out_channels": (16, 16, 32, 32),
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "latent_channels": 4,
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "sample_size": 128,
}
SCHEDULER: dict[str, Any] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
    "timestep_spacing": "leading",
}


def sdxl_unet(**changes: Any) -> UNet2DConditionModel:
    """A UNet with SDXL's structure: the first level without attention, several blocks in the last."""
    torch.manual_seed(0)
    return UNet2DConditionModel(**{**SDXL_UNET, **changes}).eval()


def sd15_unet(**changes: Any) -> UNet2DConditionModel:
    """A UNet with SD-1.5's structure: convolutions as projections, attention in the first level."""
    torch.manual_seed(0)
    return UNet2DConditionModel(**{**SD15_UNET, **changes}).eval()


def inputs(unet: UNet2DConditionModel, height: int, width: int, batch: int = 2) -> dict[str, Any]:
    """Arguments of a UNet's call, for latents of any size."""
    generator = torch.Generator().manual_seed(height * 1000 + width)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    given: dict[str, Any] = {
        "sample": normal(batch, 4, height, width),
        "timestep": torch.tensor(500),
        "encoder_hidden_states": normal(batch, 7, unet.config.cross_attention_dim),
    }
    if unet.config.addition_embed_type == "text_time":
        given["added_cond_kwargs"] = {
            "text_embeds": normal(batch, 32),
            "time_ids": torch.tensor([[128.0, 128.0, 0.0, 0.0, 128.0, 128.0]] * batch),
        }
    return given


def tokenizer(folder: Path) -> CLIPTokenizer:
    """A byte-level tokenizer of single letters, from files made here."""
    folder.mkdir(parents=True, exist_ok=True)
    letters = [chr(code) for code in range(33, 127)]
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: index for index, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=16)


def text_config(vocabulary: int, **changes: Any) -> CLIPTextConfig:
    """Two layers of 32 channels."""
    sizes = {"hidden_size": 32, "intermediate_size": 37, "num_hidden_layers": 2, "num_attention_heads": 4}
    special = {"bos_token_id": vocabulary - 2, "eos_token_id": vocabulary - 1, "pad_token_id": vocabulary - 1}
    return CLIPTextConfig(
        vocab_size=vocabulary, max_position_embeddings=16, projection_dim=32, **sizes, **special, **changes
    )


def vae(**changes: Any) -> AutoencoderKL:
    """An autoencoder that halves three times, with attention in the middle."""
    torch.manual_seed(0)
    return AutoencoderKL(**{**VAE, **changes}).eval()


def sdxl_pipeline(folder: Path) -> StableDiffusionXLPipeline:
    """A whole SDXL pipeline: two tokenizers and text encoders."""
    words = tokenizer(folder / "made_tokenizer")
    torch.manual_seed(0)
    return StableDiffusionXLPipeline(
        vae=vae(),
        text_encoder=CLIPTextModel(text_config(len(words))).eval(),
        text_encoder_2=CLIPTextModelWithProjection(text_config(len(words), hidden_act="gelu")).eval(),
        tokenizer=words,
        tokenizer_2=tokenizer(folder / "made_tokenizer_2"),
        unet=sdxl_unet(),
        scheduler=EulerDiscreteScheduler(**SCHEDULER),
    )


def sd15_pipeline(folder: Path) -> StableDiffusionPipeline:
    """A whole SD-1.5 pipeline."""
    words = tokenizer(folder / "made_tokenizer")
    torch.manual_seed(0)
    return StableDiffusionPipeline(
        vae=vae(),
        text_encoder=CLIPTextModel(text_config(len(words))).eval(),
        tokenizer=words,
        unet=sd15_unet(),
        scheduler=EulerDiscreteScheduler(**SCHEDULER),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
