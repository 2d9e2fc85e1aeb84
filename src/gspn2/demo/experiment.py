"""Two trainings that differ in the model alone, and a look inside the propagating one."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..nn import Mixer, Operands
from ..training import Data, TrainConfig, eval_loader, evaluate, load_checkpoint, load_data, train
from ..training.events import EpochDone, Event
from .maps import Pixel, propagation_map
from .material import LayerMaps, Trained

EPOCHS, BATCH_SIZE = 14, 32
MAP_CLASS = 3
"""Digit under the propagation maps: it has strokes in every direction."""


@dataclass(frozen=True)
class Contestant:
    """A model of the comparison.

    Args:
        key: "gspn" or "attention".
        label, description: for people.
        model, model_args: for `timm.create_model`.
    """

    key: str
    label: str
    description: str
    model: str
    model_args: dict[str, Any]

    def config(self, shared: TrainConfig, out: Path) -> TrainConfig:
        """The shared settings with this model in them."""
        return dataclasses.replace(
            shared, model=self.model, model_args=self.model_args, out=str(out / self.key)
        )


# Six blocks, 64 channels at the end and convolutions within in both, and sizes within 2%. Small kernels
# (3 x 3, not 7 x 7) leave far-reaching mixing to the propagation.
GSPN = Contestant(
    "gspn",
    "GSPN-2",
    "2 blocks of 32 channels on a 16 x 16 grid, then 4 of 64 on 8 x 8; 8 proxy channels",
    "test_gspn2",
    {
        "depths": (2, 4),
        "dims": (32, 64),
        "stem_stride": 2,
        "proxy_dim": 8,
        "chunk": (None, None),
        "kernel_size": 3,
    },
)
# A transformer with convolutions: a plain ViT of this size was below 40% after as many steps of the recipe,
# which says how much data it needs and little about attention. sr_ratios 1: every token attends to all.
ATTENTION = Contestant(
    "attention",
    "Attention (PVT v2)",
    "6 blocks of 64 channels on an 8 x 8 grid; every token attends to all, 2 heads",
    "pvt_v2_b0",
    {"depths": (6,), "embed_dims": (64,), "num_heads": (2,), "sr_ratios": (1,), "mlp_ratios": (3.5,)},
)


def settings(quick: bool, seed: int, epochs: int | None = None, batch_size: int | None = None) -> TrainConfig:
    """What both trainings share. The quick ones only show that everything runs."""
    return TrainConfig(
        data="digits",
        image_size=(16, 16) if quick else (32, 32),
        epochs=epochs or (1 if quick else EPOCHS),
        batch_size=batch_size or (128 if quick else BATCH_SIZE),
        lr=3e-3,
        warmup_epochs=0 if quick else 2,
        ema_decay=None,
        channels_last=True,
        device="cpu",
        seed=seed,
    )


def recipe(config: TrainConfig, data: Data) -> str:
    """The shared training in two sentences."""
    height, width = data.preprocess.image_size
    epochs = "1 epoch" if config.epochs == 1 else f"{config.epochs} epochs"
    return (
        f"Both saw the same {len(data.train)} training images in the same order, enlarged from 8 x 8 to "
        f"{height} x {width} and turned, moved and scaled a little: {epochs} in batches of "
        f"{config.batch_size}, AdamW with a peak rate of {config.lr:g}, {config.warmup_epochs:g} epochs of "
        f"warm-up, cosine decay, weight decay {config.weight_decay:g}, label smoothing "
        f"{config.label_smoothing:g}, gradients clipped at {config.clip_grad:g}. The training loss is that "
        "of smoothed labels and altered images, so it stays above the test loss. What counts in the end are "
        "the last epoch's weights, not the best ones: the test images choose nothing."
    )


def run(
    contestant: Contestant, config: TrainConfig, on_event: Callable[[Event], None]
) -> tuple[Trained, nn.Module]:
    """Train one contestant and test what comes out at the end; returns the figures and the model.

    The last epoch's weights are tested, not the best epoch's: the test images choose nothing.

    Raises:
        Interrupted, TrainingFailed, UserError: as for `gspn2.training.train`.
    """
    epochs: list[dict[str, float]] = []

    def note(event: Event) -> None:
        if isinstance(event, EpochDone):
            row = event.row
            epochs.append(
                {
                    "epoch": row.epoch,
                    "train_loss": row.train_loss,
                    "test_loss": row.test_loss,
                    "test_top1": row.top1,
                }
            )
        on_event(event)

    result = train(config, on_event=note, overwrite=True)
    model, _ = load_checkpoint(result.last)
    data = load_data(config)
    evaluation = evaluate(model, eval_loader(data.test))
    return Trained(
        key=contestant.key,
        label=contestant.label,
        description=contestant.description,
        parameters=result.parameters,
        seconds=result.seconds,
        epochs=epochs,
        accuracy=evaluation.top1,
        confusion=evaluation.confusion.tolist(),
        probabilities=probabilities(model, data),
    ), model


@torch.inference_mode()
def probabilities(model: nn.Module, data: Data) -> Tensor:
    """Class probabilities (N, classes) on the test images."""
    return torch.cat([model(inputs).softmax(-1) for inputs, _ in eval_loader(data.test)])


def raw_images(data: Data) -> Tensor:
    """The test images (N, H, W) as they were stored, 0 to 1."""
    import numpy as np

    pixels = [np.asarray(data.test.image(i).convert("L")) for i in range(len(data.test))]
    return torch.from_numpy(np.stack(pixels)).float() / 255


@torch.no_grad()
def captured_operands(model: nn.Module, inputs: Tensor) -> list[tuple[str, Mixer, Operands]]:
    """What every mixer of a model propagates for the inputs, in the order they run."""
    found: list[tuple[str, Mixer, Operands]] = []
    hooks = [
        module.register_forward_pre_hook(
            lambda mixer, args, name=name: found.append((name, mixer, mixer.operands(args[0])))
        )
        for name, module in model.named_modules()
        if isinstance(module, Mixer)
    ]
    try:
        model(inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def labels(data: Data) -> Tensor:
    """Classes of the test images (N,)."""
    return torch.tensor(data.test.labels)


def map_image(data: Data, probabilities: Tensor) -> int:
    """The test image to look inside with: of `MAP_CLASS`, the one the model is surest of."""
    return int((probabilities[:, MAP_CLASS] * (labels(data) == MAP_CLASS)).argmax())


def look_inside(model: nn.Module, data: Data, image: int) -> list[LayerMaps]:
    """Propagation maps of the first and the last mixer that have a grid worth a picture."""
    inputs, _ = data.test[image]
    mixers = captured_operands(model, inputs[None])
    side = min(8, max(min(operands.x.shape[-2:]) for *_, operands in mixers))
    shown = [
        (i, mixer, operands)
        for i, (_, mixer, operands) in enumerate(mixers)
        if min(operands.x.shape[-2:]) >= side
    ]
    layers = []
    for when, (i, mixer, operands) in (("Early", shown[0]), ("Late", shown[-1])):
        height, width = operands.x.shape[-2:]
        pixels = chosen_pixels(inputs.mean(0), height, width)
        layers.append(
            LayerMaps(
                title=f"{when}: mixer {i + 1} of {len(mixers)}",
                text=_describe(mixer, height, width),
                directions=mixer.directions,
                names=list(pixels),
                maps=[
                    propagation_map(operands, pixel, mixer.directions, mixer.chunk)
                    for pixel in pixels.values()
                ],
            )
        )
    return layers


def chosen_pixels(image: Tensor, height: int, width: int) -> dict[str, Pixel]:
    """Three places worth looking at on a height x width grid under an image (h, w), by name.

    Inside the image, so that every direction has somewhere to go: the inkiest places near a quarter and three
    quarters of the height, and the emptiest one at half height near the left side.
    """
    ink = torch.nn.functional.adaptive_avg_pool2d(image[None, None], (height, width))[0, 0]
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")

    def best(score: Tensor, row: float, column: float) -> Pixel:
        distance = ((rows + 0.5) / height - row) ** 2 + ((columns + 0.5) / width - column) ** 2
        row_index, column_index = divmod(int((score - 25 * distance).argmax()), width)
        return row_index, column_index

    ink = (ink - ink.min()) / (ink.max() - ink.min()).clamp_min(1e-12)
    return {
        "On the stroke, upper half": best(ink, 0.25, 0.5),
        "On the stroke, lower half": best(ink, 0.75, 0.5),
        "In the background": best(-ink, 0.5, 0.2),
    }


def _describe(mixer: Mixer, height: int, width: int) -> str:
    span = "the whole image" if mixer.chunk is None else f"segments of {mixer.chunk} lines"
    return f"{height} x {width} grid, {mixer.proxy_dim} proxy channels, scans over {span}."
