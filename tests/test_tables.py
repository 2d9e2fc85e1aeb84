"""The measured tables in README.md and docs/: in step with the result files, and made as they should be."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MACHINE = {
    "processor": "Some CPU",
    "threads": 3,
    "system": "Linux x86_64",
    "python": "3.12.1",
    "torch": "2.12.1",
    "commit": "abc1234",
    "uncommitted_changes": False,
    "command": "python benchmarks/cpu.py",
    "date": "2026-01-02",
}


def times(**milliseconds: float) -> dict[str, dict[str, float]]:
    return {name: {"median_ms": ms, "fastest_ms": ms, "runs": 5} for name, ms in milliseconds.items()}


def operator_case(scaled: bool, forward: float) -> dict[str, object]:
    return {
        "size": [1, 8, 512, 512],
        "lam_and_gate": scaled,
        "megabytes": 29.4,
        "forward": times(gspn2=forward, copy=2.0, eager=56.0),
        "forward_and_backward": times(gspn2=12.3, eager=123.0),
        "forward_over_eager": 56.0 / forward,
        "forward_over_loop": 112.0 / forward,
        "train_over_loop": 20.0,
        "forward_in_copies": forward / 2,
        "train_over_eager": 10.0,
    }


RESULTS = {
    "operator": {
        "dtype": "float32",
        "directions": 4,
        "taps": "shared",
        "cases": [operator_case(False, 7.0), operator_case(True, 8.0)],
    },
    "memory": {
        "cases": [
            {
                "size": [1, 8, 512, 512],
                "lam_and_gate": True,
                "inputs_and_gradients_bytes": 100_000_000,
                "peak_extra_bytes": 12_000_000,
                "extra_over_inputs_and_gradients": 0.12,
            }
        ]
    },
    "start": {
        "import_seconds_over_torch": 0.043,
        "first_forward_seconds": {"cold": 11.0, "warm": 0.5},
        "first_backward_seconds": {"cold": 3.21, "warm": 0.02},
    },
    "models": {
        "at_224": [{"batch": 8, **times(gspn2_tiny=412.0, convnext_tiny=400.0), "over_convnext": 1.03}],
        "at_1024": {"batch": 1, "model_seconds": 2.5, "mixer_share": 0.2345},
    },
    "technology": {
        "problem": "one direction of a (1, 8, 512, 512) image",
        "rows": [
            {"name": "eager", "forward_ms": 20.0, "first_call_seconds": 0.01, "note": "the yardstick"},
            {"name": "other", "forward_ms": None, "first_call_seconds": None, "note": "did not finish"},
        ],
    },
}


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A project of a generator, its results and two documents: README.md without tables, docs/speed.md."""
    results = tmp_path / "benchmarks" / "results" / "cpu"
    results.mkdir(parents=True)
    for path in (ROOT / "benchmarks").glob("*table*.py"):
        shutil.copy(path, tmp_path / "benchmarks")
    for name, result in RESULTS.items():
        (results / f"{name}.json").write_text(json.dumps({"machine": MACHINE, **result}))
    (tmp_path / "README.md").write_text("# No tables\n")
    (tmp_path / "docs").mkdir()
    return tmp_path


def ask_for(project: Path, *names: str) -> Path:
    """docs/speed.md with empty places for tables, text around them."""
    path = project / "docs" / "speed.md"
    places = [f"before {name}\n\n<!-- benchmark:{name} -->\n<!-- /benchmark -->\n\nafter\n" for name in names]
    path.write_text("\n".join(places))
    return path


def tables(project: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(project / "benchmarks" / "tables.py"), *options]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)


def joined(document: Path) -> str:
    """Its text with broken lines mended."""
    return " ".join(document.read_text().split())


def test_documents_are_in_step_with_the_results() -> None:
    done = tables(ROOT, "--check")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("document", "names"),
    [
        (
            "README.md",
            {"operator-compact", "models-compact", "h200/summary-compact", "h200/backbones", "h200/steps"},
        ),
        ("docs/models.md", {"models"}),
        ("docs/generation.md", {"h200/floor", "h200/pictures"}),
        ("docs/training.md", {"h200/scaling"}),
        ("docs/backends.md", {"h200/summary", "h200/propagate", "h200/gspn1", "h200/memory"}),
        ("docs/cpu.md", {"operator", "memory", "start", "technology"}),
    ],
)
def test_documents_hold_their_tables(document: str, names: set[str]) -> None:
    text = (ROOT / document).read_text(encoding="utf-8")
    assert {name for name in names if f"<!-- benchmark:{name} -->" in text} == names


