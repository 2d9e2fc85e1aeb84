"""Accuracy, loss and speed of a model on labeled images."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .distributed import World
from .errors import DataError


@dataclass(frozen=True)
class Evaluation:
    """What a model does on a set of images.

    Args:
        top1, top5: percentage of images whose class is the likeliest, or among the five likeliest (or of all
            classes, where there are fewer).
        loss: mean cross-entropy, without label smoothing.
        confusion: (classes, classes) counts; row: true class, column: predicted class.
        images: how many.
        seconds: wall-clock time of everything, loading included.
        model_seconds: of the forward passes alone.
        batch_size: largest batch.
        device: where the model ran.
        threads: of PyTorch on the CPU.
    """

    top1: float
    top5: float
    loss: float
    confusion: Tensor
    images: int
    seconds: float
    model_seconds: float
    batch_size: int
    device: str
    threads: int

    @property
    def images_per_second(self) -> float:
        """Of the forward passes alone."""
        return self.images / self.model_seconds if self.model_seconds > 0 else 0.0


@torch.no_grad()
def evaluate(
    model: nn.Module,
    loader: Iterable[tuple[Tensor, Tensor]],
    *,
    device: torch.device | str | None = None,
    amp: torch.dtype | None = None,
    channels_last: bool = False,
    warm_up: bool = False,
    on_batch: Callable[[int], None] | None = None,
    world: World | None = None,
) -> Evaluation:
    """Run a model over batches of images and compare with their labels.

    Args:
        model: input (N, in_chans, H, W) to logits (N, classes); left in the mode it came in.
        loader: batches (input, label (N,)), see `eval_loader`.
        device: where the model is; None asks its first parameter.
        amp: autocast to this dtype; None for none.
        channels_last: hand inputs over channel-innermost.
        warm_up: run the first batch once more beforehand, untimed: kernels get compiled and loaded.
        on_batch: called with the number of images done after each batch.
        world: processes that share the images; the result is that of all of them together.

    Raises:
        DataError: there is no image, or none that can be read.
    """
    started = time.perf_counter()
    world = world or World()
    device = torch.device(device) if device is not None else next(model.parameters()).device
    was_training = model.training
    model.eval()
    layout = torch.channels_last if channels_last else torch.preserve_format
    # Images, hits among five, loss; float64 counts exactly up to 2^53.
    sums = torch.zeros(3, dtype=torch.float64)
    confusion: Tensor | None = None
    largest = 0
    model_seconds = 0.0
    try:
        for inputs, labels in loader:
            inputs = inputs.to(device, non_blocking=True, memory_format=layout)
            labels = labels.to(device, non_blocking=True)
            if warm_up and confusion is None:
                with torch.autocast(device.type, amp, enabled=amp is not None):
                    model(inputs)
            _wait(device)
            before = time.perf_counter()
            with torch.autocast(device.type, amp, enabled=amp is not None):
                logits = model(inputs)
            _wait(device)
            model_seconds += time.perf_counter() - before
            counted = _count(logits.float(), labels)
            confusion = counted[0] if confusion is None else confusion + counted[0]
            sums += counted[1]
            largest = max(largest, len(labels))
            if on_batch is not None:
                on_batch(int(sums[0]))
    finally:
        model.train(was_training)
    confusion, sums = _add_up(confusion, sums, world)
    images = int(sums[0])
    return Evaluation(
        top1=100 * int(confusion.trace()) / images,
        top5=100 * int(sums[1]) / images,
        loss=float(sums[2]) / images,
        confusion=confusion,
        images=images,
        seconds=time.perf_counter() - started,
        model_seconds=model_seconds,
        batch_size=largest,
        device=device.type,
        threads=torch.get_num_threads(),
    )


def _count(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Confusion matrix of a batch, and images, hits among five and loss as a sum."""
    classes = logits.shape[1]
    pairs = (labels * classes + logits.argmax(1)).cpu()
    confusion = torch.bincount(pairs, minlength=classes**2).view(classes, classes)
    hits = int((logits.topk(min(5, classes)).indices == labels[:, None]).sum())
    loss = float(F.cross_entropy(logits, labels, reduction="sum"))
    return confusion, torch.tensor([len(labels), hits, loss], dtype=torch.float64)


def _add_up(confusion: Tensor | None, sums: Tensor, world: World) -> tuple[Tensor, Tensor]:
    # A process may have got no image: it learns the number of classes from the others.
    (classes,) = world.agree(0 if confusion is None else len(confusion))
    if classes == 0:
        raise DataError("loader: expected at least one image that can be read, got none")
    if confusion is None:
        confusion = torch.zeros(classes, classes, dtype=torch.int64)
    return world.sum(confusion), world.sum(sums)


def _wait(device: torch.device) -> None:
    """Kernels run behind the caller's back on CUDA: wait before looking at a clock."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
