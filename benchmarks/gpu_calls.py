"""What a call from Python costs on the host, what a CUDA graph makes of it, and the memory of training."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

import gspn2
from gpu_cases import (
    BOTH,
    DIRECTIONS,
    NARROW,
    PIXELS,
    PLANES,
    WIDE,
    Case,
    Operands,
    Wrong,
    check,
    make_inputs,
    operator_calls,
    shrunk,
)
from gpu_timing import Work, capture, milliseconds, prepare, spread

Row = dict[str, Any]
EAGER_US, REPLAY_US = 25, 3
MEMORY = 1.25
SLEEP_CYCLES = 2_000_000
"""About a millisecond: what is queued behind it starts when the host is done queueing."""
QUEUED = 20

CALLED = [
    ((1, 8, 64, 64), PLANES),
    ((256, 2, 14, 14), PIXELS),
    ((32, 64, 64, 64), PIXELS),
]
TRAINED = [
    Case((16, 8, 1024, 1024), NARROW, "shared", DIRECTIONS, PLANES, scaled=True, passes=BOTH),
    Case((16, 8, 1024, 1024), NARROW, "shared", DIRECTIONS, PIXELS, scaled=True, passes=BOTH),
    Case((1, 80, 1024, 1024), NARROW, "shared", DIRECTIONS, PIXELS, scaled=True, passes=BOTH),
    Case((1, 80, 1024, 1024), NARROW, "shared", DIRECTIONS, PLANES, passes=BOTH),
    Case((1, 80, 1024, 1024), NARROW, "per-channel", DIRECTIONS, PLANES, scaled=True, passes=BOTH),
    Case((16, 8, 1024, 1024), WIDE, "per-channel", ("right",), PLANES, scan=True, passes=BOTH),
    Case((256, 2, 56, 56), NARROW, "shared", DIRECTIONS, PIXELS, scaled=True, passes=BOTH),
]


def called() -> list[Case]:
    return [Case(size, NARROW, "shared", DIRECTIONS, layout, scaled=True) for size, layout in CALLED]


def calls(device: torch.device, backend: str | None) -> list[tuple[str, Callable[[], list[Row]]]]:
    """Labels and functions: host time of eager calls, and what a replayed graph adds to its kernel."""
    cases = [shrunk(case) for case in called()] if device.type == "cpu" else called()
    return [(case.name, lambda case=case: [_call(case, device, backend)]) for case in cases]


def _call(case: Case, device: torch.device, backend: str | None) -> Row:
    inputs = make_inputs(case, device)[:1]
    forward = operator_calls(case, inputs, backend)["forward"]
    row = case.describe() | {"input_sets": 1}
    try:
        check(case, inputs[0], {"forward": forward})
    except (Wrong, RuntimeError) as error:
        return {**row, "error": str(error).splitlines()[0]}
    with torch.no_grad():
        row["eager"] = _host_us(lambda: forward(0), device)
    step, parts = _training(inputs[0], backend)
    row["eager_with_grad"] = _host_us(parts, device)
    row["forward_and_backward"] = _host_us(step, device)
    row["eager"] |= {"target": {"metric": "us", "value": EAGER_US}, "met": row["eager"]["us"] <= EAGER_US}
    if device.type == "cuda":
        row |= _replayed(forward, device)
    return row


def _training(operands: Operands, backend: str | None) -> tuple[Callable[[], object], Callable[[], object]]:
    """A training step, and its forward part, on operands that need gradients."""
    leaves = [None if tensor is None else tensor.detach().requires_grad_() for tensor in operands[:4]]
    wanted = [leaf for leaf in leaves if leaf is not None]

    def forward() -> torch.Tensor:
        return gspn2.propagate(*leaves, backend=backend)

    def step() -> object:
        return torch.autograd.grad(forward(), wanted, operands.dy)

    return step, forward


def _host_us(run: Callable[[], object], device: torch.device) -> dict[str, Any]:
    """Time on the host of single calls into an empty queue; nothing waits for the device."""
    samples: list[float] = []
    for number in range(220 if device.type == "cuda" else 5):
        if device.type == "cuda" and number % 10 == 0:
            torch.cuda.synchronize()
        begin = time.perf_counter()
        run()
        samples.append(1e6 * (time.perf_counter() - begin))
    return spread(samples[20:] or samples, "us")


def _replayed(forward: Callable[[int], Any], device: torch.device) -> Row:
    """Device time of one call in a graph of many, and of replays of a graph that holds one."""
    many = prepare(Work(forward), device)
    kernel = spread([1e3 * milliseconds(many.run) / many.launches for _ in range(15)], "us")
    graph, kept = capture(lambda: forward(0))

    def replays() -> None:
        for _ in range(QUEUED):
            graph.replay()

    samples = []
    for _ in range(15):
        torch.cuda._sleep(SLEEP_CYCLES)
        samples.append(1e3 * milliseconds(replays) / QUEUED)
    del kept
    one = spread(samples, "us")
    over = one["us"] - kernel["us"]
    one |= {"over_kernel_us": over, "target": {"metric": "over_kernel_us", "value": REPLAY_US}}
    one["met"] = over <= REPLAY_US
    return {"kernel": {**kernel, "method": many.method}, "replay": one, "profiler_us": _profiled(forward)}


def _profiled(forward: Callable[[int], Any]) -> float | None:
    """Microseconds of one call's kernels by the profiler, without gaps between launches, or None."""
    from torch.profiler import ProfilerActivity, profile

    count = 20
    try:
        with profile(activities=[ProfilerActivity.CUDA]) as seen:
            for _ in range(count):
                forward(0)
            torch.cuda.synchronize()
        spent = [event.self_device_time_total for event in seen.key_averages()]
    except (RuntimeError, AssertionError, AttributeError):
        return None  # a help to understand the others; not worth losing them
    return sum(spent) / count or None