@pytest.mark.parametrize(
    ("name", "row"),
    [
        (
            "operator",
            "| 1, 8, 512, 512 | no | 7.00 | 56.0 | 2.00 | 8.0x | 16.0x | 3.50 | 12.3 | 123 | 10.0x | 20.0x |",
        ),
        (
            "operator",
            "| 1, 8, 512, 512 | yes | 8.00 | 56.0 | 2.00 | 7.0x | 14.0x | 4.00 "
            "| 12.3 | 123 | 10.0x | 20.0x |",
        ),
        ("operator-compact", "| 1, 8, 512, 512 | 8.00 ms | 7.0x | 12.3 ms | 10.0x |"),
        ("memory", "| 1, 8, 512, 512 | yes | 100.0 MB | 12.0 MB | 0.12 |"),
        ("start", "| `import gspn2`, after `import torch` | 43 ms |  |"),
        ("start", "| first forward | 0.50 s | 11.0 s |"),
        ("start", "| first backward | 20 ms | 3.21 s |"),
        ("models", "| 224 x 224, batch 8 | 412 ms | 400 ms | 1.03 |"),
        ("models-compact", "| 224 x 224, batch 8 | 412 ms | 400 ms | 1.03 |"),
        ("technology", "| eager | 20.0 | 10 ms | the yardstick |"),
        ("technology", "| other | - | - | did not finish |"),
    ],
)
def test_a_table_shows_what_was_measured(project: Path, name: str, row: str) -> None:
    document = ask_for(project, name)
    assert tables(project).returncode == 0
    lines = document.read_text().splitlines()
    assert row in lines
    heads, rule = (next(line for line in lines[at:] if line.startswith("|")) for at in (0, 6))
    assert heads.count("|") == rule.count("|") == row.count("|")
    text = joined(document)
    for fact in ("Some CPU", "3 threads", "Python 3.12.1", "PyTorch 2.12.1", "commit abc1234,", "2026-01-02"):
        assert fact in text
    assert any("`python benchmarks/cpu.py`" in line for line in lines)


def test_the_share_of_mixers_is_told(project: Path) -> None:
    document = ask_for(project, "models")
    assert tables(project).returncode == 0
    assert "takes 2.50 s; its mixers, projections included, are 23.4% of that" in joined(document)


def test_changes_that_were_not_committed_are_told(project: Path) -> None:
    machine = {**MACHINE, "uncommitted_changes": True}
    result = project / "benchmarks" / "results" / "cpu" / "start.json"
    result.write_text(json.dumps({"machine": machine, **RESULTS["start"]}))
    document = ask_for(project, "start")
    assert tables(project).returncode == 0
    assert "commit abc1234 with uncommitted changes" in joined(document)


def test_what_stands_around_a_table_stays(project: Path) -> None:
    document = ask_for(project, "start", "memory")
    assert tables(project).returncode == 0
    text = document.read_text()
    for line in ("before start", "before memory", "<!-- benchmark:start -->", "<!-- benchmark:memory -->"):
        assert text.count(f"{line}\n") == 1
    assert text.count("<!-- /benchmark -->\n\nafter\n") == 2
    assert (project / "README.md").read_text() == "# No tables\n"


def test_check_fails_until_the_tables_are_written_and_writes_nothing(project: Path) -> None:
    document = ask_for(project, *RESULTS)
    before = document.read_text()
    done = tables(project, "--check")
    assert done.returncode == 1
    assert "docs/speed.md: out of step" in done.stderr
    assert document.read_text() == before
    assert tables(project).returncode == 0
    assert tables(project, "--check").returncode == 0
    written = document.read_text()
    assert tables(project).returncode == 0
    assert document.read_text() == written


def test_check_fails_when_a_result_or_a_table_is_changed(project: Path) -> None:
    document = ask_for(project, "operator-compact")
    assert tables(project).returncode == 0
    written = document.read_text()
    document.write_text(written.replace("8.00 ms", "5.00 ms"))
    assert tables(project, "--check").returncode == 1
    document.write_text(written)
    assert tables(project, "--check").returncode == 0
    result = project / "benchmarks" / "results" / "cpu" / "operator.json"
    result.write_text(result.read_text().replace('"median_ms": 8.0', '"median_ms": 9.0'))
    assert tables(project, "--check").returncode == 1


