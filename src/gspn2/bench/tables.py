"""What the report and the document share: rows of tables, and sentences on machine and method."""

from __future__ import annotations

from typing import Any

from . import terminal
from .results import Row, beaten_floors, timed
from .terminal import digits

BASELINE_TOLERANCE = 0.15
"""How far the baseline may be from the released kernel before it is remarked on."""
HEADS = ("", "pass", "ms", "+-", "GB/s", "of copy", "of the floor", "over the first", "more")


def cells(row: Row) -> list[list[str]]:
    """The timed passes of a case, by `HEADS`."""
    first = terminal.first_times(row.get("contenders", []))
    return [[*terminal.cells(it, first), _more(it)] for it in timed(row)]


def _more(it: Row) -> str:
    found = []
    if "images" in it:
        found.append(f"{digits(it['images'] / it['ms'] * 1e3)} images/s")
    if "peak_bytes" in it:
        found.append(f"{it['peak_bytes'] / 2**30:.2f} GiB")
    if "released_ms" in it:
        told = f", more than {BASELINE_TOLERANCE:.0%} away" if _is_far(it) else ""
        found.append(f"{_of_released(it):.2f} of the released kernel's {it['released_ms']:g} ms{told}")
    if it.get("fits_in_cache"):
        found.append("would fit in the cache")
    if "note" in it:
        found.append(it["note"])
    return "; ".join(found)


def _of_released(it: Row) -> float:
    return it["ms"] / it["released_ms"]


def _is_far(it: Row) -> bool:
    """Is the baseline so far from the released kernel that it is remarked on?"""
    return "released_ms" in it and abs(_of_released(it) - 1) > BASELINE_TOLERANCE


def far(content: dict[str, Any]) -> str:
    """Where the baseline is no good measure of the released kernel, or ""."""
    found = [
        f"{row['bench']}: {row['case']}, {it['pass']} ({_of_released(it):.2f})"
        for row in content["cases"]
        for it in timed(row)
        if _is_far(it)
    ]
    if not found:
        return ""
    return (
        f"The baseline is more than {BASELINE_TOLERANCE:.0%} away from the time of the released kernel, and "
        f"factors over it are off by as much, at {'; '.join(found)}."
    )


def facts_of(row: Row) -> str:
    """Sizes and what else defines a case, in a line."""
    shown = {
        key: value
        for key, value in row["facts"].items()
        if key not in ("rungs", "paper_gb_per_s", "paper_size", "models", "series", "value", "proxies")
    }
    return ", ".join(f"{key.replace('_', ' ')} {_value(value)}" for key, value in shown.items())


def _value(value: Any) -> str:
    if isinstance(value, list):
        return " x ".join(map(str, value))
    if isinstance(value, dict):
        return ", ".join(f"{name} {it}" for name, it in value.items())
    return str(value)


def rate_texts(content: dict[str, Any]) -> dict[str, str]:
    """How fast each kind of device copies, reads and multiplies."""
    found = {}
    for kind, it in content["rates"].items():
        best = it.get("fastest_gb_per_s")
        found[kind] = ", ".join(
            [
                f"copy {digits(it['copy_gb_per_s'])} GB/s",
                *([f"reading or copying at best {digits(best)} GB/s"] if best else []),
                f"{it.get('matrix_by', 'matrix product')} {digits(it['matrix_tflop_per_s'])} TFLOP/s "
                f"({it['matrix_dtype']}, {it['matrix_side']} x {it['matrix_side']})",
            ]
        )
    return found


def where(machine: dict[str, Any]) -> str:
    """The machine and the versions that matter there."""
    facts = [machine["processor"], f"{machine['threads']} threads"]
    if "device" in machine:
        facts = [f"one {machine['device']}", f"driver {machine['driver']}", f"CUDA {machine['cuda']}"]
    facts += [f"Python {machine['python']}", f"PyTorch {machine['torch']}"]
    commit = f"commit {machine['commit']}" + (" with changes" if machine["uncommitted_changes"] else "")
    return ", ".join([*facts, commit, machine["date"]])


def busy(content: dict[str, Any]) -> str:
    """A warning where others were using the processors when a run began, or ""."""
    machine = content["machine"]
    load = machine.get("load") or 0
    if load < max(1, machine["threads"] / 2):
        return ""
    told = f"was busy with other work when this run began (load {load:g} on {machine['threads']} threads)"
    if "cpu" in content["rates"]:
        return (
            f"The CPU {told}: its times here are longer than on a quiet machine, those of short threaded "
            "calls by far, and ratios of them say little."
        )
    return f"The host {told}: what it launches call by call may take longer than on a quiet machine."


def by_fastest(content: dict[str, Any]) -> bool:
    """Are floors made of the fastest samples of reading, copying and several products?"""
    return any("fastest_gb_per_s" in it for it in content["rates"].values())


def beaten(content: dict[str, Any]) -> str:
    """What is faster than its floor, and why that can be, or ""."""
    found = beaten_floors(content["cases"])
    if not found:
        return ""
    if by_fastest(content):
        why = "caches, clocks that rose, or other patterns of access were not in the rates it is made of"
    elif content["run"]["device"] == "cuda":
        why = (
            "floors are made of the median of a copy, which writes as much as it reads, and memory that is "
            "mostly read, as by a scan, is faster than that"
        )
    else:
        why = (
            "floors are made of one product by PyTorch's BLAS, measured when the run began, and convolutions "
            "are faster than that on this processor"
        )
    return f"Faster than their floors: {'; '.join(found)}. Such a floor is none: {why}."


def method(content: dict[str, Any]) -> str:
    """How it was measured, in words."""
    on_gpu = content["run"]["device"] == "cuda"
    clock = (
        "device events around CUDA graphs of many launches, which leaves the host out; the baseline and what "
        "autograd runs are launched from the host, as they are in use"
        if on_gpu
        else "the host's clock"
    )
    inputs = (
        "Inputs are random; those of the operator are larger than the cache or rotated through more memory "
        "than it holds, the baseline, layers and models find theirs as the call before left them."
        if on_gpu
        else "Inputs are random; where those of the operator are few, four sets are used in rotation."
    )
    floor = (
        "the floor is the larger of the time of as many bytes at the rate of reading or copying and the time "
        "of as many operations at the rate of the fastest of several products, by the best sample of the run"
        if by_fastest(content)
        else "the floor is the larger of the time in which as many bytes are copied and the time of as many "
        "operations at the rate of a large matrix product, both measured in the same run"
    )
    return (
        "Every result is checked before it is timed, the operator against a reference in float64 with "
        "memory poisoned before and two runs compared; what is wrong gets no speed. Contenders of a case "
        f"run in turn with each other and with a large copy; times are medians by {clock}, and +- is half "
        f"the distance of the quartiles. {inputs} GB/s counts every input read once and every output "
        f"written once; {floor}. Clocks are left alone."
    )
