"""The table of what `scaling.py` measured on several GPUs, for `tables.py`."""

from __future__ import annotations

from typing import Any

import markdown_table as md

Result = dict[str, Any]

HOW = {
    "alone": "-",
    "replicas": "replicas (DDP)",
    "shares": "shares (`--shard`)",
    "whole": "replicas, graph in one piece",
}
ABSENT = "*Not measured yet: `torchrun --nproc-per-node N benchmarks/scaling.py` fills this table.*\n"


def make(result: Result) -> str:
    """A row for each number of GPUs and way to share the work."""
    rows = [
        [
            str(case["gpus"]),
            "compiled" if case["compiled"] else "eager",
            HOW[case["how"]],
            md.ms(case["ms"]),
            f"{case['images_per_s']:.0f}",
            md.percent(case["efficiency"]) + (" (missed)" if case.get("met") is False else ""),
            f"{case['peak_bytes'] / 1e9:.1f} GB" if case["peak_bytes"] else "-",
        ]
        for case in result["cases"]
    ]
    heads = ["GPUs", "", "gradients by", "step, ms", "images/s", "efficiency", "memory of each"]
    return md.table(heads, rows, words=(1, 2)) + md.note(result, f"{_problem(result)} {_losses(result)}")


def _problem(result: Result) -> str:
    missing = "" if result["complete"] else " The run was ended before all cases were measured."
    targets = {int(gpus): value for gpus, value in result["targets"].items()}
    told = "".join(
        f" Asked for at {gpus} GPUs: {md.percent(value)}"
        + ("." if any(case["gpus"] == gpus for case in result["cases"]) else "; not measured.")
        for gpus, value in targets.items()
    )
    return (
        f"Training step of `{result['model']}` (forward, loss, backward, AdamW), {result['dtype']}, "
        f"{result['batch_per_gpu']} images of {result['pixels']} x {result['pixels']} on each GPU. "
        "Efficiency is images a second over those of one GPU, times their number, within one run."
        f"{told}{missing}"
    )


def _losses(result: Result) -> str:
    losses = result["losses"]
    verdict = "the same losses" if losses["same"] else "other losses (a failure)"
    return (
        f"At one global batch of {losses['batch']} in float32, {losses['steps']} steps of one process and of "
        f"several, replicas and shares, give {verdict}: they differ by {losses['relative_difference']:.0e} "
        "at most, relatively."
    )
