"""Everything that decides a training run, as one JSON-serialisable value."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .errors import UserError

FREE_ON_RESUME = ("out", "device", "workers", "checkpoint_every", "tensorboard", "shard")
"""Settings that do not change what is computed, so that a resumed run may change them."""


@dataclass(frozen=True)
class TrainConfig:
    """Settings of `train`.

    Args:
        data: "digits" (scikit-learn's 1797 handwritten digits of 8 x 8); a folder of class folders, or with
            `train/` and `val/` (or `test/`) of them; tar shards (a folder of them, or a pattern); "hf:NAME"
            or "hf-stream:NAME", a data set of the `datasets` library; "pathfinder:SIZE" or "maze:SIZE",
            images that are generated. `docs/training.md` describes each.
        model: any name registered with timm; ours are `gspn2_tiny`, `_small`, `_base` and `test_gspn2`.
        model_args: further arguments of `timm.create_model`.
        pretrained: start from timm's pretrained weights.
        init_from: start from the weights of a run or checkpoint of ours, or of a folder that `gspn2 export`
            wrote; another number of classes gets a new classifier, another image size is fine.
        image_size: (height, width); None for 32 x 32 (digits) or the model's own size (folder).
        in_chans: 1 (grey) or 3; None for 1 (digits) or 3 (folder).
        split_fraction: share of each class held out for testing, where the folder has no split of its own.
        split_seed: seed of that split; apart from `seed`, so that runs of several seeds share a test set.
        train_images: images of an epoch where the data cannot tell (streams), or of generated data.
        shuffle_buffer: images of a stream, or of tar shards, that are shuffled among themselves.
        epochs: passes over the training images.
        batch_size: images a step, of all processes together; the last, incomplete batch of an epoch is left
            out.
        accumulate: parts that each process cuts its share of a batch into, one forward and backward pass
            each: the same step in less memory.
        lr: peak learning rate. Plain, unless `lr_base_size` is given.
        lr_base_size: `lr` is meant for this many images a step and scaled to lr * batch_size / lr_base_size.
        min_lr: learning rate at the end of the cosine, as a fraction of the peak.
        warmup_epochs: epochs of linear warm-up from 0, whole or not.
        weight_decay: of AdamW; biases, norms and whatever the model lists in `no_weight_decay` have none.
        layer_decay: factor of the learning rate from each layer to the one below it, for fine-tuning.
        betas: of AdamW.
        clip_grad: largest L2 norm of the whole gradient; None for no clipping.
        label_smoothing: share of the target given to all classes alike.
        mixup, cutmix: alpha of the Beta distribution; 0 for off. With both, each batch takes one of them.
        drop_path: stochastic depth rate, handed to the model as `drop_path_rate`.
        ema_decay: decay of the moving average of the weights, approached from 0 as the run goes on; None for
            no average. Where there is one, it is what is tested and kept as best.
        mesa: weight of MESA, the divergence from what the moving average says (arXiv 2205.14083); 0 for off.
        mesa_start: epochs before MESA begins: an average of nothing teaches nothing.
        teacher: model to distil from: a run or checkpoint of ours, or a name that timm has weights for.
        teacher_weight: share of the loss that compares with the teacher.
        teacher_temperature: softens what both say before they are compared.
        teacher_hard: take the teacher's likeliest class as a label instead (DeiT, arXiv 2012.12877).
        augment: random changes of the training images: digits are turned, moved and scaled a little; images
            of a folder are cropped, mirrored and changed in color.
        crop_scale: smallest and largest share of the area that a random crop keeps (folder).
        hflip: probability of mirroring (folder).
        color_jitter: strength of brightness, contrast and saturation changes (folder).
        auto_augment: timm's policy string, such as "rand-m9-mstd0.5-inc1"; replaces color_jitter (folder).
        random_erasing: probability of erasing a random rectangle.
        amp: "auto" (bfloat16 on CUDA, off elsewhere), "bf16" or "off".
        channels_last: keep images and weights channel-innermost.
        compile: run forward and backward through `torch.compile`.
        graphs: replay what was compiled as CUDA graphs, where a GPU waits for the host that launches it.
        grad_checkpointing: recompute activations in the backward pass instead of keeping them.
        shard: spread weights, gradients, average and optimizer state over the processes (FSDP) instead of
            keeping all of them in each (DDP); of one process nothing is spread.
        seed: of weights, order, augmentation and everything else that is random.
        device: "auto" (CUDA where there is one), or what `torch.device` takes.
        workers: processes that load images; 0 loads in the training process. Changes no number.
        checkpoint_every: steps between checkpoints within an epoch; None for the end of epochs only.
        tensorboard: also write the log for TensorBoard, to `tensorboard/` in the folder of the run.
        out: folder of the run; None for `runs/MODEL-DATA`.
    """

    data: str = "digits"
    model: str = "test_gspn2"
    model_args: dict[str, Any] = field(default_factory=dict)
    pretrained: bool = False
    init_from: str | None = None
    image_size: tuple[int, int] | None = None
    in_chans: int | None = None
    split_fraction: float = 0.2
    split_seed: int = 0
    train_images: int | None = None
    shuffle_buffer: int = 16384
    epochs: int = 20
    batch_size: int = 64
    accumulate: int = 1
    lr: float = 1e-3
    lr_base_size: int | None = None
    min_lr: float = 0.01
    warmup_epochs: float = 2.0
    weight_decay: float = 0.05
    layer_decay: float | None = None
    betas: tuple[float, float] = (0.9, 0.999)
    clip_grad: float | None = 5.0
    label_smoothing: float = 0.1
    mixup: float = 0.0
    cutmix: float = 0.0
    drop_path: float = 0.0
    ema_decay: float | None = 0.9998
    mesa: float = 0.0
    mesa_start: float = 5.0
    teacher: str | None = None
    teacher_weight: float = 0.5
    teacher_temperature: float = 1.0
    teacher_hard: bool = False
    augment: bool = True
    crop_scale: tuple[float, float] = (0.25, 1.0)
    hflip: float = 0.5
    color_jitter: float = 0.3
    auto_augment: str | None = None
    random_erasing: float = 0.0
    amp: str = "auto"
    channels_last: bool = False
    compile: bool = False
    graphs: bool = False
    grad_checkpointing: bool = False
    shard: bool = False
    seed: int = 0
    device: str = "auto"
    workers: int = 0
    checkpoint_every: int | None = None
    tensorboard: bool = False
    out: str | None = None

    def __post_init__(self) -> None:
        # A frozen dataclass is set through object.
        for setting in dataclasses.fields(self):
            value = _typed(setting.name, str(setting.type), getattr(self, setting.name))
            object.__setattr__(self, setting.name, value)
        _check(self)

    @property
    def out_dir(self) -> Path:
        """Folder of the run."""
        if self.out is not None:
            return Path(self.out)
        # A name may hold a tag or a hub's slashes: "resnet18.a1_in1k", "hf-hub:timm/resnet18".
        model, data = (re.sub(r"[^\w.-]+", "_", name) for name in (self.model, _short_name(self.data)))
        return Path("runs") / f"{model}-{data}"

    @property
    def peak_lr(self) -> float:
        """Learning rate after the warm-up, scaled by the batch size where `lr_base_size` asks for it."""
        return self.lr if self.lr_base_size is None else self.lr * self.batch_size / self.lr_base_size

    @property
    def unreached(self) -> list[str]:
        """What was asked for and never comes, such as a recipe's warm-up in a run cut short by hand."""
        texts = []
        if self.warmup_epochs >= self.epochs:
            warmup = f"the warm-up takes {self.warmup_epochs:g} epochs and the run {self.epochs}"
            texts.append(f"{warmup}: the learning rate never reaches its peak (warmup_epochs)")
        if self.mesa > 0 and self.mesa_start >= self.epochs:
            start = f"MESA begins after {self.mesa_start:g} epochs and the run takes {self.epochs}"
            texts.append(f"{start}: there is none (mesa_start)")
        return texts

    def to_json(self) -> dict[str, Any]:
        """All settings, as `from_json` takes them."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, settings: dict[str, Any]) -> TrainConfig:
        """The inverse of `to_json`; an unknown name is a UserError."""
        known = {f.name for f in dataclasses.fields(cls)}
        unknown = sorted(set(settings) - known)
        if unknown:
            raise UserError(f"config: unknown setting {', '.join(unknown)}")
        return cls(**settings)


def _short_name(data: str) -> str:
    """The end of a path, or what "hf:" and the like name."""
    return data.split(":", 1)[1] if re.match(r"hf(-stream)?:", data) else Path(data).resolve().name


_KINDS: dict[str, tuple[type | tuple[type, ...], str]] = {
    "str": (str, "a text that is not empty"),
    "int": (int, "a whole number"),
    "float": ((int, float), "a number"),
    "bool": (bool, "true or false"),
    "tuple[int, int]": (int, "two whole numbers"),
    "tuple[float, float]": ((int, float), "two numbers"),
}


def _typed(name: str, kind: str, value: Any) -> Any:
    """The value of a setting as the run's checkpoint gives it back, or a UserError where its kind is another.

    Recipes are files that people write, and a value of another kind would fail far from here, or not at all.
    """
    if kind.startswith("dict"):
        return _json_object(name, value)
    kind, _, optional = kind.partition(" | ")
    if value is None and optional:
        return None
    wanted, told = _KINDS[kind]
    if wanted is str and isinstance(value, os.PathLike):
        value = os.fspath(value)
    pair = kind.startswith("tuple")
    parts = value if pair and isinstance(value, list | tuple) else (value,)
    # To Python, True is a number.
    sound = [isinstance(it, wanted) and isinstance(it, bool) == (wanted is bool) and it != "" for it in parts]
    if not all(sound) or pair != (len(parts) == 2):
        raise UserError(f"{name}: expected {told}{' or none' if optional else ''}, got {value!r}")
    return tuple(value) if pair else value


def _json_object(name: str, value: Any) -> dict[str, Any]:
    """Arguments with lists for tuples: what was typed again has to equal what a checkpoint kept."""
    try:
        kept = json.loads(json.dumps(value))
    except (TypeError, ValueError) as error:
        raise UserError(f"{name}: expected what JSON can hold, got {value!r}") from error
    if not isinstance(kept, dict):
        raise UserError(f"{name}: expected names with values, got {value!r}")
    return kept


# name: (smallest, largest, is the smallest itself legal)
_RANGES: dict[str, tuple[float, float, bool]] = {
    "split_fraction": (0, 0.9, False),
    "epochs": (1, math.inf, True),
    "batch_size": (1, math.inf, True),
    "accumulate": (1, math.inf, True),
    "train_images": (1, math.inf, True),
    "shuffle_buffer": (1, math.inf, True),
    "mesa": (0, math.inf, True),
    "mesa_start": (0, math.inf, True),
    "teacher_weight": (0, 1, True),
    "teacher_temperature": (0, math.inf, False),
    "lr": (0, math.inf, False),
    "lr_base_size": (1, math.inf, True),
    "min_lr": (0, 1, True),
    "warmup_epochs": (0, 10**9, True),
    "weight_decay": (0, math.inf, True),
    "layer_decay": (0, 1, False),
    "clip_grad": (0, math.inf, False),
    "label_smoothing": (0, 0.99, True),
    "mixup": (0, math.inf, True),
    "cutmix": (0, math.inf, True),
    "drop_path": (0, 0.99, True),
    "ema_decay": (0, 1, False),
    "hflip": (0, 1, True),
    "color_jitter": (0, math.inf, True),
    "random_erasing": (0, 1, True),
    "workers": (0, math.inf, True),
    "checkpoint_every": (1, math.inf, True),
    "seed": (0, 2**63 - 1, True),
    "split_seed": (0, 2**63 - 1, True),
}


def _check(config: TrainConfig) -> None:
    for name, (low, high, closed) in _RANGES.items():
        value = getattr(config, name)
        if value is None:
            continue
        # `not` also refuses NaN.
        if not (low <= value <= high) or (value == low and not closed) or value == math.inf:
            above = f"at least {low}" if closed else f"more than {low}"
            below = "" if high == math.inf else f" and at most {high}"
            raise UserError(f"{name}: expected {above}{below}, got {value}")
    if config.amp not in ("auto", "off", "bf16"):
        raise UserError(f"amp: expected auto, off or bf16, got {config.amp!r}")
    if config.in_chans not in (None, 1, 3):
        raise UserError(f"in_chans: expected 1 (grey) or 3 (color), got {config.in_chans}")
    if config.image_size is not None and min(config.image_size) < 1:
        raise UserError(f"image_size: expected two sizes of at least 1, got {config.image_size}")
    if not 0 < config.crop_scale[0] <= config.crop_scale[1] <= 1:
        raise UserError(f"crop_scale: expected 0 < smallest <= largest <= 1, got {config.crop_scale}")
    if not all(0 <= beta < 1 for beta in config.betas):
        raise UserError(f"betas: expected two numbers of at least 0 and below 1, got {config.betas}")
    if (config.mixup > 0 or config.cutmix > 0) and config.batch_size % 2:
        raise UserError(
            f"batch_size: mixup and cutmix pair images, expected an even number, got {config.batch_size}"
        )
    if config.batch_size % config.accumulate:
        raise UserError(
            f"accumulate: expected a divisor of batch_size = {config.batch_size}, got {config.accumulate}"
        )
    if config.mesa > 0 and config.ema_decay is None:
        raise UserError("mesa: needs the moving average, but ema_decay is off")
    if config.pretrained and config.init_from is not None:
        raise UserError("pretrained and init_from exclude each other")
    if config.graphs and (not config.compile or config.shard or config.accumulate > 1):
        raise UserError("graphs: needs compile, and neither shard nor accumulate")
    taken = {"num_classes", "in_chans", "pretrained", "checkpoint_path"} & set(config.model_args)
    if taken:
        raise UserError(f"model_args: {', '.join(sorted(taken))} is set by training itself")
