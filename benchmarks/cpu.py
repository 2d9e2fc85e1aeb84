"""The CPU operator against an eager loop and a copy; memory, import time and the backbone beside ConvNeXt.

    python benchmarks/cpu.py            all parts, about four minutes on two cores
    python benchmarks/cpu.py operator   one part: operator, memory, start, models

Ratios are of medians within one run; nothing is timed before its result was found right. Results go to
benchmarks/results/cpu/.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import eager
import gspn2
from common import interleaved, rotating_copy, save
from gspn2.backends import DIRECTIONS, Problem, reference

# glibc returns freed memory to the system and faults every page in again; which contender pays for that
# depends on what ran before. So operators are timed with an allocator that keeps it (up to 32 MiB a block,
# the most that glibc allows).
KEEP_FREED_MEMORY = {"MALLOC_TRIM_THRESHOLD_": str(2**32), "MALLOC_MMAP_THRESHOLD_": str(2**25)}
SIZES = [(1, 8, 512, 512), (32, 8, 56, 56), (8, 64, 64, 64)]
Operands = tuple[Tensor, Tensor, Tensor | None, Tensor | None]


def operands(size: tuple[int, int, int, int], scaled: bool) -> Operands:
    """x, logits and, if `scaled`, lam and gate; float32, four directions, shared taps."""
    batch, channels, height, width = size
    x = torch.randn(size)
    logits = torch.randn(batch, 4, 1, 3, height, width)
    if not scaled:
        return x, logits, None, None
    return x, logits, *(torch.randn(batch, 4, channels, height, width) for _ in range(2))


def bytes_of(inputs: Operands) -> int:
    """Every input read once, y written once."""
    return 4 * sum(tensor.numel() for tensor in (*inputs, inputs[0]) if tensor is not None)


def train_step(function: Callable[..., Tensor], inputs: Operands, dy: Tensor) -> Callable[[], list[Tensor]]:
    """Forward and backward of one function; returns a callable that gives all gradients."""
    leaves = [None if tensor is None else tensor.detach().requires_grad_() for tensor in inputs]

    def step() -> list[Tensor]:
        wanted = [leaf for leaf in leaves if leaf is not None]
        return list(torch.autograd.grad(function(*leaves), wanted, dy))

    return step


def refuse_if_wrong(inputs: Operands, dy: Tensor) -> None:
    """Both contenders against the reference in float64, outputs and gradients."""
    exact: Operands = tuple(None if tensor is None else tensor.double() for tensor in inputs)  # type: ignore
    truth = [gspn2.propagate(*exact, backend="reference")]
    truth += train_step(lambda *args: gspn2.propagate(*args, backend="reference"), exact, dy.double())()
    for name, function in (("gspn2", gspn2.propagate), ("eager", eager.propagate)):
        found = [function(*inputs), *train_step(function, inputs, dy)()]
        for got, expected in zip(found, truth, strict=True):
            error = float((got - expected).norm() / expected.norm())
            if not error < 1e-5:
                raise SystemExit(f"{name} is wrong: relative error {error:.2e}; nothing was timed")


def loop(x: Tensor, logits: Tensor, lam: Tensor | None, gate: Tensor | None) -> Tensor:
    """The plain loop over lines, one direction after the other: the reference, differentiable by autograd."""
    return reference.propagate(x, logits, lam, gate, Problem.of(x, logits, DIRECTIONS, None, True))


def operator() -> None:
    cases = []
    for size in SIZES:
        for scaled in (False, True):
            inputs = operands(size, scaled)
            dy = torch.randn(size)
            if size[2] <= 64:
                refuse_if_wrong(inputs, dy)
            else:  # the float64 loop under autograd would take minutes: the same code, fewer lines
                refuse_if_wrong(operands((1, 8, 96, 160), scaled), torch.randn(1, 8, 96, 160))
            with torch.no_grad():
                forward = interleaved(
                    {
                        "gspn2": lambda inputs=inputs: gspn2.propagate(*inputs),
                        "copy": rotating_copy(bytes_of(inputs)),
                        "eager": lambda inputs=inputs: eager.propagate(*inputs),
                        "loop": lambda inputs=inputs: loop(*inputs),
                    },
                    seconds=5,
                )
            train = interleaved(
                {
                    "gspn2": train_step(gspn2.propagate, inputs, dy),
                    "eager": train_step(eager.propagate, inputs, dy),
                    "loop": train_step(loop, inputs, dy),
                },
                seconds=5,
                least=4,
            )
            case = {
                "size": size,
                "lam_and_gate": scaled,
                "megabytes": bytes_of(inputs) / 1e6,
                "forward": forward,
                "forward_and_backward": train,
                "forward_over_eager": forward["eager"]["median_ms"] / forward["gspn2"]["median_ms"],
                "forward_over_loop": forward["loop"]["median_ms"] / forward["gspn2"]["median_ms"],
                "train_over_loop": train["loop"]["median_ms"] / train["gspn2"]["median_ms"],
                "forward_in_copies": forward["gspn2"]["median_ms"] / forward["copy"]["median_ms"],
                "train_over_eager": train["eager"]["median_ms"] / train["gspn2"]["median_ms"],
            }
            cases.append(case)
            print(
                f"{size!s:>18} lam, gate {'yes' if scaled else 'no ':3} "
                f"forward {forward['gspn2']['median_ms']:7.2f} ms = eager / {case['forward_over_eager']:.1f}"
                f" = loop / {case['forward_over_loop']:.1f}"
                f" = {case['forward_in_copies']:.2f} copies;"
                f" with backward {train['gspn2']['median_ms']:7.2f} ms"
                f" = eager / {case['train_over_eager']:.1f} = loop / {case['train_over_loop']:.1f}",
                flush=True,
            )
    allocator = {name: os.environ[name] for name in KEEP_FREED_MEMORY if name in os.environ}
    save(
        "cpu/operator",
        {"allocator": allocator, "dtype": "float32", "directions": 4, "taps": "shared", "cases": cases},
    )


def resident(field: str) -> int:
    """Bytes: VmRSS now, or VmHWM, the most since it was last reset."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise SystemExit(f"no {field} on this system")


