"""Pictures with captions at the aspect ratios they have, and what a frozen pipeline makes of them.

The VAE and the text encoders do not learn: latents and prompt embeddings are computed once and kept in a
folder, a safetensors file each, named by a digest of everything that they depend on.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from gspn2.training.checkpoint import replacing, write_safetensors
from gspn2.training.errors import DataError
from gspn2.training.samples import Source as Stored
from gspn2.training.samples import read_source

from .vae import scaled

if TYPE_CHECKING:
    from PIL.Image import Image

_NARROWEST = 2.0


@dataclass(frozen=True)
class Picture:
    """A picture with a caption, as a source lists it.

    Args:
        name: what a person would look for.
        place: where its source finds it: numbers and text.
        key: changes with the picture; its latents are kept under it.
        label: the same wherever the data are; a run that is resumed must find the same ones.
        caption: what it shows.
        height, width: as it is shown, in pixels.
    """

    name: str
    place: Any
    key: str
    label: str
    caption: str
    height: int
    width: int


@dataclass(frozen=True)
class Pair:
    """A picture and what is made of it.

    Args:
        picture: with its caption.
        size: height and width it is brought to, in pixels.
        crop: rows and columns cut off at the top and left, once it covers `size`.
    """

    picture: Picture
    size: tuple[int, int]
    crop: tuple[int, int]

    @property
    def caption(self) -> str:
        """What it shows."""
        return self.picture.caption

    @property
    def original(self) -> tuple[int, int]:
        """Height and width it has."""
        return self.picture.height, self.picture.width


def buckets(resolution: int, multiple: int) -> list[tuple[int, int]]:
    """Sizes (height, width) of about resolution^2 pixels, multiples of `multiple`, up to 2:1 either way.

    Raises:
        ValueError: the resolution is no multiple, or not even one.
    """
    if resolution < multiple or resolution % multiple:
        raise ValueError(f"resolution: expected a multiple of {multiple}, got {resolution}")
    area = resolution * resolution
    sizes = {(resolution, resolution)}
    for short in range(multiple, resolution, multiple):
        long = area // short // multiple * multiple
        if long <= _NARROWEST * short:
            sizes |= {(short, long), (long, short)}
    return sorted(sizes)


def fitted(picture: Picture, sizes: Sequence[tuple[int, int]]) -> Pair:
    """The bucket of the nearest aspect ratio, and what is cut off there."""
    original = picture.height, picture.width
    aspect = math.log(original[0] / original[1])
    size = min(sizes, key=lambda s: (abs(math.log(s[0] / s[1]) - aspect), s))
    covering = _covering(original, size)
    return Pair(picture, size, ((covering[0] - size[0]) // 2, (covering[1] - size[1]) // 2))


def _covering(original: tuple[int, int], size: tuple[int, int]) -> tuple[int, int]:
    """The smallest height and width of the picture's aspect ratio that cover a size."""
    scale = max(size[0] / original[0], size[1] / original[1])
    return max(size[0], round(original[0] * scale)), max(size[1], round(original[1] * scale))


def pixels_of(pair: Pair, image: Image) -> Tensor:
    """The picture, resized and cut, (1, 3, height, width) in [-1, 1].

    Raises:
        DataError: it has not the size that it was listed with.
    """
    from PIL import Image as module

    if (image.height, image.width) != pair.original:
        listed = "{} x {}".format(*pair.original)
        raise DataError(f"{pair.picture.name}: is {image.height} x {image.width}, was listed as {listed}")
    height, width = _covering(pair.original, pair.size)
    top, left = pair.crop
    resized = image.convert("RGB").resize((width, height), module.Resampling.LANCZOS)
    cut = resized.crop((left, top, left + pair.size[1], top + pair.size[0]))
    return torch.from_numpy(np.array(cut)).permute(2, 0, 1)[None].float() / 127.5 - 1