@pytest.mark.parametrize("options", [(), ("--check",)])
def test_a_missing_result_is_an_error_that_names_it(project: Path, options: tuple[str, ...]) -> None:
    document = ask_for(project, "memory")
    (project / "benchmarks" / "results" / "cpu" / "memory.json").unlink()
    before = document.read_text()
    done = tables(project, *options)
    assert done.returncode == 1
    assert "table 'memory' needs benchmarks/results/cpu/memory.json, which is missing" in done.stderr
    assert "Traceback" not in done.stderr
    assert document.read_text() == before


@pytest.mark.parametrize("content", ["{", '{"machine": {}}', '{"cases": []}', "[]"])
def test_a_damaged_result_is_an_error_that_names_it(project: Path, content: str) -> None:
    ask_for(project, "memory")
    (project / "benchmarks" / "results" / "cpu" / "memory.json").write_text(content)
    done = tables(project)
    assert done.returncode == 1
    assert "benchmarks/results/cpu/memory.json" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<!-- benchmark:start -->\n", "table 'start' is not closed"),
        ("<!-- /benchmark -->\n", "closes no table"),
        ("<!-- benchmark:nothing -->\n<!-- /benchmark -->\n", "no table is called 'nothing'"),
        ("<!-- benchmark:start -->\n<!-- benchmark:memory -->\n<!-- /benchmark -->\n", "not closed"),
    ],
)
def test_wrong_markers_are_refused(project: Path, text: str, message: str) -> None:
    path = project / "docs" / "speed.md"
    path.write_text(text)
    done = tables(project)
    assert done.returncode == 1
    assert message in done.stderr
    assert path.read_text() == text


GPU_MACHINE = {**MACHINE, "device": "NVIDIA H200", "driver": "580.1", "cuda": "13.0", "cuda-core": "1.2.2"}


def gpu_case(names: list[str], met: bool = True, **more: object) -> dict[str, object]:
    def timed(metric: str, value: float, it: dict[str, float]) -> dict[str, object]:
        return {**it, "target": {"metric": metric, "value": value}, "met": met}

    return {
        "name": "a case",
        "size": [16, 8, 1024, 1024],
        "dtype": "bfloat16",
        "taps": "shared",
        "directions": names,
        "layout": "planes",
        "operator": "propagate",
        "lam_and_gate": True,
        "forward": timed("share", 0.7, {"ms": 0.844, "us": 844.0, "share": 0.6912}),
        "backward": timed("share", 0.6, {"ms": 1.99, "us": 1990.0, "share": 0.8}),
        **more,
    }


def gpu_result(project: Path, name: str, *cases: dict[str, object]) -> Path:
    path = project / "benchmarks" / "results" / "h200" / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"machine": GPU_MACHINE, "gspn1_source": "somewhere", "cases": cases}))
    return path


FOUR = ["down", "up", "right", "left"]
FACTORS = {
    "forward": {"ms": 0.0123, "gspn1_ms": 6.04, "factor": 491.1, "met": True},
    "backward": {"ms": 1.5, "gspn1_ms": 18.81, "factor": 12.5, "met": False},
}
CALLED = {
    "eager": {"us": 31.0, "met": False},
    "eager_with_grad": {"us": 40.0},
    "forward_and_backward": {"us": 140.0},
    "kernel": {"us": 7.25},
    "replay": {"us": 9.0, "over_kernel_us": 1.75, "met": True},
}


@pytest.mark.parametrize(
    ("name", "case", "row"),
    [
        (
            "propagate",
            gpu_case(FOUR),
            "| 16, 8, 1024, 1024 | planes | shared | yes | 0.84 | 69.1% | 1.99 | 80.0% |",
        ),
        (
            "propagate",
            gpu_case(FOUR, met=False),
            "| 16, 8, 1024, 1024 | planes | shared | yes | 0.84 | 69.1% (missed) | 1.99 | 80.0% (missed) |",
        ),
        (
            "line_scan",
            gpu_case(["down"]),
            "| 16, 8, 1024, 1024 | bfloat16 | shared | 0.84 | 69.1% | - | - | - |",
        ),
        (
            "gspn1",
            gpu_case(["right"], **FACTORS),
            "| 16, 8, 1024, 1024 | bfloat16 | 6.04 | 0.0123 (491.1x) | - "
            "| 18.8 | 1.50 (12.5x) (missed) | - |",
        ),
        (
            "calls",
            gpu_case(FOUR, **CALLED),
            "| 16, 8, 1024, 1024 | planes | 31.0 (missed) | 40.0 | 140 | 7.2 | 1.8 |",
        ),
    ],
)
def test_a_gpu_table_shows_what_was_measured(
    project: Path, name: str, case: dict[str, object], row: str
) -> None:
    gpu_result(project, name, case, {"name": "another", "error": "y: relative error 1"})
    document = ask_for(project, f"h200/{name}")
    assert tables(project).returncode == 0
    assert row in document.read_text().splitlines()
    text = joined(document)
    for fact in ("one NVIDIA H200", "driver 580.1", "CUDA 13.0", "Without a result: another.", "abc1234,"):
        assert fact in text


