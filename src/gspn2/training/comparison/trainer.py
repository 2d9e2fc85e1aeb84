"""The training step of a comparison, whole on the device; on CUDA it is captured once and replayed."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..config import TrainConfig
from ..learner import make_optimizer
from .images import Images, inputs, posed

WARM_UP = 3
"""Steps before capture, at a learning rate of 0: libraries choose their algorithms, kernels are compiled."""


class Block(NamedTuple):
    """What S steps take, on the CPU.

    Args:
        chosen: numbers of images, (S, N), int64.
        poses: which of a square's eight positions each is seen in, (S, 3, N), bool.
        rates: learning rates, (S,), float32.
    """

    chosen: Tensor
    poses: Tensor
    rates: Tensor


def judged(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Losses, is it right, and does it count: for each of the `labels` (see `Images`), float32."""
    logits = logits.float()
    if labels.ndim == 1:
        losses = nn.functional.cross_entropy(logits, labels, reduction="none")
        return losses, (logits.argmax(1) == labels).float(), torch.ones_like(losses)
    counts, truth = (labels > 0).float(), labels == 2
    losses = nn.functional.binary_cross_entropy_with_logits(logits, truth.float(), reduction="none")
    return losses * counts, ((logits > 0) == truth) * counts, counts


def _compiled(model: nn.Module) -> Any:
    # Graphs are kept for all models of a kind, but for eight kinds in a process unless told otherwise.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    return torch.compile(model, dynamic=False)


class Trainer:
    """A model and its AdamW, stepped a block at a time.

    A small model's step is some hundred kernels of a few microseconds: launched one by one, they would wait
    for the CPU. So a CUDA graph holds the whole step, from picking the images to the optimizer, and reads
    what differs from step to step out of tables on the device.

    Args:
        config: weight decay, betas and clipping.
        model: fresh, on the CPU.
        images: to train on, on `device`.
        device: where to compute.
        amp: autocast to this dtype; None for none.
        block: the most steps of a block.
        size: images of a step.
        compile: run forward and backward of the step through `torch.compile`; tests are run as they are, at
            sizes that would each be compiled anew.
    """

    ema = None
    """As a learner has it, for `state.learner_tensors`."""

    def __init__(
        self,
        config: TrainConfig,
        model: nn.Module,
        images: Images,
        device: torch.device,
        amp: torch.dtype | None,
        block: int,
        size: int,
        compile: bool = False,
    ) -> None:
        self.config, self.images, self.device, self.amp = config, images, device, amp
        self.model: nn.Module = model.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._forward: Any = _compiled(self.model) if compile else self.model
        self.rate = torch.zeros((), device=device)
        self.optimizer = self._optimizer()
        self._table = Block(
            torch.zeros(block, size, dtype=torch.int64, device=device),
            torch.zeros(block, 3, size, dtype=torch.bool, device=device),
            torch.zeros(block, device=device),
        )
        self._losses = torch.zeros(block, device=device)
        self._row = torch.zeros(1, dtype=torch.int64, device=device)
        self._graph: torch.cuda.CUDAGraph | None = None

    def _optimizer(self) -> torch.optim.AdamW:
        groups = make_optimizer(self.model, self.config).param_groups
        kept = [{"params": group["params"], "weight_decay": group["weight_decay"]} for group in groups]
        # A rate on the device, so that a captured step can change it.
        on_cuda = self.device.type == "cuda"
        return torch.optim.AdamW(
            kept, lr=self.rate, betas=self.config.betas, fused=on_cuda, capturable=on_cuda
        )

    def prepare(self) -> None:
        """Make ready for the first step: warm up and capture. Weights and optimizer stay what they are.

        After restoring a checkpoint, since a captured step knows tensors by their address.
        """
        for group in self.optimizer.param_groups:
            # Restoring puts a copy there.
            group["lr"] = self.rate
        if self.device.type != "cuda":
            return
        weights = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
        state = self.optimizer.state
        kept = {key: {name: it.clone() for name, it in state[key].items()} for key in state}
        self.model.train()
        self.rate.zero_()
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                self._row.zero_()
                self._step()
            self.optimizer.zero_grad(set_to_none=True)
        torch.cuda.current_stream(self.device).wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        self._row.zero_()
        with torch.cuda.graph(self._graph, stream=stream, capture_error_mode="thread_local"):
            self._step()
        with torch.no_grad():
            for name, tensor in self.model.state_dict().items():
                tensor.copy_(weights[name])
            for key, values in self.optimizer.state.items():
                for name, it in values.items():
                    it.copy_(kept[key][name]) if key in kept else it.zero_()

    def run(self, block: Block) -> Tensor:
        """The steps of a block; their losses (S,), on the device. Waits for nothing."""
        steps = len(block.rates)
        for table, values in zip(self._table, block, strict=True):
            table[:steps].copy_(values, non_blocking=True)
        self._row.zero_()
        self.model.train()
        for _ in range(steps):
            if self._graph is None:
                self._step()
            else:
                self._graph.replay()
        return self._losses[:steps].clone()

    def _step(self) -> None:
        """The step that `_row` is at, and on to the next row."""
        chosen, poses, rate = (table.index_select(0, self._row)[0] for table in self._table)
        pixels, labels = (
            self.images.pixels.index_select(0, chosen),
            self.images.labels.index_select(0, chosen),
        )
        if self.images.mirrored:
            pixels = posed(pixels, poses)
            labels = posed(labels, poses) if labels.ndim > 1 else labels
        batch = inputs(self.images, pixels).to(memory_format=torch.channels_last)
        self.rate.copy_(rate)
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(self.device.type, self.amp, enabled=self.amp is not None):
            logits = self._forward(batch)
        losses, _, counts = judged(logits, labels)
        loss = losses.sum() / counts.sum()
        loss.backward()
        if self.config.clip_grad is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip_grad)
        self.optimizer.step()
        self._losses.index_copy_(0, self._row, loss.detach()[None])
        self._row += 1

    def test(self, images: Images, size: int) -> tuple[float, float]:
        """Mean loss and accuracy on images of any resolution, `size` at a time."""
        model = self.model.eval()
        sums = torch.zeros(3, dtype=torch.float64, device=self.device)
        with torch.inference_mode():
            for start in range(0, len(images.labels), size):
                labels = images.labels[start : start + size]
                pixels = inputs(images, images.pixels[start : start + size])
                batch = pixels.to(memory_format=torch.channels_last)
                with torch.autocast(self.device.type, self.amp, enabled=self.amp is not None):
                    logits = model(batch)
                sums += torch.stack([it.sum().double() for it in judged(logits, labels)])
        loss, right, count = sums.tolist()
        return loss / count, right / count