def memory() -> None:
    """Most memory a training step holds beyond its inputs, outputs and gradients, at the first size."""
    cases = []
    for scaled in (False, True):
        inputs = operands(SIZES[0], scaled)
        dy = torch.randn(SIZES[0])
        # compiled and warm: what is left is the operator's own
        train_step(gspn2.propagate, operands((2, 8, 32, 32), scaled), torch.randn(2, 8, 32, 32))()
        step = train_step(gspn2.propagate, inputs, dy)
        before = resident("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")
        gradients = step()
        peak = resident("VmHWM") - before
        inputs_and_gradients = sum(t.nbytes for t in (*inputs, *gradients) if t is not None)
        outputs = sum(t.nbytes for t in gradients) + inputs[0].nbytes
        extra = peak - outputs
        case = {
            "size": SIZES[0],
            "lam_and_gate": scaled,
            "inputs_and_gradients_bytes": inputs_and_gradients,
            "peak_extra_bytes": extra,
            "extra_over_inputs_and_gradients": extra / inputs_and_gradients,
        }
        cases.append(case)
        print(f"training, lam and gate {scaled}: extra memory {extra / 1e6:.1f} MB = "
              f"{case['extra_over_inputs_and_gradients']:.2f} of inputs and gradients")  # fmt: skip
    save("cpu/memory", {"cases": cases})


_IMPORT = "import time, torch; t = time.perf_counter(); import gspn2; print(time.perf_counter() - t)"
_FIRST_CALL = """
import time, torch, gspn2
x, logits = torch.randn(1, 2, 8, 8, requires_grad=True), torch.randn(1, 4, 1, 3, 8, 8, requires_grad=True)
t = time.perf_counter(); y = gspn2.propagate(x, logits); forward = time.perf_counter() - t
t = time.perf_counter(); y.sum().backward(); print(forward, time.perf_counter() - t)
"""


