"""Checkpoints: safetensors files, written whole or not at all.

Two kinds. `best.safetensors` holds the weights that were tested, under the model's own names: timm, or
anything that reads safetensors, loads it. `last.safetensors` holds the whole state of a run (`model/`,
`ema/`, `optimizer/`) and is what a run resumes from. In both the metadata key "gspn2" is JSON: the settings,
the class names, the preprocessing, the place in the run.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .config import TrainConfig
from .errors import CheckpointError, UserError
from .model import build_model
from .transforms import Preprocess

FORMAT = 1
LAST, BEST = "last.safetensors", "best.safetensors"
EXPORTED = "model.safetensors"
DATA_ARGUMENTS = ("num_classes", "in_chans", "img_size")


class NotOursError(CheckpointError):
    """A safetensors file that does not say what it is."""


@dataclass(frozen=True)
class CheckpointInfo:
    """What a checkpoint says about itself.

    Args:
        path: the file.
        kind: "weights" or "run".
        weights: which weights were loaded, "ema" or "model".
        config: settings of the run.
        class_names: in the order of the logits.
        preprocess: from an image to the input.
        epoch, step: finished epochs and steps of the run.
        metrics: of the best test up to that point: test_loss, top1, top5; empty before the first.
        state: what else a run stores, as JSON.
    """

    path: Path
    kind: str
    weights: str
    config: TrainConfig
    class_names: tuple[str, ...]
    preprocess: Preprocess
    epoch: int
    step: int
    metrics: dict[str, float]
    state: dict[str, Any] = field(default_factory=dict, repr=False)


def save_checkpoint(path: str | Path, tensors: dict[str, Tensor], info: CheckpointInfo) -> None:
    """Write a checkpoint, atomically: whatever happens, `path` holds the old file or the new one."""
    described = {
        "format": FORMAT,
        "kind": info.kind,
        "weights": info.weights,
        "config": info.config.to_json(),
        "class_names": info.class_names,
        "preprocess": info.preprocess.to_json(),
        "epoch": info.epoch,
        "step": info.step,
        "metrics": info.metrics,
        "state": info.state,
    }
    write_safetensors(Path(path), tensors, {"gspn2": json.dumps(described)})


def write_safetensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file, atomically."""
    from safetensors.torch import save

    owned: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        # Tied weights and views: the format refuses tensors that share memory.
        storage = tensor.untyped_storage().data_ptr()
        owned[name] = tensor.clone() if storage in seen else tensor
        seen.add(storage)
    # save_file would go through a temporary file of its own, which nobody removes after a SIGKILL.
    data = save(owned, metadata)
    with replacing(path) as temporary:
        temporary.write_bytes(data)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary file beside `path` that takes its place when the block ends well, else vanishes."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        # On disk before the name is: a crash in between must not leave a name without its bytes.
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    # Folders cannot be opened everywhere (Windows); the file itself is safe by then.
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_json(path: Path, value: Any) -> None:
    """Write JSON for people to read, atomically."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2) + "\n")


def find_checkpoint(path: str | Path) -> Path:
    """The file itself; of a run's folder its best checkpoint, or the last where none is best yet."""
    path = Path(path)
    if path.is_dir():
        for name in (BEST, LAST):
            if (path / name).is_file():
                return path / name
        raise CheckpointError(f"{path}: no {BEST} or {LAST} in this folder")
    if not path.exists():
        raise CheckpointError(f"{path}: no such file")
    return path


def read_checkpoint(path: str | Path) -> tuple[dict[str, Tensor], CheckpointInfo]:
    """Tensors, on the CPU, and description of a checkpoint.

    Raises:
        CheckpointError: no such file, not safetensors, or not one of ours.
    """
    with _opened(Path(path)) as file:
        info = _info_of(Path(path), file)
        return {name: file.get_tensor(name) for name in file.keys()}, info  # noqa: SIM118 - no mapping


def read_info(path: str | Path) -> CheckpointInfo:
    """What `read_checkpoint` says of a checkpoint, without reading its tensors."""
    with _opened(Path(path)) as file:
        return _info_of(Path(path), file)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: not a readable safetensors file: {error}") from error


def _info_of(path: Path, file: Any) -> CheckpointInfo:
    metadata = file.metadata() or {}
    if "gspn2" not in metadata:
        raise NotOursError(
            f"{path}: a safetensors file, but no checkpoint of gspn2 (its metadata is missing)"
        )
    return _parse_info(path, metadata["gspn2"])


