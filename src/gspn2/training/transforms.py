"""From an image file to the model's input: reading, preprocessing, augmentation."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from .config import TrainConfig
from .errors import DataError, UserError
from .tasks import is_task, parse_task

if TYPE_CHECKING:
    from PIL.Image import Image

Transform = Callable[["Image"], Tensor]

# Mean and standard deviation of scikit-learn's digits, on a scale of 0 to 1.
DIGITS_MEAN, DIGITS_STD = 0.305, 0.376
# Of generated images, roughly: they are mostly black.
TASK_MEAN, TASK_STD = 0.2, 0.3


@dataclass(frozen=True)
class Preprocess:
    """What turns any image into the model's input (in_chans, H, W) when nothing is random.

    Stored in checkpoints, so that evaluation and prediction see what the model was made for.

    Args:
        image_size: (height, width) of the input.
        in_chans: 1 (grey) or 3.
        mean, std: of each channel, for values from 0 to 1.
        interpolation: "bilinear" or "bicubic".
        crop_pct: share of the resized image that the centre crop keeps.
    """

    image_size: tuple[int, int]
    in_chans: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str = "bicubic"
    crop_pct: float = 1.0

    def __call__(self, image: Image) -> Tensor:
        """The input (in_chans, H, W) for an image of any size and mode."""
        return _fixed_transform(self)(to_channels(image, self.in_chans))

    def to_json(self) -> dict[str, Any]:
        """All fields, as `from_json` takes them."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Preprocess:
        """The inverse of `to_json`."""
        values: dict[str, Any] = {n: tuple(v) if isinstance(v, list) else v for n, v in fields.items()}
        return cls(**values)


@functools.lru_cache(maxsize=16)
def _fixed_transform(preprocess: Preprocess) -> Transform:
    from timm.data import create_transform

    return create_transform(
        (preprocess.in_chans, *preprocess.image_size),
        interpolation=preprocess.interpolation,
        mean=preprocess.mean,
        std=preprocess.std,
        crop_pct=preprocess.crop_pct,
    )


def preprocess_for(config: TrainConfig) -> Preprocess:
    """Size and normalisation: what `config` asks for, else what the data or the model was made for."""
    import timm

    import gspn2.models  # noqa: F401 - registers ours, and with them their sizes and crops

    cfg = timm.get_pretrained_cfg(config.model)
    if config.data == "digits":
        chans = config.in_chans or 1
        size = config.image_size or (32, 32)
        return Preprocess(size, chans, (DIGITS_MEAN,) * chans, (DIGITS_STD,) * chans)
    if is_task(config.data):
        side = parse_task(config.data).size
        chans = config.in_chans or 1
        return Preprocess(
            config.image_size or (side, side), chans, (TASK_MEAN,) * chans, (TASK_STD,) * chans, "bilinear"
        )
    chans = config.in_chans or 3
    mean = tuple(cfg.mean) if cfg else (0.485, 0.456, 0.406)
    std = tuple(cfg.std) if cfg else (0.229, 0.224, 0.225)
    if chans == 1:
        mean, std = (sum(mean) / len(mean),), (sum(std) / len(std),)
    own_size = (cfg.input_size[-2], cfg.input_size[-1]) if cfg else (224, 224)
    return Preprocess(
        image_size=config.image_size or own_size,
        in_chans=chans,
        mean=mean,
        std=std,
        interpolation=cfg.interpolation if cfg else "bicubic",
        crop_pct=cfg.crop_pct if cfg else 0.875,
    )


def augmentation_for(config: TrainConfig, preprocess: Preprocess) -> Transform:
    """The random transform of training images; `preprocess` itself where augmentation is off."""
    from timm.data.random_erasing import RandomErasing
    from torchvision import transforms as tv

    # What is generated has no need of more variety, and cropping would cut the way that is asked about.
    if not config.augment or is_task(config.data):
        return preprocess
    steps = (
        _digits_augmentation(preprocess)
        if config.data == "digits"
        else _photo_augmentation(config, preprocess)
    )
    steps += [tv.ToTensor(), tv.Normalize(preprocess.mean, preprocess.std)]
    if config.random_erasing > 0:
        mode = "const" if config.data == "digits" else "pixel"
        steps.append(RandomErasing(config.random_erasing, mode=mode, device="cpu"))
    return tv.Compose(steps)


