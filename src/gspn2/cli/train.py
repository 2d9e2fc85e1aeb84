"""`gspn2 train`."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from ..training.config import FREE_ON_RESUME, TrainConfig
from ..training.errors import Interrupted, UserError
from .common import floats, guarded, image_size, key_value, optional

EPILOG = """examples:
  gspn2 train --data digits --model test_gspn2 --out runs/digits
  gspn2 train --data photos/ --model gspn2_tiny --image-size 224 --epochs 100 --out runs/photos
  gspn2 train --data photos/ --model vit_tiny_patch16_224 --pretrained --lr 5e-4 --lr-base-size 512
  gspn2 train --out runs/photos --resume

The output folder gets best.safetensors (the weights that tested best: the moving average, unless it is off),
last.safetensors (everything needed to resume), log.csv (a row an epoch), log.jsonl (a line a step),
config.json and summary.json. Ctrl-C and SIGTERM save and stop; --resume goes on with the same numbers to the last bit."""

# flag, fields of add_argument. Defaults are those of TrainConfig: only what was typed reaches it.
_GROUPS: dict[str, list[tuple[str, dict[str, Any]]]] = {
    "data": [
        ("data", {"help": '"digits", or a folder of class folders, or one with train/ and val/ (or test/)'}),
        (
            "image_size",
            {
                "type": image_size,
                "metavar": "HxW",
                "help": "SIZE or HEIGHTxWIDTH (default: 32 for digits, else the model's)",
            },
        ),
        ("in_chans", {"type": int, "help": "1 (grey) or 3 (default: 1 for digits, else 3)"}),
        (
            "split_fraction",
            {"type": float, "help": "share of each class held out where the data has no split"},
        ),
        ("split_seed", {"type": int, "help": "seed of that split"}),
        ("workers", {"type": int, "help": "processes that load images; changes no number"}),
    ],
    "model": [
        ("model", {"help": "any name registered with timm"}),
        ("pretrained", {"action": "store_true", "help": "start from timm's pretrained weights"}),
        ("drop_path", {"type": float, "help": "stochastic depth"}),
        ("channels_last", {"action": "store_true", "help": "channel-innermost memory layout"}),
    ],
    "recipe": [
        ("epochs", {"type": int, "help": "passes over the training images"}),
        ("batch_size", {"type": int, "help": "images a step"}),
        ("lr", {"type": float, "help": "peak learning rate; plain, unless --lr-base-size is given"}),
        ("lr_base_size", {"type": int, "help": "scale: lr * batch size / this"}),
        ("min_lr", {"type": float, "help": "last learning rate, as a fraction of the peak"}),
        ("warmup_epochs", {"type": float, "help": "epochs of linear warm-up"}),
        ("weight_decay", {"type": float, "help": "of AdamW; not on biases and norms"}),
        ("layer_decay", {"type": float, "help": "learning rate factor from layer to layer, for fine-tuning"}),
        ("betas", {"type": floats, "help": "of AdamW, with a comma"}),
        ("clip_grad", {"type": optional(float), "help": "largest gradient norm, or none"}),
        ("label_smoothing", {"type": float, "help": "share of the target spread over all classes"}),
        ("mixup", {"type": float, "help": "alpha, 0 for off"}),
        ("cutmix", {"type": float, "help": "alpha, 0 for off"}),
        ("ema_decay", {"type": optional(float), "help": "moving average of the weights, or none"}),
        ("amp", {"choices": ("auto", "off", "bf16"), "help": "mixed precision; auto: bf16 on CUDA"}),
        ("seed", {"type": int, "help": "of everything random"}),
        ("device", {"help": "auto, cpu, cuda, cuda:1 ..."}),
    ],
    "augmentation": [
        (
            "crop_scale",
            {"type": floats, "help": "smallest and largest share of the area, with a comma (folders)"},
        ),
        ("hflip", {"type": float, "help": "probability of mirroring (folders)"}),
        ("color_jitter", {"type": float, "help": "strength (folders)"}),
        (
            "auto_augment",
            {"metavar": "POLICY", "help": "timm's policy, such as rand-m9-mstd0.5-inc1 (folders)"},
        ),
        ("random_erasing", {"type": float, "help": "probability"}),
    ],
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `gspn2 train`."""
    parser.epilog = EPILOG
    defaults = TrainConfig()
    for title, options in _GROUPS.items():
        group = parser.add_argument_group(title)
        for name, fields in options:
            _add(group, name, getattr(defaults, name), fields)
        if title == "model":
            group.add_argument(
                "--model-arg",
                type=key_value,
                action="append",
                metavar="KEY=VALUE",
                default=[],
                help="argument of timm.create_model; may be repeated",
            )
        if title == "augmentation":
            group.add_argument(
                "--no-augment",
                action="store_false",
                dest="augment",
                default=argparse.SUPPRESS,
                help="none at all",
            )
    _add_run_options(parser, defaults)


