"""`gspn2 bench`: nothing wrong gets a speed, runs resume, files compare, and the report loads nothing."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from gspn2.backends import BACKENDS, Problem, reference
from gspn2.backends import cpu as cpu_backend
from gspn2.backends.cuda.geometry import Device
from gspn2.bench import (
    ahead,
    baseline,
    case,
    compare,
    document,
    report,
    results,
    runner,
    tables,
    terminal,
)
from gspn2.bench import rates as rates_module
from gspn2.bench.about import machine
from gspn2.bench.case import Absent, Case, Contender, Pass
from gspn2.bench.check import Wrong
from gspn2.bench.contenders import gspn1, operator
from gspn2.bench.measure import Work, in_turn
from gspn2.bench.operator import Scan
from gspn2.cli import bench as command_module
from gspn2.cli.main import main

ROOT = Path(__file__).resolve().parent.parent
HOST = torch.device("cpu")
SCAN = Scan((1, 2, 9, 8), torch.float32, "per-channel", ("right",), scan=True, passes=("forward", "backward"))


@pytest.fixture(autouse=True)
def one_thread(threads: None) -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def small_machine(monkeypatch: pytest.MonkeyPatch) -> None:
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


def wrong() -> dict[str, Pass]:
    def check() -> dict[str, float]:
        raise Wrong("y: relative error 0.5")

    return {"forward": Pass(Work(lambda _: None), check, 1000, 2000)}


def absent() -> dict[str, Pass]:
    raise Absent("something is not installed")


def explode() -> dict[str, Pass]:
    raise RuntimeError("no memory\nand more")


def fails_late() -> dict[str, Pass]:
    calls = iter(range(3))

    def call(_: int) -> None:
        if next(calls, 9) >= 0:
            raise RuntimeError("not again")

    return {"forward": Pass(Work(call), dict, 1, 1)}


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
    assert main(["bench", "ladder", "--device", "cpu", "--out", str(tmp_path), "--rounds", "3"]) == 1
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


def run_cases(cases: list[Case], path: Path, resume: bool = False, **changes: Any) -> dict[str, Any]:
    found = results.Results(path, {"commit": "abc"}, {"command": "gspn2 bench", "device": "cpu"})
    if resume:
        assert found.resume() == sum(row["commit"] == "older" for row in results.load(path)["cases"])
    runner.run(cases, settings(**changes), found, runner.Watcher(), began=changes.get("began", 0.0))
    return results.load(path)


def counted(name: str, counts: dict[str, int], **changes: Any) -> Case:
    def make() -> dict[str, Pass]:
        counts[name] = counts.get(name, 0) + 1
        return fine()

    return fake(Contender("it", make), name=name, **changes)


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
    content["cases"].append({**began, "case": "d", "commit": "older"})
    path.write_text(json.dumps(content))
    content = run_cases([counted(name, counts) for name in "abcd"], path, resume=True)
    assert counts == {"a": 1, "c": 1, "d": 1}
    assert [row["case"] for row in content["cases"]] == ["a", "b", "c", "d"]
    by_name = {row["case"]: row for row in content["cases"]}
    assert by_name["b"]["failed"] == "hung, or ended the process"
    assert {name for name, row in by_name.items() if results.timed(row)} == {"a", "c", "d"}


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


def test_files_of_another_schema_are_refused(tmp_path: Path) -> None:
    for text, told in (
        ("{", "not JSON"),
        ("[]", "expected a result file"),
        ('{"schema": 0}', "schema 1, got 0"),
    ):
        path = tmp_path / "r.json"
        path.write_text(text)
        with pytest.raises(results.ResultsError, match=told):
            results.load(path)
    with pytest.raises(results.ResultsError, match="No such file"):
        results.load(tmp_path / "none.json")


def content_with(ms: float, spread: float = 0.01, **row: Any) -> dict[str, Any]:
    it = {"name": "gspn2", "pass": "forward", "ms": ms, "quartiles": [ms * (1 - spread), ms * (1 + spread)]}
    rows = [{"bench": "ladder", "case": "x", "contenders": [it], **row}]
    return {"schema": 1, "machine": {"processor": "p"}, "cases": rows}


@pytest.mark.parametrize(
    ("after", "spread", "slower", "faster"),
    [(1.03, 0.01, 0, 0), (1.2, 0.01, 1, 0), (0.7, 0.01, 0, 1), (1.2, 0.3, 0, 0)],
)
def test_compare_tells_what_changed(after: float, spread: float, slower: int, faster: int) -> None:
    found = compare.compare(content_with(1.0, spread), content_with(after, spread))
    assert (len(found.slower(0.05)), len(found.faster(0.05))) == (slower, faster)
    assert f"{slower} slower, {faster} faster" in compare.lines(found, 0.05)[0]


def test_compare_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = [tmp_path / "a.json", tmp_path / "b.json"]
    for path, ms in zip(paths, (1.0, 2.0), strict=True):
        path.write_text(json.dumps(content_with(ms)))
    assert main(["bench", "compare", *map(str, paths)]) == 1
    assert "slower    2.00x  1 -> 2 ms  ladder: x: gspn2, forward" in capsys.readouterr().out
    assert main(["bench", "compare", *map(str, reversed(paths))]) == 0
    other = content_with(1.0, contenders=[{"name": "gspn2", "pass": "forward", "wrong": "off"}])
    paths[1].write_text(json.dumps(other | {"machine": {"processor": "q"}}))
    assert main(["bench", "compare", *map(str, paths)]) == 1
    out = capsys.readouterr().out
    assert "no longer right  ladder: x: gspn2 forward: off" in out
    assert "processor p and q" in out
    assert main(["bench", "compare", str(paths[0])]) == 2


def test_the_command_line_says_what_it_expects(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["bench", "laddder"]) == 2
    assert "expected one of ladder," in capsys.readouterr().err
    assert main(["bench", "ladder", "--device", "tpu"]) == 2
    assert main(["bench", "ladder", "--only", "nothing like it", "--device", "cpu"]) == 2
    assert "part of a case's name" in capsys.readouterr().err
    assert main(["bench", "report", "--out", str(tmp_path)]) == 2
    assert main(["bench", "docs"]) == 2


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_case_is_unique_and_described(device: str) -> None:
    keys = [it.key for part in case.parts().values() for it in part.cases(torch.device(device))]
    assert len(keys) == len(set(keys))
    assert all(not key.endswith(": ") for key in keys)
    assert {part.name for part in case.parts().values()} == {key.split(":")[0] for key in keys}


def test_list_shows_them(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "list", "--device", "cpu"]) == 0
    assert "ladder: 2x8x128x128 fp32" in capsys.readouterr().out.splitlines()


def test_kernels_are_known_before_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward, backward and the baseline's, planned without a GPU and without memory."""
    sizes = Scan(
        (4, 8, 256, 256), torch.bfloat16, "shared", ("down",), scan=True, passes=("forward", "backward")
    )
    right = Scan((4, 8, 256, 256), torch.bfloat16, "per-channel", ("right",), scan=True, passes=sizes.passes)

    def contenders(device: torch.device) -> list[Contender]:
        return [gspn1(right, device), operator("gspn2", sizes, device), Contender("absent", absent)]

    cases = [Case("ladder", "x", {}, contenders), Case("ladder", "none", {}, lambda device: [])]
    found = ahead.kernels(cases, Device())
    functions = [kernel.function for kernel in found]
    assert {"gspn1_forward", "gspn1_backward"} < set(functions)
    assert any("backward" in it and "gspn1" not in it for it in functions)
    assert any("forward" in it and "gspn1" not in it for it in functions)
    # And side by side, with nothing left to compile.
    monkeypatch.setattr(ahead.driver, "device", any_device)
    monkeypatch.setattr(ahead, "_fails", fails_never)
    assert ahead.compile_all(cases, 0, jobs=2) == (len(found), 0)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there they compile")
