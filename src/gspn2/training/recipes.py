"""Named recipes: settings that belong together, to be printed, read and overridden."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .config import TrainConfig
from .errors import UserError


@dataclass(frozen=True)
class Recipe:
    """Settings under a name.

    Args:
        about: what they are for, in a line.
        settings: of `TrainConfig`; what is not named keeps its default.
        trained: they are for weights that have learned something already.
    """

    about: str
    settings: dict[str, Any]
    trained: bool = False


# ImageNet-1K at 224, as far as it is published: optimizer, rates per 512 images, warm-up, clipping,
# RandAugment, Mixup, CutMix, erasing, smoothing, drop path, 300 epochs, a moving average and MESA (GSPN-2,
# arXiv 2512.07884; what it leaves open after GSPN, arXiv 2501.12381). Ours: the batch size, the decay of the
# average, the weight of MESA and its use at every size, the layout, compilation and what concerns machines.
_IN1K: dict[str, Any] = {
    "image_size": (224, 224),
    "epochs": 300,
    "batch_size": 1024,
    "lr": 5e-4,
    "lr_base_size": 512,
    "min_lr": 0.01,
    "warmup_epochs": 20.0,
    "weight_decay": 0.05,
    "clip_grad": 5.0,
    "label_smoothing": 0.1,
    "mixup": 0.8,
    "cutmix": 1.0,
    "ema_decay": 0.9999,
    "mesa": 1.0,
    "mesa_start": 20.0,
    "crop_scale": (0.08, 1.0),
    "auto_augment": "rand-m9-mstd0.5-inc1",
    "random_erasing": 0.25,
    "amp": "auto",
    "channels_last": True,
    "compile": True,
    "workers": 8,
    "checkpoint_every": 500,
}

RECIPES: dict[str, Recipe] = {
    "in1k-tiny": Recipe(
        "GSPN-2-T on ImageNet-1K at 224, 300 epochs",
        {**_IN1K, "model": "gspn2_tiny", "drop_path": 0.2},
    ),
    "in1k-small": Recipe(
        "GSPN-2-S on ImageNet-1K at 224, 300 epochs",
        {**_IN1K, "model": "gspn2_small", "drop_path": 0.4, "lr": 3e-4},
    ),
    "in1k-base": Recipe(
        "GSPN-2-B on ImageNet-1K at 224, 300 epochs",
        {**_IN1K, "model": "gspn2_base", "drop_path": 0.5},
    ),
    "finetune": Recipe(
        "30 epochs from trained weights (--init-from), at any size and number of classes",
        {
            "model": "gspn2_tiny",
            "epochs": 30,
            "batch_size": 512,
            "lr": 5e-5,
            "lr_base_size": 512,
            "warmup_epochs": 3.0,
            "weight_decay": 1e-8,
            "layer_decay": 0.8,
            "drop_path": 0.2,
            "ema_decay": 0.9999,
            "crop_scale": (0.4, 1.0),
            "auto_augment": "rand-m9-mstd0.5-inc1",
            "random_erasing": 0.25,
            "channels_last": True,
            "workers": 8,
        },
        trained=True,
    ),
    "test": Recipe(
        "everything that the ImageNet recipes use, on a very small model and images of 32 x 32",
        {
            **_IN1K,
            "model": "test_gspn2",
            "image_size": (32, 32),
            "epochs": 3,
            "batch_size": 8,
            "lr": 5e-3,
            "lr_base_size": 8,
            "warmup_epochs": 1.0,
            "mesa_start": 1.0,
            "drop_path": 0.05,
            "compile": False,
            "workers": 0,
            "checkpoint_every": 2,
        },
    ),
}


def recipe_settings(name: str) -> dict[str, Any]:
    """The settings of a recipe, by its name or from a JSON file such as a run's `config.json`.

    Raises:
        UserError: no such recipe or file, or a setting that `TrainConfig` does not have.
    """
    if name in RECIPES:
        return dict(RECIPES[name].settings)
    path = Path(name)
    if path.suffix != ".json":
        raise UserError(f"recipe: expected one of {', '.join(RECIPES)} or a JSON file, got {name!r}")
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"recipe: {path}: no such file") from None
    except (OSError, ValueError) as error:
        raise UserError(f"recipe: {path}: cannot be read: {error}") from error
    if not isinstance(settings, dict):
        raise UserError(f"recipe: {path}: expected an object of settings, got {type(settings).__name__}")
    TrainConfig.from_json(settings)
    return settings
