"""`gspn2 bench` measures: nothing wrong gets a speed, runs go on where they were stopped, floors hold."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bench_helpers import (
    HOST,
    absent,
    counted,
    fake,
    fine,
    make_machine_small,
    rates,
    run_cases,
    scan_case,
    settings,
)
from gspn2.backends import BACKENDS, reference
from gspn2.backends import cpu as cpu_backend
from gspn2.bench import ahead, case, document, report, results, runner, terminal
from gspn2.bench import rates as rates_module
from gspn2.bench.case import Case, Contender, Pass
from gspn2.bench.check import Wrong
from gspn2.bench.measure import Work, in_turn
from gspn2.cli import bench as command_module
from gspn2.cli.main import main


@pytest.fixture(autouse=True)
def small_machine(threads: None, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    make_machine_small(monkeypatch)


def test_right_results_are_timed_and_judged() -> None:
    row = runner.Runner(settings()).run(scan_case(), rates())
    assert [(it["name"], it["pass"]) for it in row["contenders"]] == [
        ("baseline (loop in PyTorch)", "forward"),
        ("baseline (loop in PyTorch)", "backward"),
        ("gspn2", "forward"),
        ("gspn2", "backward"),
    ]
    for it in row["contenders"]:
        assert it["ms"] > 0
        assert set(it["error_of"]) == ({"y"} if it["pass"] == "forward" else {"dx", "dtaps", "dlam"})
        elements = 2 * 9 * 8 * (6 if it["pass"] == "forward" else 11)
        assert it["bytes"] == 4 * elements
        assert it["gb_per_s"] == pytest.approx(it["bytes"] / it["ms"] / 1e6)
        assert it["floor_ms"] >= it["flops"] / 1e9


def spoiled(x: torch.Tensor, *args: Any) -> torch.Tensor:
    return reference.propagate(x, *args) * 1.01


def unwritten(x: torch.Tensor, *args: Any) -> torch.Tensor:
    y = reference.propagate(x, *args)
    y[..., -1] = torch.nan
    return y


def unsure(x: torch.Tensor, *args: Any) -> torch.Tensor:
    return reference.propagate(x, *args) + 1e-6 * torch.rand(())


@pytest.mark.parametrize("broken", [spoiled, unwritten, unsure])
def test_a_broken_backend_gets_no_speed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str], broken: Any
) -> None:
    """Also not on the terminal, in the report and in the document, and the exit code says so."""
    backend = SimpleNamespace(
        why_not=cpu_backend.why_not, propagate=broken, propagate_backward=reference.propagate_backward
    )
    monkeypatch.setitem(BACKENDS, "cpu", backend)
    part = case.Part("ladder", "Ladder", "About.", lambda device: iter([scan_case()]))
    monkeypatch.setattr(case, "parts", lambda: {"ladder": part})
    monkeypatch.setattr(report, "parts", lambda: {"ladder": part})
    monkeypatch.setattr(document, "parts", lambda: {"ladder": part})
    command = ["bench", "ladder", "--device", "cpu", "--out", str(tmp_path), "--rounds", "3"]
    assert main(command) == 1
    out = capsys.readouterr().out
    content = results.load(tmp_path / "results.json")
    (row,) = content["cases"]
    spoiled_pass = next(it for it in row["contenders"] if (it["name"], it["pass"]) == ("gspn2", "forward"))
    assert "ms" not in spoiled_pass
    assert "wrong" in spoiled_pass
    assert "gspn2 forward: WRONG, no speed" in out
    assert not re.search(r"gspn2 +forward +[\d.]+ ", out)
    assert "baseline (loop in PyTorch)" in out
    page = (tmp_path / "report.html").read_text()
    assert "<td>gspn2</td><td>forward</td>" not in page
    assert "<td>gspn2</td><td>backward</td>" in page
    assert "Not right" in page
    assert "| gspn2 | " not in document.text([content])
    assert "### Without a result" in document.text([content])
    assert main([*command, "--resume", "--no-report"]) == 1, "what is not measured again is still wrong"
    out = capsys.readouterr().out
    assert "measured before" in out
    assert "WRONG  ladder: small: gspn2 forward: " in out


def wrong() -> dict[str, Pass]:
    def check() -> dict[str, float]:
        raise Wrong("y: relative error 0.5")

    return {"forward": Pass(Work(lambda _: None), check, 1000, 2000)}


def explode() -> dict[str, Pass]:
    raise RuntimeError("no memory\nand more")


def fails_late() -> dict[str, Pass]:
    calls = iter(range(3))

    def call(_: int) -> None:
        if next(calls, 9) >= 0:
            raise RuntimeError("not again")

    return {"forward": Pass(Work(call), dict, 1, 1)}


def test_one_contender_does_not_stop_the_others() -> None:
    contenders = [Contender(it.__name__, it) for it in (wrong, absent, explode, fails_late, fine)]
    row = runner.Runner(settings()).run(fake(*contenders), rates())
    by_name = {it["name"]: it for it in row["contenders"]}
    assert by_name["wrong"]["wrong"] == "y: relative error 0.5"
    assert by_name["absent"]["absent"] == "something is not installed"
    assert by_name["explode"]["wrong"] == "RuntimeError: no memory"
    assert by_name["fails_late"]["wrong"] == "RuntimeError: not again"
    assert by_name["fine"]["ms"] >= 0
    assert [name for name, it in by_name.items() if "ms" in it] == ["fine"]
    shown = "\n".join(terminal.table(row))
    assert "absent: something is not installed" in shown
    assert "wrong forward: WRONG, no speed: y: relative error 0.5" in shown


def fails(device: torch.device) -> list[Contender]:
    raise ValueError("cannot be made")


def test_a_failing_case_is_told_and_the_next_one_runs(tmp_path: Path) -> None:
    bad = Case("ladder", "bad", {}, fails)
    content = run_cases([bad, fake(Contender("fine", fine))], tmp_path / "r.json", minutes=None)
    first, second = content["cases"]
    assert first["failed"] == "ValueError: cannot be made"
    assert results.timed(second)
    assert content["run"]["complete"]
    assert results.broken(first) == ["ValueError: cannot be made"]


def test_a_run_resumes_where_it_was_stopped(tmp_path: Path) -> None:
    counts: dict[str, int] = {}
    path = tmp_path / "r.json"
    run_cases([counted("a", counts)], path)
    content = json.loads(path.read_text())
    began = {"bench": "ladder", "facts": {}, "commit": "abc"}
    content["cases"].append({**began, "case": "b", "began": 2})
    content["cases"].append({**began, "case": "c", "began": 1})
    content["cases"].append({**began, "case": "d", "commit": "older", "contenders": []})
    path.write_text(json.dumps(content))
    content = run_cases([counted(name, counts) for name in "abcd"], path, resume=True)
    assert counts == {"a": 1, "c": 1, "d": 1}
    assert [row["case"] for row in content["cases"]] == ["a", "b", "c", "d"]
    by_name = {row["case"]: row for row in content["cases"]}
    assert by_name["b"]["failed"] == "hung, or ended the process"
    assert {name for name, row in by_name.items() if results.timed(row)} == {"a", "c", "d"}


def test_times_of_another_machine_are_not_gone_on_with(tmp_path: Path) -> None:
    path, counts = tmp_path / "r.json", dict[str, int]()
    run_cases([counted("a", counts)], path)
    there = {"commit": "abc", "device": "a GPU", "driver": "unknown"}
    found = results.Results(path, there, {"command": "gspn2 bench", "device": "cuda"})
    assert found.resume() == "1 case measured elsewhere (device None and a GPU): not kept"
    assert not found.rows
    same = results.Results(path, {"commit": "abc", "driver": "unknown"}, {})
    assert same.resume() == ""
    assert [row["case"] for row in same.rows] == ["a"]


def test_time_is_counted_once_when_a_process_dies_on_the_way(tmp_path: Path) -> None:
    path, counts = tmp_path / "r.json", dict[str, int]()
    before = run_cases([counted("a", counts)], path)["run"]["seconds"]

    def process() -> results.Results:
        """One of the same run: it began at 5.0, whatever process goes on with it."""
        found = results.Results(path, {"commit": "abc"}, {"command": "gspn2 bench", "began": 5.0})
        found.resume()
        return found

    first = process()
    first.begin("ladder", "b", {})
    first.end({"contenders": [], "seconds": 30.0})
    first.begin("ladder", "c", {})  # and dies
    results.give_up(path)
    last = process()
    last.finish([], seconds=50.0, left_out=[])
    run = results.load(path)["run"]
    assert run["seconds"] == pytest.approx(before + 50.0)
    assert not {"began", "before"} & run.keys()


def interrupted() -> dict[str, Pass]:
    raise KeyboardInterrupt


def test_a_case_that_was_interrupted_is_measured_again(tmp_path: Path) -> None:
    path, counts = tmp_path / "r.json", dict[str, int]()
    with pytest.raises(KeyboardInterrupt):
        run_cases([counted("a", counts), fake(Contender("it", interrupted), name="b")], path)
    assert [row["case"] for row in results.load(path)["cases"]] == ["a"]
    content = run_cases([counted("a", counts), counted("b", counts)], path, resume=True)
    assert counts == {"a": 1, "b": 1}
    assert [row["case"] for row in content["cases"] if results.timed(row)] == ["a", "b"]


def test_what_is_extra_comes_last_and_is_left_out_when_time_is_up(tmp_path: Path) -> None:
    counts: dict[str, int] = {}
    cases = [counted("later", counts, extra=True), counted("first", counts)]
    content = run_cases(cases, tmp_path / "r.json")
    assert list(counts) == ["first", "later"]
    assert [row["case"] for row in content["cases"]] == ["later", "first"], "listed as they were given"
    content = run_cases([counted("late", counts)], tmp_path / "s.json", minutes=0.1)
    assert content["run"]["left_out"] == ["ladder: late"]
    assert not content["cases"]


def test_a_lost_process_is_started_anew(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The case that ended it is told, those after it are run, and no progress is the end."""
    path, counts, commands = tmp_path / "results.json", dict[str, int](), list[list[str]]()

    def process(command: list[str], check: bool) -> SimpleNamespace:
        commands.append(command)
        if len(commands) == 1:
            found = results.Results(path, {"commit": "abc"}, {"command": "", "device": "cpu"})
            found.begin("ladder", "a", {"size": [1, 1, 1, 1]})
            assert "Interrupted." in report._case(results.load(path)["cases"][0])
            return SimpleNamespace(returncode=-11)
        content = run_cases([counted(name, counts) for name in "ab"], path, resume=True)
        return SimpleNamespace(returncode=int(any(results.broken(row) for row in content["cases"])))

    monkeypatch.setattr(ahead, "compile_all", lambda cases, index: (3, 0))
    limits: list[float | None] = []

    def compile_models(cases: list[Case], seconds: float | None) -> tuple[int, int]:
        limits.append(seconds)
        return 2, 1

    monkeypatch.setattr(ahead, "compile_models", compile_models)
    monkeypatch.setattr(command_module.subprocess, "run", process)
    assert command_module._supervise([], path, 0.0, 10.0) == 1
    assert limits == [180.0]
    assert ["--resume" in command for command in commands] == [False, True]
    rows = results.load(path)["cases"]
    assert [(row["case"], "failed" in row) for row in rows] == [("a", True), ("b", False)]
    assert counts == {"b": 1}
    stuck = lambda command, check: SimpleNamespace(returncode=-9)  # noqa: E731
    path.unlink()
    monkeypatch.setattr(command_module.subprocess, "run", stuck)
    assert command_module._supervise([], path, 0.0, None) == 1
    assert limits[1:] == [None]