def test_models_that_do_not_compile_are_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that a run always measures are compiled ahead; here none can be."""
    device = torch.device("cuda")
    wanted = [it for it in case.parts()["models"].cases(device) if it.compiled and not it.extra]
    assert {it.name for it in wanted} >= {
        "T, 224 pixels, compiled inference",
        "T, 224 pixels, compiled training",
    }
    assert ahead._does_not_compile((wanted[0].key, 0))
    assert ahead.compile_models([it for it in case.parts()["ladder"].cases(device)]) == (0, 0)
    told: list[str | None] = []

    def note(work: Any, wanted: list[Any], jobs: int, seconds: float | None) -> int:
        told.append(os.environ.get(ahead.COMPILERS))
        return len(wanted) - 1

    monkeypatch.setattr(ahead, "side_by_side", note)
    monkeypatch.delenv(ahead.COMPILERS, raising=False)
    count, missing = ahead.compile_models(wanted)
    assert (count, missing) == (sum(len(it.contenders(device)) for it in wanted), 1)
    assert told == [str(ahead.COMPILER_CORES)], "read at import: it has to be there before"
    assert ahead.COMPILERS not in os.environ


def any_device(index: int) -> Device:
    return Device()


def fails_never(capability: tuple[int, int], kernel: object) -> bool:
    return False


def test_the_released_times_are_found() -> None:
    assert baseline.released((16, 8, 1024, 1024), torch.bfloat16, backward=True) == 79.14
    assert baseline.released((16, 8, 1024, 1024), torch.float16, backward=True) is None
    assert baseline.released((1, 1, 2, 3), torch.float32, backward=False) is None
    problem = Problem(("right",), None, False, 2, 3, 3, 70, 5, torch.float32, "cuda")
    plan = baseline.plan(problem, backward=True)
    assert [launch.knobs[0] for launch in plan.launches] == [4, 3, 2, 1, 0]
    assert {(launch.grid, launch.block) for launch in plan.launches} == {(1, 512)}


def test_rounds_end_when_time_is_up() -> None:
    works = {"a": Work(lambda _: None), "b": Work(lambda _: None, sets=2)}
    found = in_turn(works, HOST, rounds=50, seconds=0.0, least=4)
    assert [found[name]["runs"] for name in "ab"] == [4, 4]
    assert [found[name]["launches"] for name in "ab"] == [1, 2]


def test_the_machine_is_described() -> None:
    found = machine(HOST, "gspn2 bench ladder")
    assert found["command"] == "gspn2 bench ladder"
    assert {"processor", "threads", "python", "torch", "commit", "date"} <= set(found)


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


def documents() -> Iterator[dict[str, Any]]:
    for path in sorted((ROOT / "benchmarks" / "results").glob("*/bench.json")):
        yield results.load(path)


def test_the_document_is_in_step_with_its_results() -> None:
    contents = list(documents())
    assert contents, "there is no benchmarks/results/*/bench.json"
    assert (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8") == document.text(contents), (
        "docs/benchmarks.md is out of step: run `gspn2 bench docs`"
    )


def test_committed_results_have_no_wrong_ones_and_name_their_commit() -> None:
    for content in documents():
        assert content["run"]["complete"]
        assert content["machine"]["commit"]
        assert not [text for row in content["cases"] for text in results.broken(row)]


def test_the_report_is_one_file_with_pictures_that_loads_nothing(tmp_path: Path) -> None:
    content = next(documents())
    path = report.write(content, tmp_path)
    page = path.read_text()
    assert not re.search(r'(src|href)="(?!#|data:)', page.replace('xlink:href="#', ""))
    assert "$" not in re.sub(r"<svg.*?</svg>", "", page, flags=re.DOTALL)
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'xlink:href="#([^"]+)"', page)) <= set(ids)
    for name in ("ladder", "sweep", "roofline"):
        assert (tmp_path / f"{name}.svg").read_bytes().startswith(b"<?xml")
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert f'id="{name}-' in page


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


def test_what_beats_its_floor_is_told(tmp_path: Path) -> None:
    """On the terminal, in the report and in the document; a few percent are the clock's."""
    it = {"name": "gspn2", "pass": "forward", "ms": 1.0, "quartiles": [1.0, 1.0], "bytes": 1, "flops": 1}
    it |= {"gb_per_s": 1.0, "share": 0.5, "over_floor": 0.98}
    row = {"bench": "sweep", "case": "resolution 64", "facts": {}, "seconds": 1.0, "contenders": [it]}
    content = {**next(documents()), "cases": [row]}
    assert not results.beaten_floors([row])
    assert "98.0%" not in tables.beaten(content)
    it["over_floor"] = 0.5
    assert results.beaten_floors([row]) == ["sweep: resolution 64: gspn2, forward (200%)"]
    assert "faster than its floor" in "\n".join(terminal.table(row))
    assert "200.0%!" in "\n".join(terminal.table(row))
    assert tables.cells(row)[0][6] == "200.0%!"
    told = "sweep: resolution 64: gspn2, forward (200%)"
    assert told in " ".join(document.text([content]).split())
    assert told in report.html(content, {})


def test_a_busy_cpu_is_told() -> None:
    content: dict[str, Any] = {"machine": {"threads": 2, "load": 6.5}, "rates": {"cpu": {}}}
    assert tables.busy(content).startswith("The CPU was busy")
    assert "load 6.5 on 2 threads" in tables.busy(content)
    on_gpu = content | {"rates": {"cuda": {}}}
    assert tables.busy(on_gpu).startswith("The host was busy")
    content["machine"]["load"] = 0.2
    assert tables.busy(content) == ""


@pytest.mark.parametrize(("ms", "told"), [(33.0, False), (40.0, True), (25.0, True)])
def test_a_baseline_that_is_far_from_the_released_kernel_is_remarked_on(ms: float, told: bool) -> None:
    it = {"name": "baseline", "pass": "forward", "ms": ms, "quartiles": [ms, ms], "bytes": 1, "flops": 1}
    it |= {"gb_per_s": 1.0, "share": 0.5, "over_floor": 2.0, "released_ms": 33.09}
    (cells,) = tables.cells({"contenders": [it]})
    assert ("more than 15% away" in cells[-1]) == told
    assert "of the released kernel's 33.09 ms" in cells[-1]
