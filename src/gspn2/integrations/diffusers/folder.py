"""A pipeline in a folder, looked at before anything of it is loaded."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from safetensors import SafetensorError, safe_open

from gspn2.training.errors import UserError

KINDS = {
    "StableDiffusionXLPipeline": (StableDiffusionXLPipeline, StableDiffusionXLImg2ImgPipeline),
    "StableDiffusionPipeline": (StableDiffusionPipeline, StableDiffusionImg2ImgPipeline),
}
MODELS = ("unet", "vae", "text_encoder", "text_encoder_2")
"""Parts with weights that are used here."""


@dataclass(frozen=True)
class PipelineFolder:
    """A folder that `save_pretrained` of a Stable Diffusion or SDXL pipeline wrote."""

    path: Path

    def read(self, name: str) -> dict[str, Any]:
        """A JSON file of it.

        Raises:
            UserError: it is not there, or is none.
        """
        path = self.path / name
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except OSError:
            raise UserError(f"pipeline: no {name} in {self.path}") from None
        except ValueError as error:
            raise UserError(f"pipeline: cannot read {path}: {error}") from error
        if not isinstance(found, dict):
            raise UserError(f"pipeline: expected a JSON object in {path}, got {type(found).__name__}")
        return found

    def kind(self) -> tuple[Any, Any]:
        """The pipeline's class, and that of its image-to-image passes.

        Raises:
            UserError: of another kind.
        """
        name = self.read("model_index.json").get("_class_name")
        if name not in KINDS:
            raise UserError(f"pipeline: expected one of {', '.join(KINDS)} in {self.path}, got {name}")
        return KINDS[name]

    def without_data(self) -> tuple[UNet2DConditionModel, AutoencoderKL]:
        """UNet and autoencoder, in float32, as tensors without memory.

        Raises:
            UserError: their configurations describe no such models.
        """
        made = []
        with torch.device("meta"):
            for name, kind in (("unet", UNet2DConditionModel), ("vae", AutoencoderKL)):
                config = self.read(f"{name}/config.json")
                try:
                    made.append(kind.from_config(config))
                except (ValueError, TypeError, KeyError, AttributeError) as error:
                    raise UserError(f"pipeline: cannot make a {kind.__name__} of {name}: {error}") from error
        return tuple(made)

    def factor(self) -> int:
        """Pixels along a side for one of a latent.

        Raises:
            UserError: the autoencoder's configuration does not tell.
        """
        blocks = self.read("vae/config.json").get("block_out_channels")
        if not isinstance(blocks, list) or not blocks:
            raise UserError(f"pipeline: no block_out_channels in {self.path / 'vae/config.json'}")
        return 2 ** (len(blocks) - 1)

    def check(self) -> None:
        """Is every part there, with whole files? Reads their headers only.

        Raises:
            UserError: what is not.
        """
        for name, told in self.read("model_index.json").items():
            if name.startswith("_") or not isinstance(told, list) or told[0] is None:
                continue
            part = self.path / name
            if not part.is_dir() or not any(part.iterdir()):
                raise UserError(f"pipeline: no {name} in {self.path}")
            if name in MODELS:
                self.read(f"{name}/config.json")
                check_weights("pipeline", part)


def check_weights(what: str, folder: Path) -> None:
    """Are there weights in a folder, and have the files the length that they tell?

    Args:
        what: the option that it came by, for the message.
        folder: of a model.

    Raises:
        UserError: no.
    """
    found = sorted(folder.glob("*.safetensors"))
    if not found and not any(folder.glob("*.bin")):
        raise UserError(f"{what}: no weights (.safetensors) in {folder}")
    for path in found:
        try:
            with safe_open(path, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise UserError(f"{what}: {path} is damaged: {error}") from error
