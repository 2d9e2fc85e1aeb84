"""`gspn2 predict`."""

from __future__ import annotations

import argparse
import glob
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .common import guarded, positive

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from ..training import CheckpointInfo

EPILOG = """examples:
  gspn2 predict runs/photos cat.jpg dog.png
  gspn2 predict runs/photos holiday/ --top-k 3
  gspn2 predict runs/photos/best.safetensors 'scans/*.png' --json > predictions.json

Folders are searched for images, with everything below them. A file that cannot be read gets an error line on
stderr, the others go through, and the exit code is 1."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `gspn2 predict`."""
    parser.epilog = EPILOG
    parser.add_argument("checkpoint", help="a checkpoint, or the folder of a run (its best)")
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="files, folders or patterns")
    parser.add_argument(
        "--top-k", type=positive, default=3, metavar="K", help="classes an image (default: 3)"
    )
    parser.add_argument(
        "--weights", choices=("ema", "model"), help="of a last.safetensors (default: ema where kept)"
    )
    parser.add_argument("--batch-size", type=positive, default=16, metavar="N", help="(default: 16)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 ... (default: auto)")
    parser.add_argument(
        "--amp", choices=("auto", "off", "bf16"), help="auto: bf16 on CUDA (default: as in the training)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Predict; returns the exit code."""
    return guarded("predict", lambda: _predict(args))


def _predict(args: argparse.Namespace) -> int:
    from ..training import load_checkpoint
    from ..training.model import amp_dtype, pick_device

    device = pick_device(args.device)
    model, info = load_checkpoint(args.checkpoint, device=device, weights=args.weights)
    amp = amp_dtype(args.amp or info.config.amp, device)
    results = []
    for batch in _batches(list(_files(args.images)), args.batch_size):
        for result in _classify(model, info, batch, args.top_k, amp):
            if "error" in result:
                print(f"gspn2 predict: error: {result['error']}", file=sys.stderr)
            elif not args.json:
                print(_line(result), flush=True)
            results.append(result)
    if args.json:
        print(json.dumps(results, indent=2))
    return 1 if any("error" in result for result in results) else 0


@dataclass(frozen=True)
class Input:
    """An image file, or what is wrong with an argument."""

    file: str
    error: str | None = None


def _files(arguments: Sequence[str]) -> Iterator[Input]:
    """Every file that is meant."""
    from ..training.folders import image_files

    for argument in arguments:
        path = Path(argument)
        # To Path, no name is the current folder: a variable of a shell that was never set.
        if path.is_dir() and argument:
            found, missing = image_files(path), "no image in this folder"
        elif not path.exists() and glob.has_magic(argument):
            # A shell hands on a pattern that it was told not to expand, or could not.
            found = sorted(name for name in glob.glob(argument, recursive=True) if Path(name).is_file())
            missing = "no file matches"
        else:
            found, missing = [argument], ""
        yield from map(Input, found)
        if not found:
            yield Input(argument, f"{argument}: {missing}")


def _batches(inputs: Sequence[Input], size: int) -> Iterator[Sequence[Input]]:
    for start in range(0, len(inputs), size):
        yield inputs[start : start + size]


def _classify(
    model: nn.Module, info: CheckpointInfo, inputs: Sequence[Input], top_k: int, amp: torch.dtype | None
) -> Iterator[dict[str, Any]]:
    """A result for each input, in their order: file, and predictions or an error."""
    import torch

    from ..training import DataError, open_image

    errors: list[str | None] = []
    images: list[Tensor] = []
    for each in inputs:
        error = each.error
        if error is None:
            try:
                images.append(info.preprocess(open_image(each.file)))
            except DataError as problem:
                error = str(problem)
        errors.append(error)
    device = next(model.parameters()).device
    rows: Iterator[list[dict[str, Any]]] = iter(())
    if images:
        with torch.no_grad(), torch.autocast(device.type, amp, enabled=amp is not None):
            logits = model(torch.stack(images).to(device))
        rows = iter(_likeliest(logits.float().softmax(1), info.class_names, top_k))
    for each, error in zip(inputs, errors, strict=True):
        yield {"file": each.file, "error": error} if error else {"file": each.file, "predictions": next(rows)}


def _likeliest(probabilities: Tensor, names: Sequence[str], top_k: int) -> list[list[dict[str, Any]]]:
    values, indices = probabilities.topk(min(top_k, len(names)))
    return [
        [{"class": names[i], "index": i, "probability": p} for p, i in zip(ps, idx, strict=True)]
        for ps, idx in zip(values.tolist(), indices.tolist(), strict=True)
    ]


def _line(result: dict[str, Any]) -> str:
    first, *others = result["predictions"]
    line = f"{result['file']}: {first['class']} {100 * first['probability']:.1f}%"
    rest = ", ".join(f"{p['class']} {100 * p['probability']:.1f}%" for p in others)
    return f"{line} ({rest})" if rest else line
