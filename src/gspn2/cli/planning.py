"""The CUDA planner's part of `gspn2 info`: which kernels would run, how, and why."""

from __future__ import annotations

from typing import Any

from ..backends import Problem
from ..backends.cuda import plan, states_sum
from ..backends.cuda.geometry import Case, Device, Plan
from ..backends.cuda.layouts import imagined


def planned(problem: Problem, layout: str, *, backward: bool, keep_hidden: bool = False) -> dict[str, Any]:
    """What the planner decides for the problem on this machine's GPU, or else on an H200."""
    import torch

    if torch.cuda.is_available():
        from ..backends.cuda import driver

        device, name = driver.device(torch.cuda.current_device()), torch.cuda.get_device_name()
    else:
        device, name = Device(), "H200"
    options = {"gate": problem.normalize, "keep_hidden": keep_hidden}
    case = imagined(problem, layout, device, backward=backward, **options)
    in_parts = keep_hidden and not backward and (problem.normalize or len(problem.directions) > 1)
    chosen = _in_parts(case, layout) if in_parts else plan.choose(case)
    return {
        "device": name,
        "assumed": not torch.cuda.is_available(),
        "pass": "backward" if backward else "forward",
        "layout": layout,
        **_described(chosen),
        "declined": {name: reason for name, reason in plan.why_not(case).items() if reason is not None},
    }


def _in_parts(case: Case, layout: str) -> Plan:
    """Forward that keeps the states: the plans of all its scans and of their sum, as one."""
    states = imagined(case.problem, layout, case.device, backward=True, keep_hidden=True).views["y"]
    summed = {"x": states} | {name: case.views[name] for name in ("gate", "y") if name in case.views}
    parts = [plan.choose(scan) for scan in states_sum.scans(case, states)]
    parts.append(states_sum.plan(Case(case.problem, case.device, summed)))
    return Plan(
        " + ".join(part.variant for part in parts),
        tuple(launch for part in parts for launch in part.launches),
        max((part.scratch for part in parts), key=sum),
        (
            "a scan for each direction, then the sum",
            *dict.fromkeys(r for part in parts for r in part.reasons),
        ),
    )


def _described(chosen: Plan) -> dict[str, Any]:
    launches = [
        {
            "function": launch.kernel.function,
            "source": launch.kernel.source,
            "defines": dict(launch.kernel.defines),
            "grid": launch.grid,
            "block": launch.block,
            "cluster": launch.cluster,
            "shared": launch.shared,
            "knobs": list(launch.knobs),
        }
        for launch in chosen.launches
    ]
    return {
        "variant": chosen.variant,
        "launches": launches,
        "scratch": list(chosen.scratch),
        "reasons": list(chosen.reasons),
    }


def text(report: dict[str, Any]) -> list[str]:
    """Lines for people."""
    where = f"assuming an {report['device']}" if report["assumed"] else f"on {report['device']}"
    lines = [f"plan of the cuda backend, {report['pass']}, layout {report['layout']}, {where}"]
    lines.append(f"  {'variant':<14}{report['variant']}")
    lines += [f"  {'':<14}{reason}" for reason in report["reasons"]]
    for launch in report["launches"]:
        clusters = f" in clusters of {launch['cluster']}" if launch["cluster"] > 1 else ""
        lines += [
            f"  {'launch':<14}{launch['function']}: {launch['grid']:,} blocks{clusters} of {launch['block']} "
            f"threads, {_bytes(launch['shared'])} of shared memory a block",
            f"  {'':<14}knobs {' '.join(map(str, launch['knobs'])) or 'none'}; "
            + " ".join(f"{name}={value}" for name, value in launch["defines"].items()),
        ]
    scratch = " + ".join(_bytes(size) for size in report["scratch"] if size)
    lines.append(f"  {'scratch':<14}{scratch or 'none'}")
    lines += [f"  {name:<14}no: {reason}" for name, reason in report["declined"].items()]
    return lines


def _bytes(number: int) -> str:
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return f"{number} bytes"
