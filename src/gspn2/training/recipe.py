"""What a configuration asks for: optimizer, moving average, loss; and the way back from a checkpoint."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .config import FREE_ON_RESUME, TrainConfig
from .errors import CheckpointError, UserError

if TYPE_CHECKING:
    from timm.data import Mixup
    from timm.utils import ModelEmaV3

Criterion = Callable[[Tensor, Tensor], Tensor]


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW with timm's parameter groups: no decay on biases, norms and `model.no_weight_decay()`."""
    from timm.optim import create_optimizer_v2

    return create_optimizer_v2(
        model,
        opt="adamw",
        lr=config.peak_lr,
        weight_decay=config.weight_decay,
        layer_decay=config.layer_decay,
        betas=config.betas,
    )


def make_ema(model: nn.Module, decay: float | None) -> ModelEmaV3 | None:
    """The moving average, whose decay grows from 0 towards `decay`: of use to short runs, too."""
    from timm.utils import ModelEmaV3

    return None if decay is None else ModelEmaV3(model, decay=decay, use_warmup=True)


def make_loss(config: TrainConfig, classes: int) -> tuple[Mixup | None, Criterion]:
    """The mixing of a batch, if any, and the loss on logits (N, classes) that goes with it."""
    if config.mixup == 0 and config.cutmix == 0:
        return None, nn.CrossEntropyLoss(label_smoothing=config.label_smoothing)
    from timm.data import Mixup
    from timm.loss import SoftTargetCrossEntropy

    mixup = Mixup(config.mixup, config.cutmix, label_smoothing=config.label_smoothing, num_classes=classes)
    return mixup, SoftTargetCrossEntropy()


def load_weights(model: nn.Module, state: dict[str, Tensor], source: Path) -> None:
    """Copy a state dict into a model; a CheckpointError where it does not fit."""
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{source}: weights do not fit the model: {reason[:300]}") from error


def load_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Restore the state of each parameter, by number; the groups follow from the settings."""
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        index, key = name.split("/", 1)
        state.setdefault(int(index), {})[key] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def prefixed(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `checkpoint.part`."""
    return {f"{prefix}/{name}": tensor for name, tensor in tensors.items()}


def check_same_run(config: TrainConfig, stored: TrainConfig) -> None:
    """Raise a UserError naming the settings in which a resumed run differs from itself."""
    names = [f.name for f in fields(TrainConfig) if f.name not in FREE_ON_RESUME]
    changed = [
        f"{name} is {getattr(config, name)!r}, was {getattr(stored, name)!r}"
        for name in names
        if getattr(config, name) != getattr(stored, name)
    ]
    if changed:
        raise UserError(f"a resumed run keeps its settings, but {'; '.join(changed)}")


def environment(device: torch.device) -> dict[str, Any]:
    """What the last bits of a result depend on besides the settings."""
    import timm

    import gspn2

    return {
        "gspn2": gspn2.__version__,
        "torch": torch.__version__,
        "timm": timm.__version__,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
    }


def count_parameters(model: nn.Module) -> int:
    """Numbers a model learns."""
    return sum(parameter.numel() for parameter in model.parameters())
