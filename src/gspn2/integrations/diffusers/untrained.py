"""Networks and pipelines from configurations, with random weights: enough to measure speed and memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel


def make_unet(config: Mapping[str, Any], device: torch.device, dtype: torch.dtype) -> UNet2DConditionModel:
    """A UNet for inference, made where it will run.

    Args:
        config: as diffusers' `from_config` takes it.
        device: of the weights.
        dtype: of the weights.
    """
    with _made_with(device, dtype):
        return UNet2DConditionModel.from_config(dict(config)).eval().requires_grad_(False)


def make_vae(config: Mapping[str, Any], device: torch.device, dtype: torch.dtype) -> AutoencoderKL:
    """An autoencoder for inference; arguments as those of `make_unet`."""
    with _made_with(device, dtype):
        return AutoencoderKL.from_config(dict(config)).eval().requires_grad_(False)


def make_pipeline(
    unet: UNet2DConditionModel, vae: AutoencoderKL, scheduler: Mapping[str, Any]
) -> StableDiffusionXLPipeline:
    """An SDXL pipeline without text encoders: it takes prompts encoded.

    Args:
        unet: its UNet.
        vae: its autoencoder.
        scheduler: arguments of `EulerDiscreteScheduler`.
    """
    parts = dict.fromkeys(("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"))
    return StableDiffusionXLPipeline(
        vae=vae, unet=unet, scheduler=EulerDiscreteScheduler(**scheduler), **parts
    )


@contextmanager
def _made_with(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(before)
