"""`gspn2 eval`."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .common import guarded, make_folder, positive
from .progress import counting

if TYPE_CHECKING:
    from ..training import CheckpointInfo, Evaluation

EPILOG = """examples:
  gspn2 eval runs/digits
  gspn2 eval runs/photos --data other_photos/ --out evaluation
  gspn2 eval runs/photos/last.safetensors --weights model --batch-size 256

Without --data the model is tested on what training held out. A folder of class folders may have fewer classes
than the model, not others. With --out: evaluation.json and confusion.png."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `gspn2 eval`."""
    parser.epilog = EPILOG
    parser.add_argument("checkpoint", help="a checkpoint, or the folder of a run (its best)")
    parser.add_argument("--data", help='"digits" or a folder (default: the data of the training)')
    parser.add_argument(
        "--split",
        choices=("test", "train", "all"),
        help="part of the data (default: test for the training's data and for folders with val/ or test/, "
        "else all)",
    )
    parser.add_argument(
        "--weights", choices=("ema", "model"), help="of a last.safetensors (default: ema where kept)"
    )
    parser.add_argument("--batch-size", type=positive, default=64, metavar="N", help="(default: 64)")
    parser.add_argument(
        "--workers", type=int, default=0, metavar="N", help="processes that load images (default: 0)"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 ... (default: auto)")
    parser.add_argument(
        "--amp", choices=("auto", "off", "bf16"), help="auto: bf16 on CUDA (default: as in the training)"
    )
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="write evaluation.json and confusion.png there"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Evaluate; returns the exit code."""
    return guarded("eval", lambda: _evaluate(args))


def _evaluate(args: argparse.Namespace) -> int:
    import json

    from ..training import eval_loader, evaluate, load_checkpoint, load_test_data
    from ..training.model import amp_dtype, pick_device

    if args.out is not None:
        make_folder(args.out)
    device = pick_device(args.device)
    model, info = load_checkpoint(args.checkpoint, device=device, weights=args.weights)
    data = info.config.data if args.data is None else args.data
    images = load_test_data(data, info.preprocess, info.class_names, info.config, args.split)
    loader = eval_loader(images, args.batch_size, args.workers, device)
    amp = amp_dtype(args.amp or info.config.amp, device)
    with counting("testing", len(images)) as on_batch:
        result = evaluate(model, loader, device=device, amp=amp, warm_up=True, on_batch=on_batch)
    report = _report(result, info, data)
    if args.out is not None:
        _write(args.out, report, result, info)
    if args.json:
        print(json.dumps(report, indent=2))
    else:
        _show(report, result, info, args.out)
    return 0


def _report(result: Evaluation, info: CheckpointInfo, data: str) -> dict[str, Any]:
    fields = {f.name: getattr(result, f.name) for f in dataclasses.fields(result)}
    return {
        "checkpoint": str(info.path),
        "weights": info.weights,
        "model": info.config.model,
        "data": data,
        "epoch": info.epoch,
        **fields,
        "images_per_second": result.images_per_second,
        "class_names": list(info.class_names),
        "confusion": result.confusion.tolist(),
    }


def _write(out: Path, report: dict[str, Any], result: Evaluation, info: CheckpointInfo) -> None:
    from ..training.checkpoint import write_json
    from ..training.confusion import save_picture
    from ..training.errors import UserError

    try:
        write_json(out / "evaluation.json", report)
        save_picture(result.confusion, info.class_names, out / "confusion.png")
    except OSError as error:
        raise UserError(f"--out: cannot write to {out}: {error}") from error


def _show(report: dict[str, Any], result: Evaluation, info: CheckpointInfo, out: Path | None) -> None:
    from ..training.confusion import table

    print(f"{info.path} ({info.config.model}, {info.weights} weights, epoch {info.epoch})")
    print(f"{result.images} images of {report['data']}")
    print(f"top-1 {result.top1:.2f}%   top-5 {result.top5:.2f}%   loss {result.loss:.4f}")
    print(
        f"{result.images_per_second:.0f} images/s in the model (batch {result.batch_size}, {result.device}, "
        f"{result.threads} threads); {result.images / result.seconds:.0f} images/s with loading"
    )
    print()
    print(table(result.confusion, info.class_names))
    if out is not None:
        print(f"\nwrote {out / 'evaluation.json'} and {out / 'confusion.png'}")