def test_the_summary_has_every_target_with_the_range_that_was_measured(project: Path) -> None:
    for name in ("line_scan", "gspn1", "few_planes", "models", "calls", "memory"):
        gpu_result(project, name)
    document = ask_for(project, "h200/summary")
    assert tables(project).returncode == 0
    assert "Not measured yet" in document.read_text()
    better = gpu_case(FOUR, forward={"share": 0.8, "target": {"metric": "share", "value": 0.7}, "met": True})
    gpu_result(project, "propagate", gpu_case(FOUR, met=False), better)
    assert tables(project).returncode == 0
    lines = document.read_text().splitlines()
    shown = "| `propagate`, four directions, shared taps, forward | 70.0% | 69.1% to 80.0% | 1 of 2 cases |"
    assert shown in lines
    assert "| `propagate`, four directions, per-channel taps, forward | - | - | no result |" in lines
    assert "h200_speed.svg" not in document.read_text()
    (project / "docs" / "images").mkdir()
    (project / "docs" / "images" / "h200_speed.svg").write_text("<svg/>")
    assert tables(project, "--check").returncode == 1
    assert tables(project).returncode == 0
    assert "(images/h200_speed.svg)" in document.read_text()


def scaling_case(gpus: int, how: str, images: float, **more: object) -> dict[str, object]:
    efficiency = images / gpus / 2000.0
    case = {"gpus": gpus, "compiled": True, "how": how, "ms": 128.0, "images_per_s": images}
    return {**case, "efficiency": efficiency, "peak_bytes": 20_400_000_000, **more}


def scaling_result(project: Path, *cases: dict[str, object], same: bool = True) -> None:
    path = project / "benchmarks" / "results" / "h200" / "scaling.json"
    path.parent.mkdir(exist_ok=True)
    about = {"model": "gspn2_tiny", "pixels": 224, "batch_per_gpu": 256, "dtype": "bfloat16"}
    losses = {"batch": 32, "steps": 6, "relative_difference": 2.1e-6, "same": same}
    made = {"machine": {**GPU_MACHINE, "gpus": 2}, "targets": {"4": 0.92}, "complete": True, **about}
    path.write_text(json.dumps({**made, "losses": losses, "cases": cases}))


def test_the_table_of_several_gpus_tells_what_was_not_measured_or_missed(project: Path) -> None:
    document = ask_for(project, "h200/scaling")
    assert tables(project).returncode == 0
    assert "*Not measured yet: `torchrun" in document.read_text()
    scaling_result(project, scaling_case(1, "alone", 2000.0), scaling_case(2, "shares", 3900.0))
    assert tables(project, "--check").returncode == 1
    assert tables(project).returncode == 0
    rows = document.read_text().splitlines()
    assert "| 1 | compiled | - | 128 | 2000 | 100.0% | 20.4 GB |" in rows
    assert "| 2 | compiled | shares (`--shard`) | 128 | 3900 | 97.5% | 20.4 GB |" in rows
    text = joined(document)
    for fact in (
        "2 NVIDIA H200",
        "Asked for at 4 GPUs: 92.0%; not measured.",
        "they differ by 2e-06 at most",
    ):
        assert fact in text
    scaling_result(project, scaling_case(4, "replicas", 7200.0, met=False), same=False)
    assert tables(project).returncode == 0
    assert "| 7200 | 90.0% (missed) | 20.4 GB |" in document.read_text()
    assert "other losses (a failure)" in joined(document)


def test_the_table_of_backbones_sets_ours_beside_each(project: Path) -> None:
    document = ask_for(project, "h200/backbones")
    assert tables(project).returncode == 0
    assert "*Not measured yet: `gspn2 bench models`" in document.read_text()
    path = project / "benchmarks" / "results" / "h200" / "bench.json"
    path.parent.mkdir()
    times = {"gspn2_tiny": 10.0, "convnext_tiny": 16.0, "swin_tiny": 8.0}
    facts = {"pixels": 224, "batches": {"train": 256, "train, compiled": 256}}
    contenders = [
        {"name": name, "pass": which, "ms": ms, "images": 256}
        for name, ms in times.items()
        for which in facts["batches"]
    ]
    contenders.append({"name": "deit_small", "absent": "not here"})
    case = {"bench": "models", "facts": facts, "contenders": contenders}
    path.write_text(json.dumps({"machine": GPU_MACHINE, "cases": [case, {**case, "bench": "t2i"}]}))
    assert tables(project).returncode == 0
    rows = [line for line in document.read_text().splitlines() if line.startswith("| ")]
    assert rows[2:] == [
        "| 224 x 224, train, compiled, batch 256 | 25600 | `convnext_tiny` 16000 | 1.60 |",
        "| 224 x 224, train, compiled, batch 256 | 25600 | `swin_tiny` 32000 | 0.80 |",
    ]


