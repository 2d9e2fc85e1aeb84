"""Models by name, through timm's registry."""

from __future__ import annotations

import difflib
import sys

import torch
from torch import nn

from .config import TrainConfig
from .errors import CheckpointError, UserError
from .transforms import Preprocess


def check_model_name(name: str, setting: str = "model") -> None:
    """Raise a UserError that suggests close names unless timm can make the model; `setting` said so."""
    import timm

    import gspn2.models  # noqa: F401 - registers ours

    if name.startswith(("hf-hub:", "hf_hub:", "local-dir:")) or timm.is_model(name):
        return
    close = difflib.get_close_matches(name, timm.list_models(), n=4, cutoff=0.5)
    hint = f"; did you mean {', '.join(close)}?" if close else ""
    raise UserError(f"{setting}: timm has no model {name!r}{hint}")


def build_model(
    config: TrainConfig, preprocess: Preprocess, num_classes: int, pretrained: bool = False
) -> nn.Module:
    """The model of `config` for these classes and this input; tried once on an empty image.

    Raises:
        UserError: no model of that name, an argument it does not take, an image size it does not take.
    """
    import timm

    check_model_name(config.model)
    arguments = dict(config.model_args)
    cfg = timm.get_pretrained_cfg(config.model)
    if cfg and cfg.fixed_input_size:
        # Position embeddings and windows are made for one size.
        arguments.setdefault("img_size", preprocess.image_size)
    if config.drop_path > 0:
        arguments.setdefault("drop_path_rate", config.drop_path)
    try:
        model = timm.create_model(
            config.model, pretrained, num_classes=num_classes, in_chans=preprocess.in_chans, **arguments
        )
    # OSError: weights that cannot be fetched.
    except (TypeError, ValueError, RuntimeError, AssertionError, OSError) as error:
        raise UserError(f"model {config.model}: {_first_line(error)}") from error
    _check_image_size(model, config.model, preprocess, num_classes)
    return model


def start_weights(model: nn.Module, config: TrainConfig) -> None:
    """Load the weights of `config.init_from`, if any, but for a classifier of another number of classes.

    Where a model of timm's knows how to fit weights to another image size (position embeddings), it does.

    Raises:
        CheckpointError: no such file, or weights of another model.
    """
    if config.init_from is None:
        return
    from .checkpoint import weights_of

    state = weights_of(config.init_from)
    fit = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    if fit is not None:
        state = fit(state, model)
    own = model.state_dict()
    heads = _classifiers(model)
    state = {
        name: tensor
        for name, tensor in state.items()
        if not (name.startswith(heads) and name in own and own[name].shape != tensor.shape)
    }
    try:
        missing, unexpected = model.load_state_dict(state, strict=False)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(
            f"{config.init_from}: weights do not fit {config.model}: {reason[:300]}"
        ) from error
    wrong = [name for name in missing if not name.startswith(heads)] + list(unexpected)
    if wrong:
        raise CheckpointError(
            f"{config.init_from}: weights do not fit {config.model}: {', '.join(wrong[:5])}"
        )


def _classifiers(model: nn.Module) -> tuple[str, ...]:
    names = getattr(model, "pretrained_cfg", {}).get("classifier") or ()
    return tuple(f"{name}." for name in ((names,) if isinstance(names, str) else names))


@torch.no_grad()
def _check_image_size(model: nn.Module, name: str, preprocess: Preprocess, num_classes: int) -> None:
    height, width = preprocess.image_size
    model.eval()
    try:
        out = model(torch.zeros(1, preprocess.in_chans, height, width))
    except Exception as error:
        raise UserError(
            f"image size: {name} does not take {height} x {width}: {_first_line(error)}"
        ) from error
    finally:
        model.train()
    if out.shape != (1, num_classes):
        raise UserError(f"model {name}: expected logits (1, {num_classes}), got {tuple(out.shape)}")


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def pick_device(name: str, number: int | None = None) -> torch.device:
    """The device called `name`; "auto" is CUDA where there is one.

    Args:
        name: as `torch.device` takes it.
        number: of several processes on a machine each takes the device of its number.

    Raises:
        UserError: torch does not know the name, or the machine does not have the device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and number is not None:
        torch.cuda.set_device(number)
        name = f"cuda:{number}"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # "meta" has tensors without values
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(f"device: {name!r} cannot be used: {_first_line(error)}") from error
    return device


def amp_dtype(amp: str, device: torch.device) -> torch.dtype | None:
    """What autocast computes in, or None for none: "auto" takes bfloat16 where it is faster, on CUDA."""
    if amp == "bf16" or (amp == "auto" and device.type == "cuda"):
        return torch.bfloat16
    return None
