"""`gspn2 bench` before it measures: its command line, its cases, and what is compiled ahead."""

from __future__ import annotations

import os
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor

import gspn2.models  # noqa: F401  (registers them with timm)
from bench_helpers import HOST, absent
from gspn2.backends import Problem
from gspn2.backends.cuda.geometry import Device
from gspn2.bench import ahead, baseline, case, ladder, models, sweep, throughput
from gspn2.bench.about import machine
from gspn2.bench.case import Case, Contender
from gspn2.bench.contenders import gspn1, operator
from gspn2.bench.models import RESOLUTIONS, SIZES
from gspn2.bench.operator import ROTATION, Scan
from gspn2.cli import bench as command_module
from gspn2.cli.main import main


def test_the_command_line_says_what_it_expects(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["bench", "laddder"]) == 2
    assert "expected one of ladder," in capsys.readouterr().err
    assert main(["bench", "ladder", "--device", "tpu"]) == 2
    assert main(["bench", "report", "--out", str(tmp_path)]) == 2
    assert main(["bench", "docs"]) == 2


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["ladder", "--only", "nothing like it"], "a part of a case's name"),
        (["ladder", "--only", "("], "expected a regular expression, got '('"),
        (["ladder", "--minutes", "-1"], "at least 0, got '-1'"),
        (["ladder", "--tolerance", "nan"], "at least 0, got 'nan'"),
        (["ladder", "compare"], "compare comes first"),
        (["list", "laddder"], "got 'laddder'"),
        (["ladder", "--check"], "--check: of docs only, got it with ladder"),
        (["ladder", "--tolerance", "0.1"], "--tolerance: of compare only, got it with ladder"),
        (["compare", "a", "b", "--only", "x"], "--only: of list and parts only, got it with compare"),
        (["report", "--no-report"], "--no-report: of parts only, got it with report"),
        (["list", "--out", "x"], "--out: of report and docs and parts only, got it with list"),
        (["report", "here"], "expected nothing after it, got 'here'"),
        (["docs", "a.json", "--out", "folder"], "a name that ends in .md, got folder"),
    ],
)
def test_a_wrong_word_is_named(words: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    device = ["--device", "cpu"] if words[0] in command_module.PARTS else []
    assert main(["bench", *words, *device]) == 2
    error = capsys.readouterr().err
    assert told in error
    assert error.count("\n") == 1


def test_a_folder_that_cannot_be_is_told_before_anything_is_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a GPU minutes of compiling come first."""
    (tmp_path / "file").touch()
    assert main(["bench", "ladder", "--device", "cpu", "--out", str(tmp_path / "file")]) == 2
    assert f"out: cannot write to {tmp_path / 'file'}: File exists" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words", [["ladder", "--out", "a b/c"], ["ladder", "--out=it's", "--resume", "--in-process", "3"]]
)
def test_the_command_is_kept_without_folders(words: list[str]) -> None:
    assert command_module._shown(words) == ["ladder"]


def test_without_matplotlib_that_is_told_before_anything_is_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(command_module, "find_spec", lambda name: None)
    words = ["bench", "ladder", "--device", "cpu", "--minutes", "0", "--out", str(tmp_path)]
    assert main(words) == 0
    first = capsys.readouterr().out.splitlines()[0]
    assert first.startswith("there will be no report")
    assert 'pip install "gspn2[bench]"' in first


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_case_is_unique_and_described(device: str) -> None:
    keys = [it.key for part in case.parts().values() for it in part.cases(torch.device(device))]
    assert len(keys) == len(set(keys))
    assert all(not key.endswith(": ") for key in keys)
    assert {part.name for part in case.parts().values()} == {key.split(":")[0] for key in keys}


def test_list_shows_them(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "list", "--device", "cpu"]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert "ladder: 2x8x128x128 fp32" in shown
    assert main(["bench", "list", "cpu", "throughput", "--only", "56", "--device", "cpu"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        line for line in shown if line.startswith("cpu: 8x8x56x56")
    ]


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
    assert any("backward" not in it and "gspn1" not in it for it in functions)
    # And side by side, with nothing left to compile.
    monkeypatch.setattr(ahead.driver, "device", any_device)
    monkeypatch.setattr(ahead, "_fails", fails_never)
    assert ahead.compile_all(cases, 0, jobs=2) == (len(found), 0)


TARGETS_IN_TRAINING = {("gspn2_tiny", 224), ("convnext_tiny", 224)}


def test_backbones_are_run_in_every_way_on_a_gpu() -> None:
    """Every size at every resolution: inference and training, eager and compiled, each model once.

    Training that is compiled as a CUDA graph, too, and block by block unless it is, or is beside, a target.
    """
    found = [
        (name, it.facts["pixels"], which)
        for it in case.parts()["models"].cases(torch.device("cuda"))
        for name in it.facts.get("models", ())
        for which in it.facts["batches"]
    ]
    wanted = set()
    for size, names in SIZES.items():
        for name in names:
            for side in RESOLUTIONS:
                inference = "compiled" if size == "T" else "blocks compiled"
                train = "compiled" if (size, side) == ("T", 224) else "blocks compiled"
                graphs = "CUDA graphs" if (name, side) in TARGETS_IN_TRAINING else "one CUDA graph"
                ways = ("inference", f"inference, {inference}", "train", f"train, {train}")
                wanted |= {(name, side, way) for way in (*ways, f"train, {train}, {graphs}")}
    assert sorted(found) == sorted(wanted)


def test_blocks_of_a_stage_are_compiled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """And what a network of compiled blocks computes is what it computed before."""
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, _: list[Tensor]) -> Any:
        graphs.append(graph)
        return graph

    monkeypatch.setattr(models.torch, "compile", partial(torch.compile, backend=keep))
    model = timm.create_model("gspn2_tiny", dims=(8, 16), depths=(3, 2), chunk=0, num_classes=3).eval()
    images = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        before = model(images)
        setting = models.Setting(32, 1, False, compiled=True, blocks=True)
        compiled = models._compiler(model, setting)
        after = compiled(images)
        assert len(graphs) == 2, "one of each stage"
        with torch.compiler.set_stance("force_eager"):
            assert torch.equal(compiled(images), before)
    torch.testing.assert_close(after, before)
    fresh = timm.create_model("gspn2_tiny", dims=(8, 16), depths=(3, 2), chunk=0)
    trained = models._train(fresh, replace(setting, train=True), torch.device("cpu"))
    assert trained.flops > 0
    assert trained.check() == {}
    trained.facts["peak_bytes"] = 1
    replayed = models._one_graph(trained)
    assert replayed.work.graph
    assert replayed.facts == {"images": 1}, "what a graph holds is no peak of a step"


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


def test_inputs_of_every_problem_are_more_than_the_cache_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    """In rotation, also those of the smallest; the methods say so."""
    posed: list[Scan] = []

    def note(name: str, scan: Scan, device: torch.device) -> Contender:
        posed.append(scan)
        return Contender(name, absent)

    device = torch.device("cuda")
    for part in (ladder, sweep, throughput):
        monkeypatch.setattr(part, "operator", note)
        for it in part.cases(device):
            it.contenders(device)
    small = min(posed, key=lambda it: it.bytes("forward"))
    assert small.bytes("forward") == 72 * 2**10
    assert all(it.sets * it.bytes("forward") >= ROTATION for it in posed)


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


def test_the_machine_is_described() -> None:
    found = machine(HOST, "gspn2 bench ladder")
    assert found["command"] == "gspn2 bench ladder"
    assert {"processor", "threads", "python", "torch", "commit", "date"} <= set(found)
