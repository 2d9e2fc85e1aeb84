"""The way into a checkpoint and back: weights, optimizer, and what has to be as it was."""

from __future__ import annotations

import os
import platform
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .checkpoint import BEST, part
from .config import FREE_ON_RESUME, TrainConfig
from .distributed import World
from .errors import CheckpointError, UserError
from .learner import Learner
from .sharding import share_of, shares_of


def learner_tensors(learner: Learner) -> dict[str, Tensor]:
    """Everything that a learner would have to remember, by name; of a sharded one this process's shares."""
    tensors = prefixed("model", learner.model.state_dict())
    if learner.ema is not None:
        tensors |= prefixed("ema", learner.ema.module.state_dict())
    for index, values in learner.optimizer.state_dict()["state"].items():
        tensors |= prefixed(f"optimizer/{index}", values)
    return tensors


def restore_learner(learner: Learner, tensors: dict[str, Tensor], source: Path) -> None:
    """The inverse of `learner_tensors`, of whole tensors; a CheckpointError where something does not fit."""
    load_weights(learner.model, part(tensors, "model"), source)
    if learner.ema is not None:
        load_weights(learner.ema.module, part(tensors, "ema"), source)
    load_optimizer(learner.optimizer, part(tensors, "optimizer"))


def load_weights(model: nn.Module, state: dict[str, Tensor], source: Path) -> None:
    """Copy a state dict into a model; a CheckpointError where it does not fit."""
    try:
        model.load_state_dict(shares_of(state, model.state_dict()))
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{source}: weights do not fit the model: {reason[:300]}") from error


def load_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Restore the state of each parameter, by number; the groups follow from the settings."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        index, key = name.split("/", 1)
        parameter = parameters[int(index)]
        state.setdefault(int(index), {})[key] = _laid_out(share_of(tensor, parameter), parameter)
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _laid_out(tensor: Tensor, parameter: Tensor) -> Tensor:
    """A moment in the memory order of its parameter, which fused optimizers ask for; files are contiguous."""
    if tensor.shape != parameter.shape:
        return tensor
    return torch.empty_like(parameter, dtype=tensor.dtype, requires_grad=False).copy_(tensor)


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


def check_whole(folder: Path, state: dict[str, Any]) -> None:
    """Raise a UserError naming the files that a run wrote before its checkpoint and that are gone by now."""
    gone = [name for name, size in state["log"].items() if _size(folder / name) < size]
    gone += [BEST] if state["best"] and not (folder / BEST).is_file() else []
    if gone:
        needed = f"{folder}: to resume, the whole folder of the run is needed"
        raise UserError(f"out: {needed}; missing or cut: {', '.join(gone)}")


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def environment(device: torch.device, world: World, sharded: bool = False) -> dict[str, Any]:
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
        "processes": world.size,
        "sharded": sharded,
    }


def count_parameters(model: nn.Module) -> int:
    """Numbers a model learns."""
    return sum(parameter.numel() for parameter in model.parameters())