def _digits_augmentation(preprocess: Preprocess) -> list[Transform]:
    """A little turning, moving and scaling. No mirroring: it does not keep a digit what it is."""
    from torchvision import transforms as tv

    mode = tv.InterpolationMode(preprocess.interpolation)
    return [
        tv.Grayscale(preprocess.in_chans),
        tv.Resize(preprocess.image_size, mode),
        tv.RandomAffine(
            10, translate=(0.1, 0.1), scale=(0.9, 1.1), interpolation=tv.InterpolationMode.BILINEAR
        ),
    ]


def _photo_augmentation(config: TrainConfig, preprocess: Preprocess) -> list[Transform]:
    from timm.data import create_transform
    from torchvision import transforms as tv

    # Policies know RGB only: what grey models see is made grey behind them.
    try:
        geometry, color, _ = create_transform(
            (3, *preprocess.image_size),
            is_training=True,
            scale=config.crop_scale,
            hflip=config.hflip,
            color_jitter=config.color_jitter,
            auto_augment=config.auto_augment,
            interpolation=preprocess.interpolation,
            mean=preprocess.mean if preprocess.in_chans == 3 else preprocess.mean * 3,
            separate=True,
        )
    except (AssertionError, ValueError, IndexError) as error:
        raise UserError(f"auto_augment: timm does not take {config.auto_augment!r}: {error}") from error
    _mend_posterize(color)
    to_rgb = tv.Lambda(_rgb)
    return [to_rgb, geometry, color, *([tv.Grayscale(1)] if preprocess.in_chans == 1 else [])]


def _mend_posterize(color: Any) -> None:
    """Keep a bit of every color: timm's policies go down to none, which Pillow 13 refuses."""
    for policy in color.transforms:
        # RandAugment and AugMix have operations, AutoAugment has them in groups.
        groups = [getattr(policy, "ops", []), *getattr(policy, "policy", [])]
        for operation in (it for group in groups for it in group):
            if operation.name.startswith("Posterize"):
                operation.aug_fn = _posterize


def _posterize(image: Image, bits: int, **_: Any) -> Image:
    from PIL import ImageOps

    return ImageOps.posterize(image, min(max(bits, 1), 8))


def _rgb(image: Image) -> Image:
    return to_channels(image, 3)


def to_channels(image: Image, in_chans: int) -> Image:
    """Grey or RGB, 8 bits a channel, from any mode: palettes, alpha, CMYK, 16-bit grey."""
    if image.mode.startswith("I;16"):
        from PIL import Image as module

        # convert() would cut off everything above 255.
        image = module.fromarray((np.asarray(image).astype(np.uint16) >> 8).astype(np.uint8))
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("L" if in_chans == 1 else "RGB")


def open_image(file: str | Path | IO[bytes], name: str | None = None) -> Image:
    """Read an image whole, turned as its EXIF tag says.

    Args:
        file: path or open file.
        name: for messages; the path where there is one.

    Raises:
        DataError: no such file, no image, or a damaged one; the message names it.
    """
    from PIL import Image as module
    from PIL import ImageOps

    name = name or str(file)
    try:
        with module.open(file) as image:
            image.load()
            return ImageOps.exif_transpose(image)
    except FileNotFoundError:
        raise DataError(f"{name}: no such file") from None
    except IsADirectoryError:
        raise DataError(f"{name}: is a folder") from None
    except module.UnidentifiedImageError:
        raise DataError(f"{name}: not an image") from None
    # A decoder meets damaged bytes in many ways; OSError, SyntaxError, ValueError, struct.error are all seen.
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(f"{name}: cannot be read: {reason}") from error
