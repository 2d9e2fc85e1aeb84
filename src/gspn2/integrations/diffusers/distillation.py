"""What mixers learn from a frozen UNet: the noise, its predictions, and the outputs of what they replace."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, UNet2DConditionModel
from torch import Tensor, nn

from ..features import Watch, WithTeacher, relative_error, twin
from .mixers import UNetMixers
from .mounting import mount

LOSSES = ("noise", "teacher", "features")
PREDICTIONS = ("epsilon", "v_prediction")
"""What a teacher may predict: noise, or velocity."""


@dataclass
class Batch:
    """Inputs of a step, of one size.

    Args:
        latents, noise: (B, C, h, w).
        timesteps: (B,), whole numbers.
        prompt: `embeds` (B, N, D), and `pooled` (B, P) of SDXL.
        time_ids: (B, 6), for SDXL: original size, crop and size, each as rows and columns.
    """

    latents: Tensor
    noise: Tensor
    timesteps: Tensor
    prompt: dict[str, Tensor]
    time_ids: Tensor

    def to(self, device: torch.device) -> Batch:
        """On a device."""
        prompt = {name: tensor.to(device) for name, tensor in self.prompt.items()}
        tensors = (self.latents, self.noise, self.timesteps)
        latents, noise, timesteps = (tensor.to(device) for tensor in tensors)
        return Batch(latents, noise, timesteps, prompt, self.time_ids.to(device))


def schedule_of(scheduler: Any) -> DDPMScheduler:
    """The noise that a teacher was trained with, from its pipeline's scheduler.

    Raises:
        ValueError: it has no betas (that of EDM scales inputs and outputs by its own sigmas), or the teacher
            predicts something else than noise or velocity.
    """
    if not hasattr(scheduler, "alphas_cumprod"):
        raise ValueError(
            "scheduler: expected one with a schedule of betas (EulerDiscreteScheduler, DDIMScheduler ...),"
            f" got {type(scheduler).__name__}: its models were trained with another noise"
        )
    schedule = DDPMScheduler.from_config(scheduler.config)
    kind = schedule.config.prediction_type
    if kind not in PREDICTIONS:
        raise ValueError(f"scheduler: expected prediction of {' or '.join(PREDICTIONS)}, got {kind!r}")
    return schedule


class Distiller(WithTeacher):
    """A frozen UNet as the teacher, and its twin with mixers; both hold the same frozen tensors.

    Args:
        teacher: on its device; it is frozen and otherwise left as it is.
        scheduler: the pipeline's: its noise schedule and prediction type count.
        weights: of the losses, by the names in `LOSSES`.
        checkpointing: recompute the student's activations in the backward pass.
        options: of `mount`.

    Raises:
        ValueError: the UNet cannot be mounted, or `schedule_of` the scheduler cannot be.
    """

    # Both are held past nn.Module's registration: the student's tensors are all of them already.
    teacher: UNet2DConditionModel
    mixers: UNetMixers

    def __init__(
        self,
        teacher: UNet2DConditionModel,
        scheduler: Any,
        weights: dict[str, float],
        *,
        checkpointing: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(teacher)
        self.schedule = schedule_of(scheduler)
        teacher.requires_grad_(False).eval()
        self.student = twin(teacher)
        mixers = mount(self.student, **options)
        # What learns is float32, whatever the frozen weights are; autocast sees to the rest.
        mixers.float().requires_grad_(True).train()
        if checkpointing:
            self.student.enable_gradient_checkpointing()
        self.__dict__["mixers"] = mixers
        self.weights = dict(weights)
        names = [name for name, _ in mixers.layers()]
        self._watched = Watch(teacher, names), Watch(self.student, names)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Losses by name, and their weighted sum as `loss`; each a float32 scalar."""
        noisy = self.schedule.add_noise(batch.latents, batch.noise, batch.timesteps)
        if self.schedule.config.prediction_type == "v_prediction":
            target = self.schedule.get_velocity(batch.latents, batch.noise, batch.timesteps)
        else:
            target = batch.noise
        teachers, students = self._watched
        with torch.no_grad(), teachers.watching() as taught:
            expected = self._predict(self.teacher, noisy, batch)
        with students.watching() as learnt:
            predicted = self._predict(self.student, noisy, batch)
        features = [relative_error(learnt.pop(name), taught.pop(name)) for name in list(taught)]
        losses = {
            "noise": F.mse_loss(predicted.float(), target.float()),
            "teacher": F.mse_loss(predicted.float(), expected.float()),
            "features": torch.stack(features).mean(),
        }
        total = torch.stack([self.weights[name] * losses[name] for name in LOSSES]).sum()
        return {**losses, "loss": total}

    def _predict(self, unet: nn.Module, noisy: Tensor, batch: Batch) -> Tensor:
        more: dict[str, Any] = {}
        if "pooled" in batch.prompt:
            more["added_cond_kwargs"] = {"text_embeds": batch.prompt["pooled"], "time_ids": batch.time_ids}
        return unet(noisy, batch.timesteps, batch.prompt["embeds"], return_dict=False, **more)[0]


class Average:
    """A moving average of mixers' weights, warmed up so that the first steps do not weigh for long."""

    def __init__(self, mixers: UNetMixers, decay: float) -> None:
        self.decay = decay
        self.tensors = {name: p.detach().clone() for name, p in mixers.named_parameters()}

    @torch.no_grad()
    def update(self, mixers: UNetMixers, step: int) -> None:
        """Take in the weights after a step, counted from 0."""
        decay = min(self.decay, (1 + step) / (10 + step))
        for name, parameter in mixers.named_parameters():
            self.tensors[name].lerp_(parameter, 1 - decay)

    @contextlib.contextmanager
    def applied(self, mixers: UNetMixers) -> Iterator[None]:
        """The mixers with the average for their weights."""
        own = {name: p.detach().clone() for name, p in mixers.named_parameters()}
        _copy(mixers, self.tensors)
        try:
            yield
        finally:
            _copy(mixers, own)


@torch.no_grad()
def _copy(mixers: UNetMixers, tensors: dict[str, Tensor]) -> None:
    for name, parameter in mixers.named_parameters():
        parameter.copy_(tensors[name])