def t2i_case(pixels: int, which: str, method: str, **more: object) -> dict[str, object]:
    """A case of `gspn2 bench t2i`; times by `theirs`, `ours` and `neither`."""
    names = {"theirs": "attention", "ours": "GSPN-2", "neither": "no self-attention"}
    if which == "image":
        names = {"theirs": "attention, direct", "ours": "GSPN-2, progressive"}
    found = [
        {"name": names[it], "pass": which, "ms": more[it], "method": method} for it in names if it in more
    ]
    for it in found:
        it |= {"note": "composed: of this", "peak_bytes": 13e9, "planned_bytes": 16e9}
    facts = {"pixels": pixels, "direct_steps": 50, "progressive_steps": 30}
    return {"bench": "t2i", "facts": facts, "commit": "def5678", "contenders": found}


def t2i_rows(project: Path, name: str, cases: list[dict[str, object]]) -> tuple[list[str], str]:
    """Rows of a table and all of its document; without a result file the place says so."""
    document = ask_for(project, name)
    assert tables(project).returncode == 0
    assert "*Not measured yet: `gspn2 bench t2i`" in document.read_text()
    path = project / "benchmarks" / "results" / "h200" / "bench.json"
    path.parent.mkdir()
    path.write_text(json.dumps({"machine": GPU_MACHINE, "cases": cases}))
    assert tables(project).returncode == 0
    rows = [line for line in document.read_text().splitlines() if line.startswith("| ")]
    return rows[2:], joined(document)


def test_the_table_of_steps_sets_ours_beside_attention(project: Path) -> None:
    """By size, what is composed marked, what has no attention beside it left out."""
    cases = [
        t2i_case(4096, "step", "composed", theirs=700.0, ours=280.0),
        t2i_case(512, "step", "events", theirs=50.0, ours=40.0),
        t2i_case(1024, "step", "events", ours=40.0),
    ]
    rows, text = t2i_rows(project, "h200/steps", cases)
    assert rows == ["| 512 x 512 | 50 ms | 40 ms | 1.2x |", "| 4096 x 4096 | 700 ms* | 280 ms | 2.5x |"]
    assert "* is the step without self-attention" in text
    assert "At other commits: 512 x 512 (def5678), 4096 x 4096 (def5678)." in text


def test_the_table_of_what_a_step_can_gain_has_the_floor(project: Path) -> None:
    cases = [
        t2i_case(4096, "step", "events", theirs=700.0, ours=280.0),
        t2i_case(512, "step, CUDA graph", "graph", theirs=50.0, ours=42.0, neither=40.0),
    ]
    rows, text = t2i_rows(project, "h200/floor", cases)
    assert rows == ["| 512 x 512, CUDA graph | 50.0 | 42.0 | 40.0 | 1.050 | 1.2x | 1.2x |"]
    assert "measured singly" not in text
    assert "At other commits: 512 x 512 (def5678)." in text


def test_the_table_of_pictures_tells_what_they_are_composed_of(project: Path) -> None:
    cases = [
        t2i_case(4096, "image", "composed", theirs=70_000.0, ours=10_000.0),
        t2i_case(8192, "image", "events", ours=9.0),
    ]
    rows, text = t2i_rows(project, "h200/pictures", cases)
    assert rows == ["| 4096 x 4096 | 70.0 s* | 10.0 s* | 7.0x | 13.0 GB | 16.0 GB |"]
    assert "50 steps at the full size, or 30 a stage" in text
    assert "* is composed: attention, direct, 4096: of this; GSPN-2, progressive, 4096: of this." in text


def test_a_gpu_table_without_results_says_so(project: Path) -> None:
    document = ask_for(project, "h200/models")
    assert tables(project).returncode == 0
    assert "*Not measured yet: `python benchmarks/gpu.py models` on a GPU" in document.read_text()
    assert tables(project, "--check").returncode == 0
