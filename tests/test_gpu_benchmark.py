"""`benchmarks/gpu.py` on the CPU: what is wrong gets no speed, what kills the process stops nothing else."""

from __future__ import annotations

import json
import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import gspn2

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "benchmarks" / "gpu.py"
MODULES = (
    "common",
    "gpu",
    "gpu_calls",
    "gpu_cases",
    "gpu_report",
    "gpu_tables",
    "gpu_timing",
    "markdown_table",
    "planner",
)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The script as a module."""
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    import gpu

    yield gpu
    for name in MODULES:
        sys.modules.pop(name, None)


def bench(gpu: ModuleType) -> Any:
    return gpu.Bench(Namespace(device="cpu", rounds=2, variants=None))


def small(gpu: ModuleType, **changes: Any) -> Any:
    settings = dict(
        taps="shared", directions=("down", "left"), layout="planes", passes=("forward", "backward")
    )
    return gpu.Case((2, 4, 6, 5), torch.bfloat16, **(settings | changes))


@pytest.mark.parametrize("layout", ["planes", "channels innermost"])
@pytest.mark.parametrize("taps", ["shared", "per-channel"])
def test_a_right_result_is_timed(gpu: ModuleType, layout: str, taps: str) -> None:
    (row,) = bench(gpu).measure(small(gpu, layout=layout, taps=taps, scaled=True))
    assert "error" not in row
    # bfloat16: x, y 2; lam, gate 2 x 2; taps 2 directions x 3; of 2 x 30 pixels.
    groups = 1 if taps == "shared" else 4
    assert row["forward"]["bytes"] == 2 * 60 * ((1 + 1 + 4) * 4 + 6 * groups)
    assert row["backward"]["bytes"] == 2 * 60 * ((1 + 1 + 4 + 1 + 4) * 4 + 12 * groups)
    for which in ("forward", "backward"):
        it = row[which]
        assert 0 < it["share"] == pytest.approx(it["copy_us"] / it["us"])
    assert set(row["relative_error"]) == {"y", "dx", "dtaps", "dlam", "dgate"}


def scaled(y: torch.Tensor) -> torch.Tensor:
    return y * 1.01


def unwritten(y: torch.Tensor) -> torch.Tensor:
    return torch.where(torch.arange(y.shape[3]) == 2, torch.full_like(y, torch.nan), y)


def uncertain(y: torch.Tensor, calls: Iterator[int] = count()) -> torch.Tensor:  # noqa: B008
    return y + next(calls) % 8 * 1e-3


@pytest.mark.parametrize(
    ("spoil", "message"),
    [(scaled, "y: relative error"), (unwritten, "not finite"), (uncertain, "two runs differ")],
)
def test_a_wrong_result_has_no_speed(
    gpu: ModuleType, monkeypatch: pytest.MonkeyPatch, spoil: Callable[..., Any], message: str
) -> None:
    right = gspn2.propagate
    monkeypatch.setattr(gspn2, "propagate", lambda *args, **kwargs: spoil(right(*args, **kwargs)))
    (row,) = bench(gpu).measure(small(gpu))
    assert message in row["error"]
    assert not {"forward", "backward"} & row.keys()


def test_a_wrong_gradient_has_no_speed(gpu: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = gpu.operator_calls

    def spoiled(*args: Any) -> dict[str, Callable[[int], Any]]:
        both = calls(*args)
        return both | {"backward": lambda i: tuple(1.01 * gradient for gradient in both["backward"](i))}

    monkeypatch.setattr(gpu, "operator_calls", spoiled)
    (row,) = bench(gpu).measure(small(gpu))
    assert "dx: relative error" in row["error"]


def test_a_case_that_ended_the_process_is_noted_and_skipped(tmp_path: Path) -> None:
    command = [
        sys.executable,
        str(SCRIPT),
        "models",
        "--device",
        "cpu",
        "--rounds",
        "1",
        "--out",
        str(tmp_path),
    ]
    subprocess.run(command, check=True, capture_output=True, timeout=200)
    path = tmp_path / "models.json"
    result = json.loads(path.read_text())
    first, *others = result["cases"]
    path.write_text(json.dumps({**result, "cases": [{"name": first["name"], "began": True}, *others[1:]]}))
    done = subprocess.run([*command, "--resume"], check=False, capture_output=True, text=True, timeout=200)
    assert done.returncode == 1
    again = {row["name"]: row for row in json.loads(path.read_text())["cases"]}
    assert again[first["name"]]["error"] == "hung, or ended the process"
    assert "forward" in again[others[0]["name"]]
    assert f"NO SPEED {first['name']}" in done.stdout
