"""Entry point of the `gspn2` command.

A subcommand is a module with `add_arguments(parser)` and `run(args) -> exit code`. Exit codes: 0 fine, 1 the
job failed or some inputs did, 2 a usage error, 130 interrupted (143 by SIGTERM).
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import NoReturn

COMMANDS = {
    "demo": "train on handwritten digits beside an attention model and write a report",
    "train": "train a model on images",
    "eval": "accuracy, speed and confusion matrix of a trained model",
    "predict": "classes of images",
    "export": "write a trained model for timm, torch.export and ONNX",
    "learn": "GSPN-2 beside a ViT and a ConvNet on tasks that need the whole image",
    "draw": "self-attention and GSPN-2 in small models that learn to draw digits",
    "bench": "measure the operator, mixers and backbones beside others, check, draw",
    "generate": "pictures from text, up to 16384 x 16384",
    "distill": "train mixers in a text-to-image UNet to do what its self-attention does",
    "info": "versions, devices and backends",
}

EXAMPLES = """examples:
  gspn2 demo --out report
  gspn2 train --data digits --model test_gspn2 --out runs/digits
  gspn2 train --data photos/ --model gspn2_tiny --out runs/photos
  gspn2 eval runs/digits
  gspn2 predict runs/photos cat.jpg holiday/
  gspn2 export runs/photos --out exported
  gspn2 bench all --out bench
  gspn2 info --problem 1,8,512,512

`gspn2 COMMAND --help` describes a command and its options."""

# Import name: what an extra brings. Anything else that is missing is a bug, and shows as one.
OPTIONAL = {"timm", "torchvision", "safetensors", "sklearn", "PIL", "rich", "matplotlib", "huggingface_hub"}
EXTRAS = {
    "diffusers": "diffusers",
    "transformers": "diffusers",
    "accelerate": "diffusers",
    "datasets": "datasets",
    "onnx": "onnx",
    "onnxscript": "onnx",
    "onnxruntime": "onnx",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (without the program's name); returns the exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    command = next((word for word in argv if not word.startswith("-")), None)
    try:
        # A command's options are made in its module, whose imports take long enough to be interrupted.
        args = _parser(command).parse_args(argv)
        if args.command is None:
            _parser(None).print_help()
            return 2
        return int(_module(args.command).run(args))
    except SystemExit as stop:
        # --help and --version end with 0, errors with 2: argparse has printed what there is to say.
        return int(stop.code or 0)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader (head, less) has seen enough; keep the interpreter from flushing into it again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        # A full disk behind stdout, say; commands that write files have their own words for theirs.
        print(f"gspn2 {command}: error: {error}", file=sys.stderr)
        return 1
    except ModuleNotFoundError as error:
        package = (error.name or "").split(".")[0]
        if package not in OPTIONAL and package not in EXTRAS:
            raise
        extra = EXTRAS.get(package, "train")
        print(f'gspn2 {command}: needs {package}: pip install "gspn2[{extra}]"', file=sys.stderr)
        return 2


def _module(command: str) -> ModuleType:
    return importlib.import_module(f"gspn2.cli.{command}")


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, as all others are: a page of options would hide them."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}; see {self.prog} --help\n")


def _parser(command: str | None) -> argparse.ArgumentParser:
    """The parser; of all subcommands only `command` is imported and knows its options."""
    from .. import __version__

    parser = _Parser(
        prog="gspn2",
        description="GSPN-2: linear-cost 2D propagation for vision.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"gspn2 {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    for name, summary in COMMANDS.items():
        sub = commands.add_parser(
            name,
            help=summary,
            description=summary[0].upper() + summary[1:] + ".",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        if name == command:
            _module(name).add_arguments(sub)
    return parser


if __name__ == "__main__":
    sys.exit(main())
