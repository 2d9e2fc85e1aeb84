"""`gspn2 train`."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from ..training.config import FREE_ON_RESUME, TrainConfig
from ..training.errors import Interrupted, UserError
from ..training.recipes import RECIPES, recipe_settings
from .common import floats, guarded, image_size, key_value, optional

EPILOG = """examples:
  gspn2 train --data digits --model test_gspn2 --out runs/digits
  gspn2 train --recipe in1k-tiny --data imagenet/ --out runs/tiny
  gspn2 train --recipe in1k-tiny --epochs 100 --print-config > mine.json
  gspn2 train --recipe mine.json --data 'shards/train-{0000..0127}.tar' --out runs/mine
  torchrun --nproc-per-node 8 -m gspn2 train --recipe in1k-base --data imagenet/ --out runs/base
  gspn2 train --recipe finetune --init-from runs/tiny --data photos/ --image-size 384 --out runs/photos
  gspn2 train --data photos/ --model gspn2_tiny --image-size 224 --epochs 100 --out runs/photos
  gspn2 train --data photos/ --model vit_tiny_patch16_224 --pretrained --lr 5e-4 --lr-base-size 512
  gspn2 train --out runs/photos --resume

The output folder gets best.safetensors (the weights that tested best: the moving average, unless it is off),
last.safetensors (everything needed to resume), log.csv (a row an epoch), log.jsonl (a line a step),
config.json and summary.json; unreadable.txt lists images that were left out. Ctrl-C and SIGTERM save and
stop; --resume goes on with the same numbers to the last bit."""

_NUMBER, _COUNT = ("X", float), ("N", int)

# name in TrainConfig, (metavar, type), help; a bool is a switch.
_GROUPS: dict[str, list[tuple[str, tuple[str, Callable[[str], Any]], str]]] = {
    "data": [
        (
            "data",
            ("DATA", str),
            '"digits"; a folder of class folders, or train/ and val/ (or test/) of them; tar shards; '
            "hf:NAME or hf-stream:NAME; pathfinder:SIZE or maze:SIZE",
        ),
        ("image_size", ("HxW", image_size), "one size or two (default: 32 for digits, else the model's)"),
        ("in_chans", _COUNT, "1 (grey) or 3 (default: 1 for digits, else 3)"),
        ("split_fraction", _NUMBER, "share of each class held out where the data has no split"),
        ("split_seed", _COUNT, "seed of that split"),
        ("train_images", _COUNT, "images of an epoch, for streams of unknown length and generated images"),
        ("shuffle_buffer", _COUNT, "images of a stream or of shards that are shuffled among themselves"),
        ("workers", _COUNT, "processes that load images; changes no number"),
    ],
    "model": [
        ("model", ("NAME", str), "any name registered with timm"),
        ("pretrained", ("", bool), "start from timm's pretrained weights"),
        ("init_from", ("PATH", str), "start from the weights of a run, a checkpoint or an exported folder"),
        ("drop_path", _NUMBER, "stochastic depth"),
        ("channels_last", ("", bool), "channel-innermost memory layout"),
        ("compile", ("", bool), "run through torch.compile"),
        ("graphs", ("", bool), "replay what was compiled as CUDA graphs, where a GPU waits for its host"),
        ("grad_checkpointing", ("", bool), "recompute activations in the backward pass: less memory"),
        ("shard", ("", bool), "spread weights and optimizer state over the processes (FSDP): less memory"),
    ],
    "recipe": [
        ("epochs", _COUNT, "passes over the training images"),
        ("batch_size", _COUNT, "images a step, of all processes together"),
        ("accumulate", _COUNT, "passes that each process makes of its share of a batch: less memory"),
        ("lr", _NUMBER, "peak learning rate; plain, unless --lr-base-size is given"),
        ("lr_base_size", _COUNT, "scale to lr * batch size / N"),
        ("min_lr", _NUMBER, "last learning rate, as a fraction of the peak"),
        ("warmup_epochs", _NUMBER, "epochs of linear warm-up"),
        ("weight_decay", _NUMBER, "of AdamW; not on biases and norms"),
        ("layer_decay", _NUMBER, "learning rate factor from layer to layer, for fine-tuning"),
        ("betas", ("X,X", floats), "of AdamW"),
        ("clip_grad", ("X", optional(float)), "largest gradient norm, or none"),
        ("label_smoothing", _NUMBER, "share of the target spread over all classes"),
        ("mixup", _NUMBER, "alpha, 0 for off"),
        ("cutmix", _NUMBER, "alpha, 0 for off"),
        ("ema_decay", ("X", optional(float)), "moving average of the weights, or none"),
        ("mesa", _NUMBER, "weight of MESA, 0 for off"),
        ("mesa_start", _NUMBER, "epochs before MESA begins"),
        ("teacher", ("NAME", str), "distil from a model of timm's with weights, or a run of ours"),
        ("teacher_weight", _NUMBER, "share of the loss that is the teacher's"),
        ("teacher_temperature", _NUMBER, "softens what teacher and student say"),
        ("teacher_hard", ("", bool), "learn the teacher's likeliest class"),
        ("amp", ("auto|off|bf16", str), "mixed precision; auto: bf16 on CUDA"),
        ("seed", _COUNT, "of everything random"),
        ("device", ("NAME", str), "auto, cpu, cuda, cuda:1 ..."),
    ],
    "augmentation": [
        ("crop_scale", ("X,X", floats), "smallest and largest share of the area (folders)"),
        ("hflip", _NUMBER, "probability of mirroring (folders)"),
        ("color_jitter", _NUMBER, "strength (folders)"),
        ("auto_augment", ("POLICY", str), "timm's policy, such as rand-m9-mstd0.5-inc1 (folders)"),
        ("random_erasing", _NUMBER, "probability"),
    ],
    "run": [
        ("out", ("DIR", str), "folder of the run (default: runs/MODEL-DATA)"),
        ("checkpoint_every", _COUNT, "also save every N steps within an epoch"),
        ("tensorboard", ("", bool), "also log for TensorBoard"),
    ],
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `gspn2 train`."""
    parser.epilog = EPILOG
    parser.add_argument(
        "--recipe",
        metavar="NAME",
        help=f"settings to begin with: {', '.join(RECIPES)}, or a JSON file; what is given here goes first",
    )
    parser.add_argument(
        "--print-config",
        action="store_true",
        help="print the settings as JSON, for --recipe, and stop",
    )
    groups = {title: parser.add_argument_group(title) for title in _GROUPS}
    for title, options in _GROUPS.items():
        for name, (metavar, kind), text in options:
            _add(groups[title], name, metavar, kind, text)
    groups["model"].add_argument(
        "--model-arg",
        type=key_value,
        action="append",
        metavar="KEY=VALUE",
        default=[],
        help="argument of timm.create_model; may be repeated",
    )
    groups["augmentation"].add_argument(
        "--no-augment", action="store_false", dest="augment", default=argparse.SUPPRESS, help="none at all"
    )
    how = groups["run"].add_mutually_exclusive_group()
    how.add_argument(
        "--resume",
        action="store_true",
        help="go on from last.safetensors in DIR; starts anew if there is none and --data is given",
    )
    how.add_argument("--overwrite", action="store_true", help="replace a run that is in DIR")