def _python(code: str, cache: str) -> list[float]:
    environment = {**os.environ, "NUMBA_CACHE_DIR": cache}
    found = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    return [float(word) for word in found.stdout.split()]


def start() -> None:
    """Seconds: importing gspn2 after torch, and the first call with a cold and with a warm disk cache."""
    with tempfile.TemporaryDirectory() as cache:
        imports = sorted(_python(_IMPORT, cache)[0] for _ in range(5))
        cold, warm = _python(_FIRST_CALL, cache), _python(_FIRST_CALL, cache)
    print(f"import gspn2 {imports[2]:.3f} s over torch; first forward, backward: "
          f"cold {cold[0]:.1f}, {cold[1]:.1f} s, warm {warm[0]:.2f}, {warm[1]:.2f} s")  # fmt: skip
    save(
        "cpu/start",
        {
            "import_seconds_over_torch": imports[2],
            "first_forward_seconds": {"cold": cold[0], "warm": warm[0]},
            "first_backward_seconds": {"cold": cold[1], "warm": warm[1]},
        },
    )


def models() -> None:
    """gspn2_tiny beside convnext_tiny, and the share of its mixers at 1024."""
    import timm

    import gspn2.models  # noqa: F401  (registers them with timm)
    from gspn2.nn import Mixer

    results: dict[str, Any] = {"at_224": []}
    ours, theirs = (timm.create_model(name).eval() for name in ("gspn2_tiny", "convnext_tiny"))
    with torch.inference_mode():
        for batch in (1, 8):
            x = torch.randn(batch, 3, 224, 224)
            times = interleaved(
                {"gspn2_tiny": lambda x=x: ours(x), "convnext_tiny": lambda x=x: theirs(x)}, seconds=10
            )
            ratio = times["gspn2_tiny"]["median_ms"] / times["convnext_tiny"]["median_ms"]
            results["at_224"].append({"batch": batch, **times, "over_convnext": ratio})
            print(
                f"224, batch {batch}: gspn2_tiny {times['gspn2_tiny']['median_ms']:.0f} ms, "
                f"convnext_tiny {times['convnext_tiny']['median_ms']:.0f} ms, ratio {ratio:.2f}"
            )
        spent = 0.0
        began = 0.0

        def enter(*_: object) -> None:
            nonlocal began
            began = time.perf_counter()

        def leave(*_: object) -> None:
            nonlocal spent
            spent += time.perf_counter() - began

        for module in ours.modules():
            if isinstance(module, Mixer):
                module.register_forward_pre_hook(enter)
                module.register_forward_hook(leave)
        x = torch.randn(1, 3, 1024, 1024)
        ours(x)
        spent, whole = 0.0, time.perf_counter()
        for _ in range(3):
            ours(x)
        whole = time.perf_counter() - whole
    results["at_1024"] = {"batch": 1, "model_seconds": whole / 3, "mixer_share": spent / whole}
    print(f"1024, batch 1: {whole / 3:.2f} s, mixers {100 * spent / whole:.1f} %")
    save("cpu/models", results)


PARTS = {"operator": operator, "memory": memory, "start": start, "models": models}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "parts", nargs="*", choices=[[], *PARTS], default=[], metavar="PART", help="default: all"
    )
    parts = parser.parse_args().parts or list(PARTS)
    if len(parts) == 1:
        PARTS[parts[0]]()
        return
    for name in parts:  # each in a process of its own: what one leaves in memory would disturb the next
        environment = {**os.environ, **KEEP_FREED_MEMORY} if name == "operator" else None
        subprocess.run([sys.executable, __file__, name], env=environment, check=True)


if __name__ == "__main__":
    main()