class Cache:
    """Latents and prompt embeddings on disk.

    Args:
        folder: made where it is missing.
        pipeline: folder of the pipeline; its files are part of every name.
        dtype: of what is stored.
    """

    def __init__(self, folder: Path, pipeline: Path, dtype: torch.dtype) -> None:
        self.folder, self.dtype = folder, dtype
        self._encoders = [str(dtype), *_stamps(pipeline, ("vae", "text_encoder", "text_encoder_2"))]

    def latents_file(self, pair: Pair) -> Path:
        """Where the latents of a picture are, or will be."""
        return self._file("latents", [pair.picture.key, pair.size, pair.crop])

    def fault_file(self, pair: Pair) -> Path:
        """Where it says why a picture could not be read, if it could not."""
        return self.latents_file(pair).with_suffix(".unreadable.txt")

    def prompt_file(self, caption: str | None) -> Path:
        """Where the embeddings of a caption are; None stands for no caption, as guidance has it."""
        return self._file("prompt", caption)

    def _file(self, kind: str, named: Any) -> Path:
        digest = hashlib.sha256(json.dumps([kind, self._encoders, named]).encode()).hexdigest()
        return self.folder / f"{kind}-{digest[:32]}.safetensors"

    def missing(self, pairs: Sequence[Pair], known_faults: bool) -> tuple[list[Pair], list[str | None]]:
        """Pictures and captions that have not been encoded yet.

        Args:
            pairs: among these.
            known_faults: leave out pictures that could not be read before: a run that is resumed goes on
                without them, a new one tries them again.
        """
        captions: list[str | None] = [None, *dict.fromkeys(pair.caption for pair in pairs)]
        return (
            [
                pair
                for pair in pairs
                if not self.latents_file(pair).is_file()
                and not (known_faults and self.fault_file(pair).is_file())
            ],
            [caption for caption in captions if not self.prompt_file(caption).is_file()],
        )

    def split(self, pairs: Sequence[Pair]) -> tuple[list[Pair], list[str]]:
        """Pairs that have latents, and what was wrong with the others."""
        encoded = [self.latents_file(pair).is_file() for pair in pairs]
        faults = [
            self.fault_file(pair).read_text(encoding="utf-8")
            for pair, fine in zip(pairs, encoded, strict=True)
            if not fine
        ]
        return [pair for pair, fine in zip(pairs, encoded, strict=True) if fine], faults

    def latents(self, pair: Pair) -> Tensor:
        """Scaled latents of a picture, (C, h, w)."""
        return self._load(self.latents_file(pair))["latents"]

    def prompt(self, caption: str | None) -> dict[str, Tensor]:
        """`embeds` (N, C), and `pooled` (C,) of SDXL."""
        return self._load(self.prompt_file(caption))

    def _load(self, path: Path) -> dict[str, Tensor]:
        try:
            return load_file(path)
        except (OSError, SafetensorError) as error:
            raise DataError(
                f"cache: cannot read {path}: {error}; remove it, it will be made again"
            ) from error

    def build(
        self,
        pipe: Any,
        pairs: Sequence[Pair],
        stored: Iterator[Stored],
        captions: Sequence[str | None],
        device: torch.device,
        progress: Callable[[str, int, int], None],
    ) -> None:
        """Encode what is missing; each file is written whole or not at all, so a later call goes on.

        `stored` brings the picture of each pair in turn. One that cannot be read gets a file that says so.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with torch.no_grad():
            for i, caption in enumerate(captions):
                self._write(self.prompt_file(caption), _embed(pipe, caption, device))
                progress("prompts", i + 1, len(captions))
            for i, (pair, source) in enumerate(zip(pairs, stored, strict=True)):
                try:
                    pixels = pixels_of(pair, read_source(source))
                except DataError as error:
                    with replacing(self.fault_file(pair)) as draft:
                        draft.write_text(str(error), encoding="utf-8")
                    continue
                latents = pipe.vae.encode(pixels.to(device, pipe.vae.dtype)).latent_dist.mode()
                self._write(self.latents_file(pair), {"latents": scaled(latents[0].float(), pipe.vae)})
                progress("latents", i + 1, len(pairs))

    def _write(self, path: Path, tensors: dict[str, Tensor]) -> None:
        write_safetensors(path, {name: tensor.to(self.dtype) for name, tensor in tensors.items()}, {})


def _embed(pipe: Any, caption: str | None, device: torch.device) -> dict[str, Tensor]:
    """Embeddings of a caption; of none, what the pipeline itself takes for the unconditional pass."""
    embeds = pipe.encode_prompt(
        prompt=caption or "",
        device=device,
        num_images_per_prompt=1,
        do_classifier_free_guidance=caption is None,
    )
    # Of SDXL: embeddings, negative ones, pooled, negative pooled; of SD-1.5 the first two.
    names = ("embeds", "negative_embeds", "pooled", "negative_pooled")
    given = dict(zip(names, embeds, strict=False))
    prefix = "negative_" if caption is None else ""
    return {name: given[prefix + name][0] for name in ("embeds", "pooled") if prefix + name in given}


def _stamps(pipeline: Path, parts: Sequence[str]) -> list[str]:
    """Names, sizes and times of a pipeline's weights."""
    files = [file for part in parts for file in sorted((pipeline / part).glob("*")) if file.is_file()]
    return [f"{f.resolve()} {f.stat().st_size} {f.stat().st_mtime_ns}" for f in files]
