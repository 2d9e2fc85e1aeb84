"""`gspn2 bench`: which case comes next, what there is time for, and what compiles side by side before."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from bench_helpers import content_with
from gspn2.bench import ahead, case, results, schedule
from gspn2.bench.case import Case
from gspn2.cli import bench as command_module
from gspn2.cli.main import main


def planned(bench: str, *seconds: float, **turn: Any) -> list[Case]:
    return [
        Case(bench, f"{next(iter(turn), '')} {i}", {}, lambda device: [], seconds=it, **turn)
        for i, it in enumerate(seconds)
    ]


def test_no_part_is_forgotten_for_another() -> None:
    """First cases of all parts come first; then whoever has had the least time."""
    cases = [*planned("a", 10, 10, 10), *planned("a", 1, first=True), *planned("a", 1, extra=True)]
    cases += [*planned("b", 4, 4, 4), *planned("b", 2, first=True)]
    found = [f"{it.bench}{it.name}" for it in schedule.ordered(cases)]
    assert found == ["afirst 0", "bfirst 0", "a 0", "b 0", "b 1", "b 2", "a 1", "a 2", "aextra 0"]
    assert schedule.ordered([]) == []


def test_what_cannot_end_in_time_is_not_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the pace of this machine, which its own cases tell and those of the host do not."""
    now = 100.0
    monkeypatch.setattr(schedule.time, "monotonic", lambda: now)
    clock = schedule.Clock(1.0, 90.0)
    (short, long) = planned("a", 30, 51)
    assert clock.has_room(short)
    assert not clock.has_room(long)
    (host,) = planned("cpu", 1, host=True)
    clock.took(host, 50.0)
    assert clock.has_room(short)
    clock.took(short, 54.0)
    assert clock.pace == pytest.approx(1.8)
    assert not clock.has_room(short)
    clock.took(short, 900.0)
    assert clock.pace == schedule.MOST_PACE
    assert schedule.Clock(None, 0.0).has_room(long)


def test_all_fits_on_an_h200() -> None:
    """What a run always measures, with as long as models may be compiled; and every part has a first case."""
    cases = [it for part in case.parts().values() for it in part.cases(torch.device("cuda"))]
    minutes = command_module.MINUTES["cuda"]
    starting = 40
    always = sum(it.seconds for it in cases if not it.extra)
    assert always + starting + 60 * minutes * command_module.COMPILING <= 60 * minutes
    for device in ("cuda", "cpu"):
        ways = [it for part in case.parts().values() for it in part.cases(torch.device(device))]
        assert {it.bench for it in ways if it.first} == set(case.parts())


def test_what_was_left_out_is_told_with_the_way_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["bench", "ladder", "--device", "cpu", "--out", str(tmp_path), "--no-report", "--minutes", "0"]
    assert main(command) == 0
    told = capsys.readouterr().out
    assert "ladder: 2x8x128x128 fp32: not measured, 0 minutes are not enough" in told
    assert "1 case was left out because time was up; gspn2 " in told
    assert f"--resume --out {tmp_path} goes on" in told
    content = results.load(tmp_path / "results.json")
    assert content["run"]["left_out"] == ["ladder: 2x8x128x128 fp32"]


def test_results_of_the_run_before_are_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """If it came to its end and measured anything; what is damaged or was stopped is not worth it."""
    command = ["bench", "ladder", "--device", "cpu", "--out", str(tmp_path), "--no-report", "--minutes", "0"]
    path, before = tmp_path / "results.json", tmp_path / "results.before.json"
    path.write_text("{")
    assert main(command) == 0
    assert main(command) == 0
    assert not before.exists()
    path.write_text(json.dumps(content_with(1.0) | {"run": {"complete": True}}))
    assert main(command) == 0
    assert f"are kept in {before}" in capsys.readouterr().out
    assert results.load(before)["cases"]
    assert not results.load(path)["cases"]
    path.write_text('{"models": []}')
    capsys.readouterr()
    assert main(command) == 2
    assert path.read_text() == '{"models": []}', "another command's: gspn2 demo calls its file so, too"
    assert f"--out: expected a folder for results of gspn2 bench: {path}: " in capsys.readouterr().err


def test_processes_side_by_side_are_counted_and_ended_in_time() -> None:
    assert ahead.side_by_side(sys.exit, [0, 1, 0], 3, None) == 2
    assert ahead.side_by_side(sys.exit, [], 2, 0.0) == 0
    assert ahead.side_by_side(time.sleep, [600, 600], 1, 0.1) == 0