def dies() -> dict[str, Pass]:
    """Its result is right; in the second round of its times the process ends."""
    calls = iter(range(3))

    def call(_: int) -> None:
        if next(calls, 9) >= 2:
            raise SystemExit

    return {"backward": Pass(Work(call), dict, 1, 1)}


def dies_at_once() -> dict[str, Pass]:
    raise SystemExit


@pytest.mark.parametrize(
    ("contender", "doing"), [(dies, "timing dies, backward"), (dies_at_once, "making dies_at_once")]
)
def test_who_ended_the_process_is_told(tmp_path: Path, contender: Any, doing: str) -> None:
    path = tmp_path / "results.json"
    with pytest.raises(SystemExit):
        run_cases([fake(Contender("fine", fine), Contender(contender.__name__, contender))], path)
    told = f"hung, or ended the process, {doing}"
    assert results.give_up(path) == [f"ladder: fake: {told}"]
    assert results.give_up(path) == []
    (row,) = run_cases([fake(Contender("fine", fine))], path, resume=True)["cases"]
    assert results.broken(row) == [told]
    assert [it.name for it in tmp_path.iterdir()] == ["results.json"], "nothing is left beside them"


def test_who_lost_the_device_is_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def lose(*_: Any) -> Any:
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nand advice")

    def leave(code: int) -> None:
        raise SystemExit(code)

    def passes() -> dict[str, Pass]:
        monkeypatch.setattr(torch.cuda, "synchronize", lose)
        return {"backward": Pass(Work(lose), dict, 1, 1)}

    monkeypatch.setattr(runner.os, "_exit", leave)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    found = results.Results(tmp_path / "results.json", {"commit": "abc"}, {"command": "", "device": "cuda"})
    found.begin("ladder", "a", {})
    on_gpu = runner.Runner(runner.Settings(torch.device("cuda")), found.mark)
    assert on_gpu._prepared(Contender("fine", fine), {})[0]["error_of"] == {}
    with pytest.raises(SystemExit, match=str(runner.LOST)):
        on_gpu._prepared(Contender("fused", passes), {})
    error = "RuntimeError: CUDA error: an illegal memory access was encountered"
    assert capsys.readouterr().err == f"gspn2 bench: the device was lost, making fused: {error}\n"
    assert results.give_up(found.path) == [f"ladder: a: the device was lost, making fused: {error}"]
    on_gpu._timing(("fused", "backward"))
    assert on_gpu.doing == "timing fused, backward"