def memory(device: torch.device, backend: str | None) -> list[tuple[str, Callable[[], list[Row]]]]:
    """Labels and functions: the most memory of a training step."""
    cases = [shrunk(case) for case in TRAINED] if device.type == "cpu" else TRAINED
    return [(case.name, lambda case=case: [_trained(case, device, backend)]) for case in cases]


def _trained(case: Case, device: torch.device, backend: str | None) -> Row:
    """Peak of forward and backward, beside what the caller holds: inputs, y, dy and every gradient."""
    operands = make_inputs(case, device)[0]
    row = case.describe() | {"input_sets": 1}
    leaves = [None if tensor is None else tensor.detach().requires_grad_() for tensor in operands[:4]]
    wanted = [leaf for leaf in leaves if leaf is not None]

    def step() -> tuple[torch.Tensor, ...]:
        x, taps, lam, gate = leaves
        if case.scan:
            direction = case.directions[0]
            y = gspn2.line_scan(x, lam[:, 0], taps[:, 0], direction=direction, backend=backend)
        else:
            y = gspn2.propagate(x, taps, lam, gate, directions=case.directions, backend=backend)
        return (y.detach(), *torch.autograd.grad(y, wanted, operands.dy))

    held = step()
    if not all(tensor.isfinite().all() for tensor in held):
        return {**row, "error": "a result is not finite"}
    del held
    base = _allocated(device, reset=True)
    held = step()
    extra = _allocated(device) - base
    inputs = sum(tensor.nbytes for tensor in operands if tensor is not None)
    outputs = sum(tensor.nbytes for tensor in held)
    gradients = outputs - held[0].nbytes
    total = (inputs + extra) / (inputs + outputs)
    row |= {
        "inputs_bytes": inputs,
        "outputs_bytes": outputs,
        "extra_bytes": extra,
        "scratch_bytes": extra - outputs,
        "extra_over_inputs_and_gradients": extra / (inputs + gradients),
        "peak_over_tensors": total,
    }
    if device.type == "cuda":
        row |= {"target": {"metric": "peak_over_tensors", "value": MEMORY}, "met": total <= MEMORY}
    return row


def _allocated(device: torch.device, reset: bool = False) -> int:
    """The most bytes allocated since the last reset; 0 where nobody counts."""
    if device.type == "cpu":
        return 0
    torch.cuda.synchronize()
    if reset:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    return torch.cuda.max_memory_allocated()
