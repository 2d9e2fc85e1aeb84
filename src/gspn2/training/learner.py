"""Model, average, teacher and optimizer, and what one step does to them."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from .config import TrainConfig
from .distributed import World, replicated
from .errors import UserError
from .losses import MESA_TEMPERATURE, Teacher, divergence, make_loss
from .rng import derive_seed, seed_everything
from .sharding import compile_shares, same_buffers, shard, update_average

if TYPE_CHECKING:
    from timm.utils import ModelEmaV3

Batch = tuple[Tensor, Tensor]
"""Inputs (N, in_chans, H, W) and labels (N,)."""


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW with timm's parameter groups: no decay on biases, norms and `model.no_weight_decay()`.

    On a GPU each group is one pass over memory, instead of one for every operation of the update.
    """
    from timm.optim import create_optimizer_v2

    fused: dict[str, Any] = {"fused": True} if next(model.parameters()).is_cuda else {}
    return create_optimizer_v2(
        model,
        opt="adamw",
        lr=config.peak_lr,
        weight_decay=config.weight_decay,
        layer_decay=config.layer_decay,
        betas=config.betas,
        **fused,
    )


def make_ema(model: nn.Module, decay: float | None) -> ModelEmaV3 | None:
    """The moving average, whose decay grows from 0 towards `decay`: of use to short runs, too."""
    from timm.utils import ModelEmaV3

    return None if decay is None else ModelEmaV3(model, decay=decay, use_warmup=True)


class Learner:
    """What learns. Weights start alike in all processes, and stay so: gradients are averaged.

    Args:
        config: the recipe.
        model: fresh or restored, on the CPU.
        classes: of the data.
        device: where to compute.
        amp: autocast to this dtype; None for none.
        world: the processes that train together.
        teacher: to distil from.

    Raises:
        UserError: gradient checkpointing of a model that has none, sharding of one that cannot be sharded,
            CUDA graphs of several processes.
    """

    def __init__(
        self,
        config: TrainConfig,
        model: nn.Module,
        classes: int,
        device: torch.device,
        amp: torch.dtype | None = None,
        world: World | None = None,
        teacher: Teacher | None = None,
    ) -> None:
        self.config = config
        self.device = device
        self.amp = amp
        self.world = world or World()
        self.layout = torch.channels_last if config.channels_last else torch.preserve_format
        self.sharded = config.shard and self.world.size > 1
        if config.graphs and self.world.size > 1:
            raise UserError(f"graphs: of one process only, there are {self.world.size}")
        if config.grad_checkpointing:
            _checkpoint_activations(model, config.model)
        if self.world.size > 1 and device.type == "cuda":
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        # Shares are rows of contiguous weights; the layout of images stays what it is.
        layout = torch.preserve_format if self.sharded else self.layout
        self.model: nn.Module = model.to(device).to(memory_format=layout)  # type: ignore[call-overload]
        self.ema = make_ema(self.model, config.ema_decay)
        if self.sharded:
            for module in (self.model, *([] if self.ema is None else [self.ema.module])):
                shard(module, device, self.world, config.compile)
        self.optimizer = make_optimizer(self.model, config)
        self.mixup, self.criterion = make_loss(config, classes)
        self.teacher = None if teacher is None else teacher.to(device)
        self._parallel = self._distribute()
        self._forward = self._compiled(self._parallel)
        self._average: Any = None if self.ema is None else self._compiled(self.ema.module)

    def _compiled(self, module: nn.Module) -> Any:
        """What runs a module: itself, unless the settings ask for `torch.compile`."""
        if not self.config.compile:
            return module
        if self.sharded:
            return compile_shares(module)
        return torch.compile(module, mode="reduce-overhead" if self.config.graphs else None)

    def _distribute(self) -> nn.Module:
        if self.world.size == 1 or self.sharded:
            return self.model
        return replicated(self.model, self.device)

    @property
    def tested(self) -> nn.Module:
        """The model whose accuracy counts: the average where there is one."""
        return self.model if self.ema is None else self.ema.module

    def step(self, step: int, lr: float, epochs: float, parts: Sequence[Batch]) -> tuple[Tensor, Tensor]:
        """One step of the optimizer on this process's share of a batch.

        Args:
            step: steps before this one.
            lr: learning rate.
            epochs: passes over the data before this step.
            parts: the share, in `config.accumulate` parts.

        Returns:
            The mean loss of this process's share and the norm of the whole gradient, on the device.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)
        self.optimizer.zero_grad(set_to_none=True)
        if self.config.graphs:
            # What the last step's graphs have put out may be overwritten.
            torch.compiler.cudagraph_mark_step_begin()
        if self.sharded and self.device.type == "cpu":
            same_buffers(self.model)  # elsewhere batch norms are synchronised
        losses = []
        for number, part in enumerate(parts):
            inputs, targets = self.prepare(step, number, part)
            waiting = number < len(parts) - 1 and isinstance(self._parallel, DistributedDataParallel)
            with self._parallel.no_sync() if waiting else contextlib.nullcontext():  # type: ignore[operator]
                loss = self._loss(inputs, targets, epochs) / len(parts)
                loss.backward()
            losses.append(loss.detach())
        limit = self.config.clip_grad or math.inf
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), limit)
        if isinstance(norm, DTensor):
            norm = norm.full_tensor()
        self.optimizer.step()
        if self.ema is not None and self.sharded:
            update_average(self.ema, self.model, step + 1)
        elif self.ema is not None:
            self.ema.update(self.model, step=step + 1)
        return torch.stack(losses).sum(), norm.detach()

    def prepare(self, step: int, number: int, part: Batch) -> Batch:
        """Start the random generators for a part of a step's batch, move it to the device and mix it."""
        # All parts of a batch are mixed alike; each drops activations of its own.
        seed_everything(derive_seed(self.config.seed, "step", step))
        inputs = part[0].to(self.device, non_blocking=True, memory_format=self.layout)
        targets = part[1].to(self.device, non_blocking=True)
        if self.mixup is not None:
            inputs, targets = self.mixup(inputs, targets)
        place = self.world.rank * self.config.accumulate + number
        if place:
            torch.manual_seed(derive_seed(self.config.seed, "part", step, place))
        return inputs, targets

    def _loss(self, inputs: Tensor, targets: Tensor, epochs: float) -> Tensor:
        config = self.config
        with torch.autocast(self.device.type, self.amp, enabled=self.amp is not None):
            logits = self._forward(inputs).float()
            with torch.no_grad():
                asks = config.mesa > 0 and epochs >= config.mesa_start
                average = self._average(inputs).float() if asks else None
                taught = None if self.teacher is None else self.teacher(inputs).float()
        loss = self.criterion(logits, targets)
        if taught is not None:
            loss = (1 - config.teacher_weight) * loss + config.teacher_weight * self._taught(logits, taught)
        if average is not None:
            loss = loss + config.mesa * divergence(logits, average, MESA_TEMPERATURE)
        return loss

    def _taught(self, logits: Tensor, taught: Tensor) -> Tensor:
        if self.config.teacher_hard:
            return nn.functional.cross_entropy(logits, taught.argmax(1))
        return divergence(logits, taught, self.config.teacher_temperature)


def _checkpoint_activations(model: nn.Module, name: str) -> None:
    try:
        model.set_grad_checkpointing(True)  # type: ignore[operator]
    except (AttributeError, AssertionError, NotImplementedError) as error:
        raise UserError(f"grad_checkpointing: {name} cannot recompute its activations") from error
