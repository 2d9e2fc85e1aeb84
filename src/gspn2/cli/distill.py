"""`gspn2 distill`."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..training.errors import Interrupted
from ..training.log import FAULTS
from .common import guarded, positive
from .progress import PLAIN_SECONDS

EPILOG = """examples:
  gspn2 distill --pipeline sdxl/ --data pictures/ --out runs/sdxl
  gspn2 distill --pipeline sdxl/ --data pictures/ --out runs/sdxl --resume
  accelerate launch -m gspn2 distill --pipeline sdxl/ --data pictures/ --batch-size 64
  gspn2 distill --pipeline sdxl/ --data 'shards/{000..127}.tar' --caption-column caption
  gspn2 distill --pipeline sdxl/ --data hf-stream:NAME --pictures 50000

The data is a folder of pictures, each with a caption beside it (cat.jpg and cat.txt), WebDataset's shards, or
a data set of the datasets library, whole or as a stream. Latents and prompt embeddings are made once and
kept. The trained mixers are in OUT/mixers, for `gspn2 generate --mixers`."""

_OPTIONS: dict[str, tuple[Callable[[str], Any], str]] = {
    "resolution": (positive, "side of a square picture, in pixels (default: the UNet's)"),
    "steps": (positive, "of the run (default: 10000)"),
    "batch_size": (positive, "pictures a step, of all processes together (default: 16)"),
    "accumulate": (positive, "passes in which each process takes its share of a step (default: 1)"),
    "pictures": (positive, "the first so many of the data (default: all)"),
    "lr": (float, "peak learning rate (default: 1e-4)"),
    "warmup": (int, "steps up to it (default: 500)"),
    "clip": (float, "largest norm of the gradient (default: 1)"),
    "noise": (float, "weight of the loss against the noise (default: 1)"),
    "teacher": (float, "weight of the loss against the teacher's prediction (default: 0.5)"),
    "features": (float, "weight of the loss against each layer's output (default: 0.5)"),
    "drop": (float, "share of captions left out, for guidance (default: 0.1)"),
    "ema": (float, "decay of the moving average (default: 0.999)"),
    "proxy_ratio": (positive, "channels over propagated ones (default: 8)"),
    "save_every": (positive, "steps between checkpoints (default: 500)"),
    "sample_every": (int, "steps between grids of pictures, 0 for none (default: 1000)"),
    "samples": (positive, "pictures in a grid (default: 4)"),
    "sample_steps": (positive, "of each of them (default: 25)"),
    "guidance": (float, "scale of classifier-free guidance in them (default: 5)"),
    "seed": (int, "of everything random (default: 0)"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `gspn2 distill`."""
    parser.epilog = EPILOG
    parser.add_argument("--pipeline", type=Path, required=True, metavar="PATH", help="folder of a pipeline")
    data = "pictures and captions: folder, .tar files, hf:NAME or hf-stream:NAME"
    parser.add_argument("--data", required=True, metavar="DATA", help=data)
    image = "of the data set (default: the first of images)"
    parser.add_argument("--image-column", metavar="NAME", help=image)
    column = "of the data set or of the shards' .json files (default: found by its name)"
    parser.add_argument("--caption-column", metavar="NAME", help=column)
    parser.add_argument("--out", type=Path, default=Path("runs/distill"), metavar="DIR", help="of the run")
    parser.add_argument("--cache", type=Path, metavar="DIR", help="of latents and prompts (default: in OUT)")
    parser.add_argument("--resume", action="store_true", help="go on after the last checkpoint in OUT")
    for name, (kind, text) in _OPTIONS.items():
        flag = f"--{name.replace('_', '-')}"
        letter = "X" if kind is float else "N"
        parser.add_argument(flag, type=kind, metavar=letter, default=argparse.SUPPRESS, help=text)
    parser.add_argument("--amp", choices=("auto", "off", "bf16"), default="auto", help="auto: bf16 on CUDA")
    parser.add_argument("--grad-checkpointing", action="store_true", help="less memory, more time")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="(default: auto)")


def run(args: argparse.Namespace) -> int:
    """Distil; returns the exit code."""
    return guarded("distill", lambda: _distill(args))


def _distill(args: argparse.Namespace) -> int:
    from ..integrations.diffusers.distill import DistillConfig, distill
    from ..training.model import pick_device

    device = pick_device(args.device).type
    config = DistillConfig(
        pipeline=args.pipeline,
        data=args.data,
        out=args.out,
        cache=args.cache,
        image_column=args.image_column,
        caption_column=args.caption_column,
        bf16=args.amp == "bf16" or (args.amp == "auto" and device == "cuda"),
        checkpointing=args.grad_checkpointing,
        device=device,
        **{name: getattr(args, name) for name in _OPTIONS if hasattr(args, name)},
    )
    main_process = int(os.environ.get("RANK", 0)) == 0
    try:
        mixers = distill(config, _Lines(), resume=args.resume)
    except Interrupted as stop:
        if not main_process:
            return 128 + stop.signum
        print(f"stopped at {stop.where}; saved {stop.checkpoint}", file=sys.stderr)
        print("resume with: the same command and --resume", file=sys.stderr)
        return 128 + stop.signum
    if main_process:
        if (args.out / FAULTS).is_file():
            count = len((args.out / FAULTS).read_text(encoding="utf-8").splitlines())
            print(f"left out {count} unreadable pictures: {args.out / FAULTS}")
        print(f"wrote {mixers}; use it with: gspn2 generate PROMPT --mixers {shlex.quote(str(mixers))} ...")
    return 0


class _Lines:
    """Progress: one line that counts on a terminal, a line every few seconds elsewhere."""

    def __init__(self) -> None:
        self._printed = 0.0

    def __call__(self, what: str, done: int, total: int, losses: dict[str, float]) -> None:
        count = f"{what} {done}/{total}" if total else f"{what} {done}"
        text = "  ".join([count, *(f"{name} {x:.4f}" for name, x in losses.items())])
        if sys.stderr.isatty():
            print(f"\r\x1b[K{text}", end="\n" if done == total else "", file=sys.stderr, flush=True)
        elif done == total or time.monotonic() - self._printed > PLAIN_SECONDS:
            self._printed = time.monotonic()
            print(text, flush=True)