def _parse_info(path: Path, text: str) -> CheckpointInfo:
    try:
        described = json.loads(text)
        if described["format"] > FORMAT:
            raise CheckpointError(f"{path}: format {described['format']} needs a newer gspn2")
        return CheckpointInfo(
            path=path,
            kind=described["kind"],
            weights=described["weights"],
            config=TrainConfig.from_json(described["config"]),
            class_names=tuple(described["class_names"]),
            preprocess=Preprocess.from_json(described["preprocess"]),
            epoch=described["epoch"],
            step=described["step"],
            metrics=described["metrics"],
            state=described["state"],
        )
    except CheckpointError:
        raise
    except (UserError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: damaged description: {error!r}") from error


def load_checkpoint(
    path: str | Path, *, device: str | torch.device = "cpu", weights: str | None = None
) -> tuple[nn.Module, CheckpointInfo]:
    """The trained model, ready for inference, and what its checkpoint says.

    Args:
        path: a checkpoint, or the folder of a run (its best, else its last checkpoint).
        device: where the model goes.
        weights: "ema" (the moving average) or "model" (the weights as trained) of a `last.safetensors`; None
            for the average where there is one. A `best.safetensors` holds the one that was tested.

    Returns:
        The model in evaluation mode; logits are in the order of `info.class_names`, inputs are made by
        `info.preprocess`.

    Raises:
        CheckpointError: no such file, not one of ours, or its tensors do not fit the model.
    """
    tensors, info = read_checkpoint(find_checkpoint(path))
    state, kind = choose_weights(tensors, info, weights)
    try:
        model = build_model(info.config, info.preprocess, len(info.class_names))
        model.load_state_dict(state)
    except UserError as error:
        raise CheckpointError(f"{info.path}: {error}") from error
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{info.path}: weights do not fit the model: {reason[:300]}") from error
    info = CheckpointInfo(**{**vars(info), "weights": kind})
    return model.to(device).eval(), info


def weights_of(path: str | Path) -> dict[str, Tensor]:
    """The weights to start from: of a run or checkpoint of ours, or of any safetensors file.

    A folder that `gspn2 export` or timm wrote holds `model.safetensors`.

    Raises:
        CheckpointError: no such file, or not safetensors.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = Path(path)
    if path.is_dir() and (path / EXPORTED).is_file():
        path = path / EXPORTED
    path = find_checkpoint(path)
    try:
        tensors, info = read_checkpoint(path)
    except NotOursError:
        try:
            return load_file(path)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path}: not a readable safetensors file: {error}") from error
    return choose_weights(tensors, info, None)[0]


def model_of(path: str | Path) -> dict[str, Any]:
    """The settings "model" and "model_args" of what `weights_of` reads; {} where the files do not tell.

    Raises:
        CheckpointError: no such file, or a damaged one.
    """
    path = Path(path)
    stated = path / "config.json"
    if (path / EXPORTED).is_file() and stated.is_file():
        try:
            told = json.loads(stated.read_text(encoding="utf-8"))
            arguments = dict(told.get("model_args") or {})
            # These follow from the data.
            named = {name: value for name, value in arguments.items() if name not in DATA_ARGUMENTS}
            return {"model": told["architecture"], "model_args": named}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{stated}: cannot be read: {error}") from error
    try:
        info = read_info(find_checkpoint(path))
    except NotOursError:
        return {}
    return {"model": info.config.model, "model_args": dict(info.config.model_args)}


def choose_weights(
    tensors: dict[str, Tensor], info: CheckpointInfo, weights: str | None
) -> tuple[dict[str, Tensor], str]:
    """The state dict of a checkpoint, and which weights it is."""
    if weights not in (None, "ema", "model"):
        raise UserError(f"weights: expected ema or model, got {weights!r}")
    if info.kind == "weights":
        if weights not in (None, info.weights):
            raise CheckpointError(f"{info.path}: holds the {info.weights} weights only; take {LAST}")
        return tensors, info.weights
    has_ema = any(name.startswith("ema/") for name in tensors)
    if weights == "ema" and not has_ema:
        raise CheckpointError(f"{info.path}: the run keeps no moving average")
    kind = weights or ("ema" if has_ema else "model")
    return part(tensors, kind), kind


def part(tensors: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    """The tensors called `name/...`, without the prefix."""
    return {key[len(name) + 1 :]: t for key, t in tensors.items() if key.startswith(f"{name}/")}
