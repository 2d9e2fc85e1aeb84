"""What the tests of the bench share: contenders that take no time, their cases, contents of result files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from gspn2.bench import rates as rates_module
from gspn2.bench import results, runner
from gspn2.bench.case import Absent, Case, Contender, Pass
from gspn2.bench.contenders import gspn1, operator
from gspn2.bench.measure import Work
from gspn2.bench.operator import Scan

ROOT = Path(__file__).resolve().parent.parent
HOST = torch.device("cpu")
SCAN = Scan((1, 2, 9, 8), torch.float32, "per-channel", ("right",), scan=True, passes=("forward", "backward"))


def make_machine_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy and a product that take no time."""
    monkeypatch.setattr(rates_module, "PRODUCTS", {"cpu": (("matrix product", 16), ("convolution", 16))})
    monkeypatch.setattr(rates_module, "copy", lambda device: Work(lambda _: torch.ones(64).clone()))
    monkeypatch.setattr(rates_module, "COPY_BYTES", 2**16)


def settings(**changes: Any) -> runner.Settings:
    return runner.Settings(HOST, **{"rounds": 3, "seconds": 0.0, **changes})


def rates() -> dict[str, Any]:
    return {"copy_gb_per_s": 1.0, "fastest_gb_per_s": 1.0, "matrix_tflop_per_s": 1.0}


def scan_case(**changes: Any) -> Case:
    contenders = [gspn1(SCAN, HOST), operator("gspn2", SCAN, HOST)]
    fields = {"bench": "ladder", "name": "small", "facts": {"size": list(SCAN.size)}, **changes}
    return Case(**fields, contenders=lambda device: contenders)


def fine(milliseconds: float = 0.0) -> dict[str, Pass]:
    return {"forward": Pass(Work(lambda _: None), dict, 1000, 2000)}


def fake(*contenders: Contender, name: str = "fake", **changes: Any) -> Case:
    return Case("ladder", name, {"size": [1, 1, 1, 1]}, lambda device: list(contenders), **changes)


def absent() -> dict[str, Pass]:
    raise Absent("something is not installed")


def run_cases(cases: list[Case], path: Path, resume: bool = False, **changes: Any) -> dict[str, Any]:
    found = results.Results(path, {"commit": "abc"}, {"command": "gspn2 bench", "device": "cpu"})
    if resume:
        assert bool(found.resume()) == any(row["commit"] == "older" for row in results.load(path)["cases"])
    runner.run(cases, settings(**changes), found, runner.Watcher(), began=changes.get("began", 0.0))
    return results.load(path)


def counted(name: str, counts: dict[str, int], **changes: Any) -> Case:
    def make() -> dict[str, Pass]:
        counts[name] = counts.get(name, 0) + 1
        return fine()

    return fake(Contender("it", make), name=name, **changes)


def content_with(ms: float, spread: float = 0.01, **row: Any) -> dict[str, Any]:
    it = {"name": "gspn2", "pass": "forward", "ms": ms, "quartiles": [ms * (1 - spread), ms * (1 + spread)]}
    rows = [{"bench": "ladder", "case": "x", "facts": {}, "contenders": [it], **row}]
    return {"schema": 1, "machine": {"processor": "p"}, "run": {}, "rates": {}, "cases": rows}


def documents() -> Iterator[dict[str, Any]]:
    for path in sorted((ROOT / "benchmarks" / "results").glob("*/bench.json")):
        yield results.load(path)
