"""One step of the optimizer, eager or replayed as a CUDA graph."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from .objective import Objective

CLIP, BETAS = 1.0, (0.9, 0.99)
WARM_UP = 3
"""Eager steps before a capture, as PyTorch asks for."""


class Batch(NamedTuple):
    """Noisy pictures (B, 1, H, W), times (B,), classes (B,) and velocities (B, 1, H, W)."""

    x: Tensor
    t: Tensor
    labels: Tensor
    velocity: Tensor


class Stepper:
    """Steps of AdamW without weight decay, on what requires a gradient.

    A step of models this small is a thousand kernels of a few microseconds each: launched one by one they
    take several times as long as their work, so on CUDA they are captured once and replayed.

    Args:
        objective: what is minimised.
        amp: autocast to this dtype; None for none.
        graph: replay a CUDA graph; the device must be CUDA, and batches all of one size.
    """

    def __init__(self, objective: Objective, amp: torch.dtype | None, graph: bool) -> None:
        self.objective, self.amp = objective, amp
        self.learnt = [it for it in objective.model.parameters() if it.requires_grad]
        self.device = self.learnt[0].device
        self.fused = self.device.type == "cuda"
        # A graph reads the rate from memory.
        lr: float | Tensor = torch.zeros((), device=self.device) if graph else 0.0
        self.optimizer = torch.optim.AdamW(
            self.learnt, lr, BETAS, weight_decay=0.0, fused=self.fused, capturable=graph
        )
        self._capturing = graph
        self._graph: torch.cuda.CUDAGraph | None = None

    def warm_up(self, batch: Batch) -> None:
        """Compile and load whatever a step would, and capture it; weights and optimizer stay as they are."""
        before = self._snapshot()
        if self._capturing:
            side = torch.cuda.Stream(self.device)
            side.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(side):
                for _ in range(WARM_UP):
                    self._step(batch)
            torch.cuda.current_stream(self.device).wait_stream(side)
            self._inputs = Batch(*(tensor.clone() for tensor in batch))
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph):
                self._losses = self._step(self._inputs)
        else:
            self._step(batch)
            self.optimizer.zero_grad(set_to_none=True)
        self._restore(before)

    def __call__(self, batch: Batch, lr: float) -> dict[str, Tensor]:
        """Take a step; returns its losses, on the device."""
        for group in self.optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(lr)
            else:
                group["lr"] = lr
        if self._graph is None:
            return self._step(batch)
        for mine, given in zip(self._inputs, batch, strict=True):
            mine.copy_(given)
        self._graph.replay()
        return {name: loss.clone() for name, loss in self._losses.items()}

    def _step(self, batch: Batch) -> dict[str, Tensor]:
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(self.device.type, self.amp, enabled=self.amp is not None):
            losses = self.objective(*batch)
        losses["loss"].backward()
        nn.utils.clip_grad_norm_(self.learnt, CLIP)
        self.optimizer.step()
        return {name: loss.detach() for name, loss in losses.items()}

    def _snapshot(self) -> tuple[list[Tensor], dict[Tensor, dict[str, Tensor]]]:
        weights = [it.detach().clone() for it in self.learnt]
        state = {
            parameter: {name: value.clone() for name, value in values.items()}
            for parameter, values in self.optimizer.state.items()
        }
        return weights, state

    @torch.no_grad()
    def _restore(self, before: tuple[list[Tensor], dict[Tensor, dict[str, Tensor]]]) -> None:
        """In place: a graph keeps to the memory that it was captured with."""
        weights, state = before
        for parameter, weight in zip(self.learnt, weights, strict=True):
            parameter.copy_(weight)
        for owner, values in self.optimizer.state.items():
            for name, value in values.items():
                kept = state.get(owner, {}).get(name)
                # An optimizer that has not stepped yet counts from 0 and averages 0.
                value.zero_() if kept is None else value.copy_(kept)
