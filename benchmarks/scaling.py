"""How a training step of a backbone scales over the GPUs of a machine.

    torchrun --standalone --nproc-per-node 2 benchmarks/scaling.py

One launch measures 1, 2, 4 ... GPUs, up to as many as there are processes, in turn: forward, loss, backward
over NCCL and a step of AdamW in bfloat16 mixed precision, on images that lie on the device, eager and
compiled, with the same number of images for every GPU. Efficiency is over one GPU of the same launch.
Replicas (DDP) and, on all GPUs, shares (FSDP) are made by what `gspn2 train` makes them with.
Before that it checks that several processes learn what one does: the same losses, in float32 and at the same
global batch, within rounding.

Writes benchmarks/results/h200/scaling.json, whenever a part is done. `--device cpu` tries it out with gloo.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import timm
import torch
import torch._dynamo
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import gspn2.models  # noqa: F401  (registers them with timm)
from gspn2.bench import about
from gspn2.training.distributed import World, replicated
from gspn2.training.sharding import compile_shares, shard

BEGAN = time.perf_counter()
RESULTS = Path(__file__).resolve().parent / "results"
EFFICIENCY = {4: 0.92}
"""What is asked for, by GPUs."""
LOSS_TOLERANCE = 1e-3
"""Relative, of the loss of any step: what a different order of float32 sums comes to after a few of AdamW."""
STEPS, CLASSES = 6, 1000
PARTS = ("losses", "eager", "compiled")
WAYS = ("alone", "replicas", "shares", "whole")

Step = Callable[[], Tensor]


def main() -> int:
    arguments = parse()
    device = torch.device(arguments.device)
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    try:
        return measure(arguments, device)
    finally:
        dist.destroy_process_group()


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--model", default="gspn2_tiny")
    parser.add_argument("--batch", type=int, default=256, help="images for each GPU")
    parser.add_argument("--size", type=int, default=224, help="pixels of a side")
    parser.add_argument("--same-batch", type=int, default=32, help="images in all where losses are compared")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=8, help="training steps of a round")
    parser.add_argument("--parts", type=names(PARTS), default=PARTS, help=f"some of {','.join(PARTS)}")
    parser.add_argument("--ways", type=names(WAYS), default=WAYS, help=f"some of {','.join(WAYS)}")
    parser.add_argument("--out", type=Path, default=RESULTS / "h200" / "scaling.json")
    return parser.parse_args()


def names(known: tuple[str, ...]) -> Callable[[str], tuple[str, ...]]:
    """Some of the known, with commas between."""

    def parse(text: str) -> tuple[str, ...]:
        given = tuple(text.split(","))
        if not set(given) <= set(known):
            raise argparse.ArgumentTypeError(f"expected some of {', '.join(known)}, got {text!r}")
        return given

    return parse


def measure(arguments: argparse.Namespace, device: torch.device) -> int:
    """All parts on all ranks; 1 if the losses differ."""
    sizes = [size for size in (1, 2, 4, 8, 16) if size <= dist.get_world_size()]
    groups = {size: dist.new_group(list(range(size))) for size in sizes}
    result: dict[str, Any] = {
        "machine": {
            **about.machine(device, f"torchrun --nproc-per-node {dist.get_world_size()} {command()}"),
            "gpus": dist.get_world_size(),
        },
        "complete": False,
        "section": "scaling",
        "model": arguments.model,
        "pixels": arguments.size,
        "batch_per_gpu": arguments.batch,
        "dtype": "bfloat16",
        "rounds": arguments.rounds,
        "targets": EFFICIENCY,
        "cases": [],
    }
    if "losses" in arguments.parts:
        result["losses"] = losses(arguments, device, groups)
        save(result, arguments.out)
    for compiled in (part == "compiled" for part in arguments.parts if part != "losses"):
        for how, module, size in ways(arguments, device, compiled, sizes):
            row: dict[str, Any] = {"gpus": size, "compiled": compiled, "how": how}
            row |= timed(arguments, device, module, how, size, groups[size], compiled)
            first = next((it for it in result["cases"] if it["compiled"] == compiled), row)
            row["efficiency"] = row["images_per_s"] / size / first["images_per_s"]
            if size in EFFICIENCY and device.type == "cuda" and how != "shares":
                row |= {"target": EFFICIENCY[size], "met": row["efficiency"] >= EFFICIENCY[size]}
            result["cases"].append(row)
            say(f"{time.perf_counter() - BEGAN:.0f} s: {row}")
            save(result, arguments.out)
    result["complete"] = True
    save(result, arguments.out)
    return 0 if result.get("losses", {"same": True})["same"] else 1


def ways(
    arguments: argparse.Namespace, device: torch.device, compiled: bool, sizes: list[int]
) -> Iterator[tuple[str, nn.Module, int]]:
    """How gradients are averaged, the model for it and the number of GPUs, one case after the other.

    "alone": one GPU. "replicas": DDP, as in training; compiled, the graph is cut at DDP's buckets, so that
    they travel while others are computed. "shares": FSDP. "whole": compiled, the graph of one GPU, which ends
    before the first bucket travels.
    """
    module = model(arguments, device)
    runner: nn.Module = torch.compile(module) if compiled else module  # type: ignore[assignment]
    asked = arguments.ways
    if "alone" in asked:
        yield "alone", runner, 1
    for size in sizes[1:]:
        if "replicas" in asked:
            yield "replicas", runner, size
    if sizes[-1] > 1 and "shares" in asked:
        yield "shares", model(arguments, device, torch.contiguous_format), sizes[-1]
    for size in sizes[1:]:
        if compiled and "whole" in asked:
            yield "whole", runner, size


def model(
    arguments: argparse.Namespace, device: torch.device, layout: torch.memory_format = torch.channels_last
) -> nn.Module:
    """The same weights on every rank."""
    torch.manual_seed(0)
    with device:
        made: nn.Module = timm.create_model(arguments.model, num_classes=CLASSES)
    return made.to(memory_format=layout).train()  # type: ignore[call-overload]


def timed(
    arguments: argparse.Namespace,
    device: torch.device,
    module: nn.Module,
    how: str,
    size: int,
    group: dist.ProcessGroup | None,
    compiled: bool,
) -> dict[str, Any]:
    """Images per second of `size` GPUs; the ranks beyond them wait."""
    member = dist.get_rank() < size
    before = time.perf_counter()
    step = stepper(arguments, device, module, how, group, compiled) if member else None
    for _ in range(3):
        if step is not None:
            step()
    synchronize(device)
    warm_up = time.perf_counter() - before
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    samples = []
    for _ in range(arguments.rounds):
        synchronize(device)
        agree(0.0)
        begin = time.perf_counter()
        if step is not None:
            for _ in range(arguments.steps):
                step()
        synchronize(device)
        samples.append(agree(time.perf_counter() - begin if member else 0.0) / arguments.steps)
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    del step
    gc.collect()  # DDP's hooks must not be there when the next number of GPUs wraps the same parameters.
    seconds = statistics.median(samples)
    return {
        "ms": 1e3 * seconds,
        "fastest_ms": 1e3 * min(samples),
        "images_per_s": size * arguments.batch / seconds,
        "peak_bytes": peak,
        "warm_up_s": warm_up,
    }


def stepper(
    arguments: argparse.Namespace,
    device: torch.device,
    module: nn.Module,
    how: str,
    group: dist.ProcessGroup | None,
    compiled: bool,
) -> Step:
    """Forward, loss, backward and a step of AdamW; gradients are averaged over the group, if there is one."""
    batch, pixels = arguments.batch, arguments.size
    images = torch.randn(batch, 3, pixels, pixels, device=device).to(memory_format=torch.channels_last)
    labels = torch.randint(0, CLASSES, (batch,), device=device)
    runner = spread(module, device, how, group, compiled)
    # Read at the first step, when the graph is made.
    torch._dynamo.config.optimize_ddp = how != "whole"
    torch._dynamo.reset()
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-5, fused=device.type == "cuda")

    def step() -> Tensor:
        with torch.autocast(device.type, torch.bfloat16):
            loss = F.cross_entropy(runner(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


def spread(
    module: nn.Module, device: torch.device, how: str, group: dist.ProcessGroup | None, compiled: bool
) -> nn.Module:
    """The module as `how` says (see `ways`)."""
    if how == "alone":
        return module
    if how == "shares":
        shard(module, device, World(dist.get_rank(), dist.get_world_size()), compiled)
        return compile_shares(module) if compiled else module
    return replicated(module, device, group)


def losses(
    arguments: argparse.Namespace, device: torch.device, groups: dict[int, dist.ProcessGroup | None]
) -> dict[str, Any]:
    """Losses of a few steps in float32, one batch shared out to 1, 2, 4 ... processes."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    found: dict[str, list[float]] = {}
    cases = [(size, "alone" if size == 1 else "replicas") for size in groups]
    cases += [(size, "shares") for size in groups if size == dist.get_world_size() > 1]
    for size, how in cases:
        mine = [0.0] * STEPS
        if dist.get_rank() < size:
            mine = learned(arguments, device, how, size, groups[size])
        # Those who take part hold the same mean; the others add nothing.
        shared = torch.tensor(mine if dist.get_rank() == 0 else [0.0] * STEPS, dtype=torch.float64)
        dist.all_reduce(shared)
        found[f"{size}, shares" if how == "shares" else str(size)] = shared.tolist()
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before
    off = max(abs(a - b) / abs(b) for each in found.values() for a, b in zip(each, found["1"], strict=True))
    say(f"{time.perf_counter() - BEGAN:.0f} s: losses {found}, relative difference {off:.1e}")
    return {
        "batch": arguments.same_batch,
        "steps": STEPS,
        "by_gpus": found,
        "relative_difference": off,
        "tolerance": LOSS_TOLERANCE,
        "same": off <= LOSS_TOLERANCE,
    }


