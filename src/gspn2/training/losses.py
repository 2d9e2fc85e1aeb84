"""What is minimised: cross-entropy of mixed and smoothed targets, MESA, distillation."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import TrainConfig
from .errors import UserError
from .model import check_model_name
from .transforms import Preprocess

if TYPE_CHECKING:
    from timm.data import Mixup

Criterion = Callable[[Tensor, Tensor], Tensor]
MESA_TEMPERATURE = 5.0


def make_loss(config: TrainConfig, classes: int) -> tuple[Mixup | None, Criterion]:
    """The mixing of a batch, if any, and the loss on logits (N, classes) that goes with it."""
    if config.mixup == 0 and config.cutmix == 0:
        return None, nn.CrossEntropyLoss(label_smoothing=config.label_smoothing)
    from timm.data import Mixup
    from timm.loss import SoftTargetCrossEntropy

    mixup = Mixup(config.mixup, config.cutmix, label_smoothing=config.label_smoothing, num_classes=classes)
    return mixup, SoftTargetCrossEntropy()


def divergence(logits: Tensor, target_logits: Tensor, temperature: float) -> Tensor:
    """KL(target || prediction) of logits (N, classes) at a temperature, times its square, mean over N.

    The square keeps gradients of one size whatever the temperature (Hinton et al., arXiv 1503.02531).
    """
    target = F.log_softmax(target_logits.float() / temperature, dim=1)
    prediction = F.log_softmax(logits.float() / temperature, dim=1)
    return F.kl_div(prediction, target, reduction="batchmean", log_target=True) * temperature**2


class Teacher(nn.Module):
    """A frozen model that is asked about the student's own inputs.

    Args:
        model: input (N, in_chans, H, W), normalised by `mean` and `std`, to logits (N, classes).
        mean, std: of the teacher, by channel.
        student: how the inputs come.
    """

    scale: Tensor
    shift: Tensor

    def __init__(
        self, model: nn.Module, mean: tuple[float, ...], std: tuple[float, ...], student: Preprocess
    ) -> None:
        super().__init__()
        self.model = model.eval().requires_grad_(False)
        ours_mean, ours_std = torch.tensor(student.mean), torch.tensor(student.std)
        theirs_mean, theirs_std = torch.tensor(mean), torch.tensor(std)
        if len(theirs_mean) != len(ours_mean):
            raise UserError(f"teacher: takes {len(theirs_mean)} channels, the images have {len(ours_mean)}")
        self.register_buffer("scale", (ours_std / theirs_std)[:, None, None])
        self.register_buffer("shift", ((ours_mean - theirs_mean) / theirs_std)[:, None, None])

    def forward(self, inputs: Tensor) -> Tensor:
        return self.model(inputs * self.scale + self.shift)


def make_teacher(config: TrainConfig, preprocess: Preprocess, class_names: tuple[str, ...]) -> Teacher | None:
    """The teacher that `config` names, or None.

    Raises:
        UserError: no such model or checkpoint, other classes than the data's, other channels, a size that
            it does not take.
    """
    if config.teacher is None:
        return None
    if Path(config.teacher).exists():
        teacher = _own_teacher(config.teacher, preprocess, class_names)
    else:
        teacher = _timm_teacher(config.teacher, preprocess, len(class_names))
    try:
        with torch.no_grad():
            out = teacher(torch.zeros(1, preprocess.in_chans, *preprocess.image_size))
    except Exception as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"teacher: does not take images of {preprocess.image_size}: {reason}") from error
    if out.shape != (1, len(class_names)):
        raise UserError(f"teacher: has {out.shape[-1]} classes, the data {len(class_names)}")
    return teacher


def _own_teacher(path: str, preprocess: Preprocess, class_names: tuple[str, ...]) -> Teacher:
    from .checkpoint import load_checkpoint

    model, info = load_checkpoint(path)
    if info.class_names != class_names:
        raise UserError(f"teacher: {path} was trained for other classes than those of the data")
    return Teacher(model, info.preprocess.mean, info.preprocess.std, preprocess)


def _timm_teacher(name: str, preprocess: Preprocess, classes: int) -> Teacher:
    import timm

    check_model_name(name, "teacher")
    arguments: dict[str, Any] = {}
    cfg = timm.get_pretrained_cfg(name) if ":" not in name else None
    if cfg and cfg.fixed_input_size:
        arguments["img_size"] = preprocess.image_size
    try:
        # The number of classes is the teacher's own: a fresh classifier would teach nothing.
        model = timm.create_model(name, pretrained=True, **arguments)
    except (RuntimeError, ValueError, TypeError, OSError) as error:
        raise UserError(f"teacher {name}: {(str(error) or repr(error)).splitlines()[0]}") from error
    own: Any = model.pretrained_cfg
    return Teacher(model, tuple(own["mean"]), tuple(own["std"]), preprocess)
