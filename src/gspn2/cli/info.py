"""`gspn2 info`: what is installed, which backend would run, and how. Needs the core dependencies only."""

from __future__ import annotations

import argparse
import json
import os
import platform
from importlib import metadata
from typing import TYPE_CHECKING, Any

from .common import complain, optional, positive

if TYPE_CHECKING:
    from ..backends import Problem

PACKAGES = (
    "torch",
    "numpy",
    "numba",
    "cuda-core",
    "cuda-bindings",
    "triton",
    "timm",
    "torchvision",
    "safetensors",
    "diffusers",
    "transformers",
    "scikit-learn",
    "rich",
    "matplotlib",
)
DTYPES = ("float32", "bfloat16", "float16", "float64")

EPILOG = """examples:
  gspn2 info
  gspn2 info --problem 1,8,512,512 --dtype bfloat16 --directions down,up
  gspn2 info --problem 32,64,64,64 --dtype bfloat16 --layout channels --device cuda --backward
  gspn2 info --problem 32,64,56,56 --groups 64 --device cuda --json"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `gspn2 info`."""
    parser.epilog = EPILOG
    parser.add_argument(
        "--problem",
        metavar="B,C,H,W",
        type=_sizes,
        default=(1, 8, 224, 224),
        help="shape of x (default: 1,8,224,224)",
    )
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="storage type (default: float32)")
    parser.add_argument("--device", help="cpu or cuda (default: cuda where there is one)")
    parser.add_argument("--directions", default="down,up,right,left", help="with commas (default: all four)")
    parser.add_argument(
        "--groups",
        type=positive,
        default=1,
        metavar="G",
        help="tap groups, a divisor of C (default: 1, shared by all channels)",
    )
    parser.add_argument(
        "--chunk", type=optional(positive), metavar="N", help="lines between restarts (default: none)"
    )
    parser.add_argument(
        "--line-scan", action="store_true", help="line_scan: one direction, weights as given, no gate"
    )
    cuda = parser.add_argument_group("on cuda")
    cuda.add_argument(
        "--layout",
        choices=("planes", "channels"),
        default="planes",
        help="contiguous planes, or channels innermost, as models have them (default: planes)",
    )
    cuda.add_argument("--backward", action="store_true", help="plan the gradients")
    cuda.add_argument(
        "--keep-hidden", action="store_true", help="forward leaves the states of all directions for backward"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Print what there is; returns the exit code."""
    try:
        report = {**_system(), "problem": _problem(args)}
    except ValueError as error:
        return complain("info", error, 2)
    print(json.dumps(report, indent=2) if args.json else _text(report))
    return 0


def _sizes(text: str) -> tuple[int, ...]:
    parts = text.split(",")
    if len(parts) != 4 or not all(part.isdigit() and int(part) > 0 for part in parts):
        raise argparse.ArgumentTypeError(
            f"expected B,C,H,W as four whole numbers of at least 1, got {text!r}"
        )
    return tuple(int(part) for part in parts)


def _system() -> dict[str, Any]:
    import torch

    import gspn2

    versions: dict[str, str | None] = {"gspn2": gspn2.__version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "versions": versions,
        "system": platform.platform(),
        "cpu": {
            "name": _cpu_name(),
            "cores": os.cpu_count(),
            "usable": usable,
            "threads": torch.get_num_threads(),
        },
        "gpus": [_gpu(index) for index in range(torch.cuda.device_count())],
        "cuda": torch.version.cuda,
    }


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def _gpu(index: int) -> dict[str, Any]:
    import torch

    properties = torch.cuda.get_device_properties(index)
    return {
        "name": properties.name,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "capability": f"{properties.major}.{properties.minor}",
    }


def _problem(args: argparse.Namespace) -> dict[str, Any]:
    import torch

    from ..backends import DIRECTIONS, Problem, why_not

    directions = tuple(args.directions.split(","))
    wrong = [name for name in directions if name not in DIRECTIONS]
    if wrong or len(set(directions)) != len(directions):
        raise ValueError(
            f"--directions: expected some of {','.join(DIRECTIONS)}, none twice, got {args.directions}"
        )
    batch, channels, height, width = args.problem
    if args.line_scan and len(directions) > 1:
        raise ValueError(f"--directions: line_scan has one, got {args.directions}")
    if channels % args.groups:
        raise ValueError(f"--groups: expected a divisor of C = {channels}, got {args.groups}")
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device not in ("cpu", "cuda"):
        raise ValueError(f"--device: expected cpu or cuda, got {device!r}")
    problem = Problem(
        directions=directions,
        chunk=args.chunk,
        normalize=not args.line_scan,
        batch=batch,
        channels=channels,
        groups=args.groups,
        height=height,
        width=width,
        dtype=getattr(torch, args.dtype),
        device=device,
    )
    declined = why_not(problem)
    return {
        "shape": list(args.problem),
        "dtype": args.dtype,
        "device": device,
        "directions": list(directions),
        "groups": args.groups,
        "chunk": args.chunk,
        "runs": next(name for name, reason in declined.items() if reason is None),
        "why_not": declined,
        "plan": _plan(problem, args),
    }


def _plan(problem: Problem, args: argparse.Namespace) -> dict[str, Any] | None:
    """The launch plan of the CUDA backend, if the problem is one for it."""
    if problem.device != "cuda" or args.dtype == "float64":
        return None
    from .planning import planned

    return planned(problem, args.layout, backward=args.backward, keep_hidden=args.keep_hidden)


def _text(report: dict[str, Any]) -> str:
    cpu, problem = report["cpu"], report["problem"]
    threads = "1 thread" if cpu["threads"] == 1 else f"{cpu['threads']} threads"
    lines = ["versions"]
    lines += [f"  {name:<14}{version or 'not installed'}" for name, version in report["versions"].items()]
    lines += [
        "devices",
        f"  {'cpu':<14}{cpu['name']}; {cpu['usable']} of {cpu['cores']} cores, {threads}",
    ]
    built = f"CUDA {report['cuda']}" if report["cuda"] else "the CPU only"
    lines += [
        f"  {f'cuda:{i}':<14}{gpu['name']}; {gpu['memory_gib']} GiB, compute capability {gpu['capability']}"
        for i, gpu in enumerate(report["gpus"])
    ] or [f"  {'cuda':<14}no device (torch is built for {built})"]
    shape = " x ".join(map(str, problem["shape"]))
    chunk = f"chunk {problem['chunk']}" if problem["chunk"] else "no chunk"
    lines += [
        f"backends for x {shape}, {problem['dtype']} on {problem['device']}, G = {problem['groups']}, "
        f"{'+'.join(problem['directions'])}, {chunk}"
    ]
    for name, reason in problem["why_not"].items():
        state = "runs" if name == problem["runs"] else "can run" if reason is None else f"no: {reason}"
        lines.append(f"  {name:<14}{state}")
    if problem["plan"] is not None:
        from .planning import text

        lines += text(problem["plan"])
    return "\n".join(lines)
