"""`gspn2 export`."""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path

from .common import guarded

FORMATS = ("timm", "torch", "onnx")

EPILOG = """examples:
  gspn2 export runs/photos --out exported
  gspn2 export runs/photos --out exported --format timm,torch,onnx
  gspn2 export runs/photos/last.safetensors --weights model --out exported

timm: model.safetensors, config.json and a model card (README.md), for
  timm.create_model("local-dir:exported", pretrained=True) after `import gspn2.models`.
torch: model.pt2, for torch.export.load after `import gspn2`.
onnx: model.onnx, of standard operators alone, for images of any size; needs gspn2[onnx]. It is run in
  onnxruntime at several sizes and compared with the model before the command says that all is well."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `gspn2 export`."""
    parser.epilog = EPILOG
    parser.add_argument("checkpoint", help="a checkpoint, or the folder of a run (its best)")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write to")
    parser.add_argument(
        "--format",
        type=_formats,
        default=("timm",),
        metavar="NAMES",
        help=f"some of {', '.join(FORMATS)}, with commas between (default: timm)",
    )
    parser.add_argument(
        "--weights", choices=("ema", "model"), help="of a last.safetensors (default: ema where kept)"
    )
    parser.add_argument("--no-check", action="store_true", help="do not run the ONNX file")


def _formats(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    if not set(names) <= set(FORMATS):
        raise argparse.ArgumentTypeError(f"expected some of {', '.join(FORMATS)}, got {text!r}")
    return names


def run(args: argparse.Namespace) -> int:
    """Export; returns the exit code."""
    return guarded("export", lambda: _export(args))


def _export(args: argparse.Namespace) -> int:
    from ..training.checkpoint import load_checkpoint
    from ..training.export import check_onnx, export

    if "onnx" in args.format:
        # What is missing is told before anything is written.
        for package in ("onnx", "onnxscript", *([] if args.no_check else ["onnxruntime"])):
            importlib.import_module(package)
    model, info = load_checkpoint(args.checkpoint, weights=args.weights)
    written = export(model, info, args.out, args.format)
    for name, path in written.items():
        print(f"{name}: {path}")
    if "onnx" in written and not args.no_check:
        for shape, difference in check_onnx(written["onnx"], model, info):
            print(f"onnxruntime agrees within {difference:.0e} for images {' x '.join(map(str, shape))}")
    return 0
