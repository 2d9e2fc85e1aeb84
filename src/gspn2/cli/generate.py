"""`gspn2 generate`."""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from ..training.errors import UserError
from .common import complain, floats, guarded, image_size, make_folder, positive

if TYPE_CHECKING:
    from ..integrations.diffusers.generate import Job

EPILOG = """examples:
  gspn2 generate "a lighthouse at dusk" --pipeline sdxl/ --mixers mixers/ --size 16384 --out lighthouse.tif
  gspn2 generate --prompts prompts.txt --pipeline sdxl/ --size 2048x4096 --out pictures/
  gspn2 generate "a lighthouse at dusk" --pipeline sdxl/ --size 1024 --direct --scheduler DDIMScheduler

Large pictures are made progressively: at the size the model was trained on, then enlarged and painted over at
twice the size, and so on. An interrupted run goes on with --resume after its last finished stage. Without
--mixers self-attention stays in place, and its time grows with the fourth power of the side."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `gspn2 generate`."""
    parser.epilog = EPILOG
    parser.add_argument("prompt", nargs="?", metavar="PROMPT", help="what the picture shows")
    parser.add_argument(
        "--prompts", type=Path, metavar="FILE", help="a prompt a line; --out is a folder, made if need be"
    )
    parser.add_argument("--pipeline", type=Path, required=True, metavar="PATH", help="folder of a pipeline")
    parser.add_argument("--mixers", metavar="PATH", help='folder of trained mixers, or "untrained"')
    parser.add_argument(
        "--size", type=image_size, default=(1024, 1024), metavar="HxW", help="(default: 1024)"
    )
    parser.add_argument("--out", type=Path, metavar="PATH", help=".png, .tif or .tiff (default: image.png)")
    parser.add_argument("--steps", type=positive, default=30, metavar="N", help="a stage (default: 30)")
    parser.add_argument("--guidance", type=float, default=5.0, metavar="X", help="1 for none (default: 5)")
    parser.add_argument("--negative", default="", metavar="TEXT", help="what the picture should not show")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="(default: 0)")
    parser.add_argument("--scheduler", metavar="NAME", help="a class of diffusers (default: the pipeline's)")
    parser.add_argument("--direct", action="store_true", help="one pass at the full size")
    parser.add_argument(
        "--strengths",
        type=floats,
        metavar="X,X",
        help="of the passes after the first (default: 0.42 to 0.28)",
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 ... (default: auto)")
    parser.add_argument("--dtype", help="float32, bfloat16 or float16 (default: bfloat16 on CUDA)")
    parser.add_argument("--memory", type=float, metavar="GB", help="to use at most (default: what is free)")
    parser.add_argument("--resume", action="store_true", help="go on after the last finished stage")
    parser.add_argument("--keep-stages", action="store_true", help="leave the stages' latents beside it")


def run(args: argparse.Namespace) -> int:
    """Generate; returns the exit code."""
    try:
        with _terminated_as_interrupted():
            return guarded("generate", lambda: _generate(args))
    except KeyboardInterrupt as stop:
        print("\ninterrupted; --resume goes on after the last finished stage", file=sys.stderr)
        return 128 + (stop.args[0] if stop.args else signal.SIGINT)


@contextlib.contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """Within the context SIGTERM unwinds as SIGINT does, so that no half-written file is left behind."""

    def stop(signum: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt(signum)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _generate(args: argparse.Namespace) -> int:
    from ..training.model import pick_device

    tasks = _tasks(args)
    import torch

    from ..integrations.diffusers.generate import Generator, Job, plan

    device = pick_device(args.device)
    job = Job(
        pipeline=args.pipeline,
        height=args.size[0],
        width=args.size[1],
        mixers=args.mixers,
        steps=args.steps,
        guidance=args.guidance,
        negative=args.negative,
        seed=args.seed,
        scheduler=args.scheduler,
        single=args.direct,
        strengths=args.strengths,
        device=str(device),
        dtype=args.dtype or ("bfloat16" if device.type == "cuda" else "float32"),
        memory=None if args.memory is None else _bytes(args.memory),
    )
    _check_outputs(tasks, several=args.prompts is not None)
    made = _Made(job, tasks, args.resume) if args.prompts is not None else None
    if made is not None and args.resume:
        left = [(prompt, out) for prompt, out in tasks if not made.holds(prompt, out)]
        print(f"{len(tasks) - len(left)} of {len(tasks)} pictures are there already", flush=True)
        others = sum(out.exists() for _, out in left)
        if others:
            print(f"{others} of other prompts, settings or weights will be replaced", flush=True)
        tasks = left
    if not tasks:
        return 0
    job.check_files()
    how = plan(job)
    print(f"peak memory: about {how.peak / 1e9:.1f} GB", flush=True)
    for i, stage in enumerate(job.stages()):
        print(f"stage {i + 1}: {stage.height} x {stage.width}, {stage.evaluations} steps", flush=True)
    if device.type == "cuda":
        # Kept, not hoped for: an allocation beyond it fails.
        total = torch.cuda.get_device_properties(device).total_memory
        index = torch.cuda.current_device() if device.index is None else device.index
        torch.cuda.set_per_process_memory_fraction(min(1.0, how.peak / total), index)
    if args.prompts is not None:
        make_folder(tasks[0][1].parent)
    generator = Generator(job, how, _Lines())
    try:
        generator.encode([prompt for prompt, _ in tasks])
        for prompt, out in tasks:
            began = time.perf_counter()
            generator.run(prompt, out, resume=args.resume, keep=args.keep_stages)
            if made is not None:
                made.note(prompt, out)
            print(f"wrote {out} ({time.perf_counter() - began:.1f} s)", flush=True)
    except torch.OutOfMemoryError:
        told = f"more than the {how.peak / 1e9:.1f} GB that were foreseen, or than are free"
        return complain("generate", f"out of device memory: it takes {told}; finished stages are kept", 1)
    if device.type == "cuda":
        print(f"peak memory: {torch.cuda.max_memory_allocated(device) / 1e9:.1f} GB allocated")
    return 0


def _bytes(gigabytes: float) -> int:
    if not math.isfinite(gigabytes):
        raise UserError(f"memory: expected a number of GB, got {gigabytes}")
    return int(gigabytes * 1e9)


def _tasks(args: argparse.Namespace) -> Sequence[tuple[str, Path]]:
    """Prompts and files."""
    if (args.prompt is None) == (args.prompts is None):
        raise UserError("prompt: expected either PROMPT or --prompts FILE")
    if args.prompts is None:
        return [(args.prompt, args.out or Path("image.png"))]
    try:
        # Editors on Windows begin a file with a mark.
        prompts = [line.strip() for line in args.prompts.read_text(encoding="utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"prompts: cannot read {args.prompts}: {error}") from error
    prompts = [prompt for prompt in prompts if prompt]
    if not prompts:
        raise UserError(f"prompts: no prompt in {args.prompts}")
    folder = args.out or Path(".")
    if folder.exists() and not folder.is_dir():
        raise UserError(f"out: expected a folder for several pictures, got {folder}, a file")
    digits = len(str(len(prompts) - 1))
    return [(prompt, folder / f"{i:0{digits}}.png") for i, prompt in enumerate(prompts)]


def _check_outputs(tasks: Sequence[tuple[str, Path]], several: bool) -> None:
    """A UserError where pictures cannot be written. The folder of several may be made later."""
    from ..integrations.diffusers.output import check_picture, check_writable

    folder = tasks[0][1].parent
    if several and not folder.exists():
        check_writable(folder)
        return
    for _, out in tasks:
        check_picture(out)


class _Made:
    """What the pictures of a folder were made from, in a file beside them: names alone do not tell.

    Args:
        job: what all of them are made with.
        tasks: prompts and files, one at least.
        resume: keep what the file says.
    """

    NAME = "pictures.json"

    def __init__(self, job: Job, tasks: Sequence[tuple[str, Path]], resume: bool) -> None:
        self._job = job
        self._path = tasks[0][1].parent / self.NAME
        self._digests: dict[str, str] = {}
        if resume and self._path.exists():
            try:
                self._digests = dict(json.loads(self._path.read_text(encoding="utf-8")))
            except (OSError, ValueError, TypeError) as error:
                raise UserError(f"out: {self._path} cannot be read, remove it: {error}") from error

    def _digest(self, prompt: str) -> str:
        return self._job.fingerprint(prompt, len(self._job.stages()) - 1)

    def holds(self, prompt: str, out: Path) -> bool:
        """Is the picture there, made from this prompt with these settings and weights?"""
        return out.exists() and self._digests.get(out.name) == self._digest(prompt)

    def note(self, prompt: str, out: Path) -> None:
        """A picture is there now."""
        from ..training.checkpoint import write_json

        self._digests[out.name] = self._digest(prompt)
        write_json(self._path, self._digests)


class _Lines:
    """Progress: one line that counts on a terminal, a line a stage elsewhere."""

    def __call__(self, what: str, done: int, total: int) -> None:
        if sys.stderr.isatty():
            print(f"\r\x1b[K{what} {done}/{total}", end="\n" if done == total else "", file=sys.stderr)
        elif done == total:
            print(f"{what}: done", flush=True)