def _add(group: argparse._ArgumentGroup, name: str, default: Any, fields: dict[str, Any]) -> None:
    fields = dict(fields)
    if default is not None and "action" not in fields:
        shown = ",".join(map(str, default)) if isinstance(default, tuple) else default
        fields["help"] += f" (default: {shown})"
    if "action" not in fields and "choices" not in fields:
        fields.setdefault(
            "metavar", "N" if fields.get("type") is int else "X" if "type" in fields else name.upper()
        )
    group.add_argument(f"--{name.replace('_', '-')}", default=argparse.SUPPRESS, **fields)


def _add_run_options(parser: argparse.ArgumentParser, defaults: TrainConfig) -> None:
    group = parser.add_argument_group("run")
    group.add_argument(
        "--out", metavar="DIR", default=argparse.SUPPRESS, help="folder of the run (default: runs/MODEL-DATA)"
    )
    _add(group, "checkpoint_every", None, {"type": int, "help": "also save every N steps within an epoch"})
    how = group.add_mutually_exclusive_group()
    how.add_argument(
        "--resume",
        action="store_true",
        help="go on from last.safetensors in DIR; starts anew if there is none",
    )
    how.add_argument("--overwrite", action="store_true", help="replace a run that is in DIR")


def run(args: argparse.Namespace) -> int:
    """Train; returns the exit code."""
    return guarded("train", lambda: _train(args))


def _train(args: argparse.Namespace) -> int:
    from ..training.engine import stored_config, train
    from .progress import TrainProgress

    given = {f.name: getattr(args, f.name) for f in dataclasses.fields(TrainConfig) if hasattr(args, f.name)}
    if args.model_arg:
        given["model_args"] = dict(args.model_arg)
    config = TrainConfig(**given)
    if args.resume:
        stored = stored_config(config.out_dir)
        if stored is not None:
            config = merge(stored, given, config.out_dir)
        elif "data" not in given:
            raise UserError(f"out: no run to resume in {config.out_dir}")
    with TrainProgress() as progress:
        try:
            result = train(config, on_event=progress, resume=args.resume, overwrite=args.overwrite)
        except Interrupted as stop:
            progress.interrupted(stop, f"gspn2 train --out {_quoted(config.out_dir)} --resume")
            return 128 + stop.signum
    progress.finished(result)
    return 0


def merge(stored: TrainConfig, given: dict[str, Any], out: Path) -> TrainConfig:
    """The settings of a stored run with what may change replaced; anything else that differs is an error."""
    changed = [
        f"--{name.replace('_', '-')} {value} (the run has {getattr(stored, name)})"
        for name, value in given.items()
        if name not in FREE_ON_RESUME and value != getattr(stored, name)
    ]
    if changed:
        raise UserError(f"a resumed run keeps its settings; leave out {', '.join(changed)}")
    free = {name: value for name, value in given.items() if name in FREE_ON_RESUME}
    return dataclasses.replace(stored, **{**free, "out": str(out)})


def _quoted(path: Path) -> str:
    import shlex

    return shlex.quote(str(path))