def _add(
    group: argparse._ArgumentGroup, name: str, metavar: str, kind: Callable[[str], Any], text: str
) -> None:
    """An option without a default of its own: only what was typed gets into the settings."""
    flag = f"--{name.replace('_', '-')}"
    if kind is bool:
        # --no-X undoes what a recipe has switched on.
        group.add_argument(flag, action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help=text)
        return
    default = getattr(TrainConfig(), name)
    if default is not None:
        shown = ",".join(map(str, default)) if isinstance(default, tuple) else default
        text += f" (default: {shown})"
    group.add_argument(flag, type=kind, metavar=metavar, default=argparse.SUPPRESS, help=text)


def run(args: argparse.Namespace) -> int:
    """Train; returns the exit code."""
    return guarded("train", lambda: _train(args))


def _train(args: argparse.Namespace) -> int:
    given = _given(args)
    config = TrainConfig(**given)
    if args.print_config:
        print(json.dumps(config.to_json(), indent=2))
        return 0
    from ..training.engine import stored_config, train
    from .progress import TrainProgress

    if args.resume:
        stored = stored_config(config.out_dir)
        if stored is not None:
            config = merge(stored, config, given)
        elif "data" not in given:
            raise UserError(f"out: no run to resume in {config.out_dir}")
    if config.init_from is None and not config.pretrained and args.recipe in RECIPES:
        _check_weights(args.recipe)
    is_main = int(os.environ.get("RANK", 0)) == 0
    with TrainProgress() as progress:
        try:
            result = train(config, on_event=progress, resume=args.resume, overwrite=args.overwrite)
        except Interrupted as stop:
            if is_main:
                launcher = "torchrun ... -m " if int(os.environ.get("WORLD_SIZE", 1)) > 1 else ""
                again = f"{launcher}gspn2 train --out {_quoted(config.out_dir)} --resume"
                progress.interrupted(stop, again)
            return 128 + stop.signum
    if is_main:
        progress.finished(result)
    return 0


def _check_weights(recipe: str) -> None:
    if RECIPES[recipe].trained:
        raise UserError(
            f"recipe: {recipe} begins with trained weights: expected --init-from PATH, or --pretrained with "
            "a model that timm has weights for, got neither"
        )


def _given(args: argparse.Namespace) -> dict[str, Any]:
    """Settings that were asked for: by a recipe, and what was typed."""
    typed = {f.name: getattr(args, f.name) for f in dataclasses.fields(TrainConfig) if hasattr(args, f.name)}
    if args.model_arg:
        typed["model_args"] = dict(args.model_arg)
    given = typed if args.recipe is None else {**recipe_settings(args.recipe), **typed}
    if "init_from" not in typed or "model" in typed or args.recipe not in (None, *RECIPES):
        return given
    # A recipe's model is a default; weights fit their own. Of a run that goes on, they may be gone.
    from ..training.checkpoint import model_of
    from ..training.engine import stored_config

    stored = stored_config(TrainConfig(**given).out_dir) if args.resume else None
    if stored is None:
        told = model_of(given["init_from"])
    else:
        told = {"model": stored.model, "model_args": stored.model_args}
    return given | {name: value for name, value in told.items() if name not in typed}


def merge(stored: TrainConfig, config: TrainConfig, given: Collection[str]) -> TrainConfig:
    """The settings of a stored run with what may change replaced.

    Args:
        config: what is asked for now.
        given: settings that were asked for; others are those of the run.

    Raises:
        UserError: one of them differs and may not.
    """
    changed = [
        f"--{name.replace('_', '-')} {getattr(config, name)} (the run has {getattr(stored, name)})"
        for name in given
        if name not in FREE_ON_RESUME and getattr(config, name) != getattr(stored, name)
    ]
    if changed:
        raise UserError(f"a resumed run keeps its settings; leave out {', '.join(changed)}")
    free = {name: getattr(config, name) for name in given if name in FREE_ON_RESUME}
    return dataclasses.replace(stored, **{**free, "out": str(config.out_dir)})


def _quoted(path: Path) -> str:
    import shlex

    return shlex.quote(str(path))