def learned(
    arguments: argparse.Namespace, device: torch.device, how: str, size: int, group: dist.ProcessGroup | None
) -> list[float]:
    """Mean losses of the group, whose ranks take equal shares of the same images."""
    total, pixels = arguments.same_batch, arguments.size
    if total % size:
        raise SystemExit(f"--same-batch: expected a multiple of {size}, got {total}")
    layout = torch.contiguous_format if how == "shares" else torch.channels_last
    module = model(arguments, device, layout)
    runner = spread(module, device, how, group, compiled=False)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-4)
    share = slice(dist.get_rank() * total // size, (dist.get_rank() + 1) * total // size)
    generator = torch.Generator().manual_seed(1)
    found = []
    for _ in range(STEPS):
        images = torch.randn(total, 3, pixels, pixels, generator=generator)[share]
        labels = torch.randint(0, CLASSES, (total,), generator=generator)[share].to(device)
        images = images.to(device, memory_format=torch.channels_last)
        loss = F.cross_entropy(runner(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        mean = loss.detach().double().cpu()
        if size > 1:
            dist.all_reduce(mean, group=group)
        found.append(mean.item() / size)
    return found


def agree(value: float) -> float:
    """The largest value of all ranks; by gloo, so that a waiting GPU runs nothing."""
    shared = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(shared, dist.ReduceOp.MAX)
    return shared.item()


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def say(text: str) -> None:
    if dist.get_rank() == 0:
        print(text, flush=True)


def save(result: dict[str, Any], path: Path) -> None:
    if dist.get_rank() == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=2) + "\n")


def command() -> str:
    return " ".join(["benchmarks/scaling.py", *sys.argv[1:]])


if __name__ == "__main__":
    sys.exit(main())
