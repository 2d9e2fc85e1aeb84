"""A pipeline in a folder, looked at before anything of it is loaded."""

from __future__ import annotations

import contextlib
import json
import math
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
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
TEXT = ("text_encoder", "text_encoder_2")
MODELS = ("unet", "vae", *TEXT)
"""Parts with weights that are used here."""
_WEIGHTS = re.compile(
    r"(?:(?:diffusion_)?pytorch_)?model(?:\.(?P<variant>\w+))?(?:-\d+-of-\d+)?\.(?:safetensors|bin)"
)
"""How files with weights are called; those of a variant (fp16) carry its name."""


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

    def scheduler(self, name: str | None = None) -> Any:
        """A scheduler with the pipeline's settings.

        Args:
            name: of another class of diffusers; None for the pipeline's own.

        Raises:
            UserError: there is no such class, it needs a package that is missing, or pipelines of this kind
                do not run with it (those of flow models).
        """
        told = self.read("model_index.json").get("scheduler")
        own = told[1] if isinstance(told, list) and len(told) == 2 else None
        kind: Any = getattr(diffusers, str(own), None)
        if not hasattr(kind, "_get_compatibles"):
            raise UserError(f"pipeline: expected a scheduler of diffusers in {self.path}, got {own}")
        if name is not None:
            names = _alike(kind)
            if name not in names:
                raise UserError(f"scheduler: expected one of {', '.join(names)}, got {name!r}")
            kind = getattr(diffusers, name)
        try:
            made = kind.from_config(self.read("scheduler/scheduler_config.json"))
        except (ValueError, TypeError, NotImplementedError) as error:
            raise UserError(f"scheduler: cannot make a {kind.__name__} of {self.path}: {error}") from error
        if not hasattr(made, "init_noise_sigma"):
            raise UserError(
                "scheduler: expected one for models that predict noise or velocity (EulerDiscreteScheduler,"
                f" DDIMScheduler ...), got {kind.__name__}, which is for flow models"
            )
        return made

    def variant(self) -> str | None:
        """The variant to load, "fp16" for example, where the folder holds no other weights; None if it does.

        Raises:
            UserError: some parts are there in one variant only, others in another.
        """
        found: dict[str, set[str | None]] = {}
        for name in MODELS:
            for path in (self.path / name).glob("*"):
                matched = _WEIGHTS.fullmatch(path.name)
                if matched:
                    found.setdefault(name, set()).add(matched["variant"])
        common = set.intersection(*found.values()) if found else {None}
        if None in common:
            return None
        if not common:
            kinds = {name: sorted(str(it) for it in variants) for name, variants in found.items()}
            raise UserError(f"pipeline: expected the same variant of all weights in {self.path}, got {kinds}")
        return min(str(it) for it in common)

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

    def load(self, dtype: Any) -> DiffusionPipeline:
        """The pipeline.

        Args:
            dtype: of its weights, or a dictionary of those of its parts, as diffusers takes it.

        Raises:
            UserError: what diffusers has to say against it.
        """
        try:
            with _bars_on_terminals():
                return DiffusionPipeline.from_pretrained(self.path, dtype=dtype, variant=self.variant())
        except (ValueError, OSError) as error:
            raise UserError(f"pipeline: {error}") from error

    def factor(self) -> int:
        """Pixels along a side for one of a latent.

        Raises:
            UserError: the autoencoder's configuration does not tell.
        """
        blocks = self.read("vae/config.json").get("block_out_channels")
        if not isinstance(blocks, list) or not blocks:
            raise UserError(f"pipeline: no block_out_channels in {self.path / 'vae/config.json'}")
        return 2 ** (len(blocks) - 1)

    def text_parameters(self) -> int:
        """Parameters of the text encoders, by the headers of their files; 0 for files of other kinds."""
        variant, count = self.variant(), 0
        for name in TEXT:
            for path in (self.path / name).glob("*.safetensors"):
                matched = _WEIGHTS.fullmatch(path.name)
                if matched is None or matched["variant"] != variant:
                    continue
                with safe_open(path, framework="pt") as file:
                    shapes = [file.get_slice(key).get_shape() for key in file.keys()]  # noqa: SIM118
                count += sum(math.prod(shape) for shape in shapes)
        return count

    def check(self) -> None:
        """Is every part there, with whole files? Reads their headers only.

        Raises:
            UserError: what is not.
        """
        for name, told in self.read("model_index.json").items():
            if name.startswith("_") or not isinstance(told, list) or not told or told[0] is None:
                continue
            part = self.path / name
            if not part.is_dir() or not any(part.iterdir()):
                raise UserError(f"pipeline: no {name} in {self.path}")
            if name in MODELS:
                self.read(f"{name}/config.json")
                check_weights("pipeline", part)


@contextlib.contextmanager
def _bars_on_terminals() -> Iterator[None]:
    """Within the context the libraries draw no progress bars into files."""
    libraries = (diffusers.utils.logging, transformers.utils.logging)
    kinds = [it for it in libraries if it.is_progress_bar_enabled() and not sys.stderr.isatty()]
    for kind in kinds:
        kind.disable_progress_bar()
    try:
        yield
    finally:
        for kind in kinds:
            kind.enable_progress_bar()


def check_seed(seed: int) -> None:
    """Is a seed one that leaves room in PyTorch's 64 bits for those that are counted up from it?

    Raises:
        UserError: no.
    """
    if not -(1 << 31) <= seed < 1 << 31:
        raise UserError(f"seed: expected a whole number of 32 bits, got {seed}")


def check_steps(name: str, scheduler: Any, steps: int) -> None:
    """Can a scheduler divide its schedule into so many steps?

    Args:
        name: what the steps are called, for the message.
        scheduler: from `PipelineFolder.scheduler`; it is set to these steps.
        steps: of a denoising.

    Raises:
        UserError: no; most would take the same time again and again, and some of them do not complain.
    """
    most = scheduler.config.num_train_timesteps
    if steps > most:
        raise UserError(f"{name}: expected at most the {most} that the model was trained with, got {steps}")
    try:
        scheduler.set_timesteps(steps)
    except ValueError as error:
        raise UserError(f"{name}: {type(scheduler).__name__} does not take {steps}: {error}") from error


def _alike(kind: Any) -> list[str]:
    """Names of a scheduler's class and of those that go on with its settings."""
    # The preconditioning of EDM is part of how a model was trained.
    return sorted(
        {
            it.__name__
            for it in (kind, *kind._get_compatibles())
            if it.__name__.startswith("EDM") == kind.__name__.startswith("EDM")
            and not hasattr(it, "_backends")  # stands in for a class whose package is missing
        }
    )


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
