"""Contenders that several parts share: the operator, the baseline, launches of the bench's own kernels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..backends import Problem
from ..backends.cuda.geometry import Plan
from . import baseline
from .case import Absent, Contender, Pass
from .launches import ready
from .measure import Work
from .operator import Operands, Scan, check, make_inputs, operator_calls

CPU_SETS = 4
"""Input sets in rotation without a GPU, where all of a round is timed."""
BASELINE_SLACK = {torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 0.02}
"""Relative error allowed to the baseline: its states are rounded to storage line after line."""
STAND_IN = "baseline (loop in PyTorch)"
BASELINE = "baseline"


def operator(name: str, scan: Scan, device: torch.device) -> Contender:
    """What the package runs for a problem, forward and backward as `scan.passes` says."""

    def make() -> dict[str, Pass]:
        inputs = make_inputs(scan, device, CPU_SETS if device.type == "cpu" else None)
        calls = operator_calls(scan, inputs, None)
        return {
            which: Pass(
                Work(calls[which], len(inputs)),
                lambda which=which: check(replace(scan, passes=(which,)), inputs[0], calls),  # type: ignore[misc]
                scan.bytes(which),
                scan.flops(which),
            )
            for which in scan.passes
        }

    return Contender(name, make)


def gspn1(scan: Scan, device: torch.device) -> Contender:
    """The baseline for a scan to the right with per-channel taps; without a GPU a loop stands in."""
    if device.type == "cpu":
        return Contender(STAND_IN, lambda: _loop(scan, device))
    return Contender(BASELINE, lambda: _gspn1(scan, device))


def _gspn1(scan: Scan, device: torch.device) -> dict[str, Pass]:
    operands = single(scan, device)
    runs = {which: _baseline_run(scan, operands, which == "backward") for which in scan.passes}
    return {
        which: Pass(
            # Launched one by one, as the released code does: that is part of what it costs.
            Work(lambda i, run=run: run(), graph=False),  # type: ignore[misc]
            lambda which=which: _check(scan, operands, {which: runs[which]}, which),  # type: ignore[misc]
            scan.bytes(which),
            scan.flops(which),
            _released(scan, which, device),
        )
        for which, run in runs.items()
    }


def _baseline_run(scan: Scan, operands: Operands, backward: bool) -> Callable[[], tuple[Tensor, ...]]:
    """One pass of the baseline; its outputs are allocated once."""
    x, taps, lam, _, dy = operands
    assert lam is not None
    problem = scan.problem()
    y = torch.empty_like(x)
    tensors = {"x": x, "taps": taps, "lam": lam, "y": y}
    forward = ready(baseline.plan(problem, False), problem, tensors)
    if not backward:
        return _with_outputs(forward, (y,))
    forward()
    gradients = {"dx": torch.empty_like(x), "dtaps": torch.empty_like(taps), "dlam": torch.empty_like(lam)}
    run = ready(baseline.plan(problem, True), problem, {**tensors, "dy": dy, **gradients})
    return _with_outputs(run, (*gradients.values(), x.new_empty(0)))


def _with_outputs(run: Callable[[], None], outputs: tuple[Tensor, ...]) -> Callable[[], tuple[Tensor, ...]]:
    def call() -> tuple[Tensor, ...]:
        run()
        return outputs

    return call


def _check(
    scan: Scan, operands: Operands, runs: dict[str, Callable[[], tuple[Tensor, ...]]], which: str
) -> dict[str, float]:
    return check_launches(scan, operands, runs[which], which, BASELINE_SLACK[scan.dtype])


def check_launches(
    scan: Scan,
    operands: Operands,
    run: Callable[[], tuple[Tensor, ...]],
    which: str,
    slack: float | None = None,
) -> dict[str, float]:
    """As `operator.check`, for launches that write to the same memory each time."""

    def fresh(_: int) -> Any:
        for output in run():
            output.fill_(torch.nan)
        found = tuple(output.clone() for output in run())
        return found[0] if which == "forward" else found

    return check(replace(scan, passes=(which,)), operands, {which: fresh}, slack)


def launched(
    name: str, plan: Callable[[Problem], Plan], scan: Scan, device: torch.device, slack: float | None = None
) -> Contender:
    """A kernel of the bench, forward."""

    def make() -> dict[str, Pass]:
        if device.type == "cpu":
            raise Absent("a CUDA kernel")
        problem = scan.problem()
        operands = single(scan, device)
        x, taps, lam, _, _ = operands
        assert lam is not None
        y = torch.empty_like(x)
        tensors = {"x": x, "taps": taps, "lam": lam, "y": y}
        run = _with_outputs(ready(plan(problem), problem, tensors), (y,))
        return {
            "forward": Pass(
                Work(lambda i: run()),
                lambda: check_launches(scan, operands, run, "forward", slack),
                scan.bytes("forward"),
                scan.flops("forward"),
            )
        }

    return Contender(name, make)


def single(scan: Scan, device: torch.device) -> Operands:
    """One set of inputs: the problem is larger than the cache, or is meant to be in it."""
    (operands,) = make_inputs(scan, device, 1)
    return operands


def _released(scan: Scan, which: str, device: torch.device) -> dict[str, Any]:
    """What the released kernel took, where it was measured on such a device."""
    if device.type != "cuda" or torch.cuda.get_device_name(device) != baseline.DEVICE:
        return {}
    found = baseline.released(scan.size, scan.dtype, which == "backward")
    return {} if found is None else {"released_ms": found}


def _loop(scan: Scan, device: torch.device) -> dict[str, Pass]:
    operands = single(scan, device)
    x, taps, lam, _, dy = operands
    assert lam is not None
    leaves = [it.detach().requires_grad_() for it in (x, taps[:, 0], lam[:, 0])]

    def forward(_: int) -> Tensor:
        with torch.no_grad():
            return baseline.loop(x, lam[:, 0], taps[:, 0])

    def backward(_: int) -> tuple[Tensor, ...]:
        y = baseline.loop(leaves[0], leaves[2], leaves[1])
        dx, dtaps, dlam = torch.autograd.grad(y, leaves, dy)
        return dx, dtaps.unsqueeze(1), dlam.unsqueeze(1), x.new_empty(0)

    calls: dict[str, Callable[[int], Any]] = {"forward": forward, "backward": backward}
    note = {"note": "autograd: forward and backward"}
    return {
        which: Pass(
            Work(calls[which]),
            lambda which=which: check(  # type: ignore[misc]
                replace(scan, passes=(which,)), operands, calls, BASELINE_SLACK[scan.dtype]
            ),
            scan.bytes(which),
            scan.flops(which),
            note if which == "backward" else {},
        )
        for which in scan.passes
    }