def test_rounds_end_when_time_is_up() -> None:
    works = {"a": Work(lambda _: None), "b": Work(lambda _: None, sets=2)}
    found = in_turn(works, HOST, rounds=50, seconds=0.0, least=4)
    assert [found[name]["runs"] for name in "ab"] == [4, 4]
    assert [found[name]["launches"] for name in "ab"] == [1, 2]


def samples(*found: float) -> dict[str, Any]:
    return {"ms": found[-1], "range": [min(found), max(found)]}


def test_floors_are_made_of_the_fastest_that_was_seen() -> None:
    """Also those of cases that were measured while the processor was slow."""
    probes = rates_module.Probes(HOST)
    found = probes.start(3, 0.0)
    assert found["matrix_by"] in ("matrix product", "convolution")
    assert list(probes.beside(False)) == ["copy", "read", "mix"]
    found |= {"fastest_gb_per_s": 1.0, "matrix_tflop_per_s": 1e-6}
    it: dict[str, Any] = {
        "name": "x",
        "pass": "forward",
        "ms": 1.0,
        "bytes": 10**6,
        "flops": 1000,
        "over_floor": 0.5,
    }
    rows: list[dict[str, Any]] = [{"device": "cpu", "contenders": [dict(it)]}, {"contenders": [dict(it)]}]
    rates_module.judge(rows, {"cpu": found})
    assert [row["contenders"][0]["over_floor"] for row in rows] == [1.0, 0.5]
    # The fastest samples count: what is read at 4 GB/s, a product at 4e-6 TFLOP/s.
    times: dict[Any, Any] = {"copy": samples(90.0, 90.0), "read": samples(2**16 // 128 / 4e6, 1.0)}
    times |= {"mix": samples(2.0)}
    times |= {("convolution", 16): samples(16**3 / 2e3, 90.0), ("matrix product", 16): samples(60.0, 1.0e3)}
    probes.note(times, found)
    assert found["fastest_gb_per_s"] == pytest.approx(4.0)
    assert found["matrix_tflop_per_s"] == pytest.approx(4e-6)
    assert found["matrix_by"] == "convolution"
    rates_module.judge(rows, {"cpu": found})
    assert rows[0]["contenders"][0]["over_floor"] == pytest.approx(4.0)
