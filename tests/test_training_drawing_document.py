"""What is written about models that learned to draw, and the command that runs and writes."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from drawing_helpers import TINY, shrink
from gspn2.cli.main import main
from gspn2.training import UserError
from gspn2.training.drawing import DRAWERS, document, runner, samples

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "generation"
pytestmark = pytest.mark.usefixtures("one_thread")


# -- the section


def test_the_section_is_in_step_with_its_results():
    for path, content in document.files(ROOT / "docs", RESULTS).items():
        again = "run `gspn2 draw docs --out benchmarks/results/generation`"
        assert path.exists(), f"{path.name} is missing: {again}"
        assert path.read_bytes() == content, f"{path.name} is out of step: {again}"
        assert len(content) < 200_000, f"{path.name}: {len(content)} bytes are too many for the documentation"


def test_without_results_the_section_claims_nothing():
    text = document.section([], set())
    assert "Nothing has been run yet" in text
    assert "|" not in text


def test_a_page_without_marks_is_refused_and_the_rest_of_a_page_is_left_alone():
    with pytest.raises(UserError, match="expected the lines"):
        document.insert("# Page\n", "text")
    page = f"# Page\n\n{document.BEGIN}\nold\n{document.END}\n\nrest\n"
    once = document.insert(page, "new")
    assert once == f"# Page\n\n{document.BEGIN}\n\nnew\n\n{document.END}\n\nrest\n"
    assert document.insert(once, "new") == once


def _made_up(model: str, distance: float, seed: int = 0) -> dict[str, Any]:
    losses = {"loss": 0.5, "noise": 0.3, "teacher": 0.1, "features": 0.25}
    machine = {"processor": "a CPU", "torch": "2", "commit": "abc", "date": "2026-01-01"}
    found = {"distance": distance, "accuracy": 0.9}
    return {
        "run": {"model": model, "seed": seed},
        "settings": dataclasses.asdict(TINY),
        "parameters": 1000,
        "learnt": 100,
        "ended": "steps",
        "step": 8,
        "seconds": 1.0,
        "curve": [{"step": 0, "seconds": 0.0, **found}, {"step": 8, "seconds": 1.0, **losses}],
        "judge": {"digest": "a", "accuracy": 0.99, "floor": 4.0, "noise": 400.0},
        "samples": dict.fromkeys(document.COLUMNS, found),
        "machine": machine | {"uncommitted_changes": False},
    }


def _some(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Samples of all sorts but one."""
    return {use: found for use, found in results[1]["samples"].items() if use != "4x-dilated"}


def _made_up_unets() -> list[dict[str, Any]]:
    return [_made_up(name, 6.0) for name in DRAWERS if name.startswith("unet")]


def test_the_section_has_means_ranges_pictures_and_curves(tmp_path: Path):
    results = [_made_up(name, value, seed) for seed, value in ((0, 6.0), (1, 8.0)) for name in DRAWERS]
    for result in results:
        path = tmp_path / f"{result['run']['model']}-s{result['run']['seed']}.json"
        path.write_text(json.dumps({"schema": runner.SCHEMA, **result}))
    (tmp_path / "unet-gspn2-s0-2x.png").write_bytes(b"a grid")
    docs = tmp_path / "docs"
    docs.mkdir()
    (docs / document.PAGE).write_text(f"{document.BEGIN}\n{document.END}\n")
    files = document.files(docs, tmp_path)
    text = files[docs / document.PAGE].decode()
    assert "| UNet, GSPN-2 | 1,000 | 2 | 8 | 7.0 (6.0 to 8.0) |" in text
    assert "| UNet, GSPN-2 | 1,000 | 2 | 8 | 90.0% (90.0% to 90.0%) |" in text
    assert "![UNet, GSPN-2, 2x direct](images/generation/unet-gspn2-s0-2x.png)" in text
    assert "draws at a distance of 7.0" in text
    assert "No run has come to its end" not in text
    assert "No samples have been judged" not in text
    del results[0]["samples"]["2x-dilated"]
    told = document.section(results, set())
    assert "8.0, 1 of the seeds" in told
    del results[5]["samples"]["2x-dilated"]
    assert "| UNet, self-attention | 1,000 | 2 | 8 | 7.0 (6.0 to 8.0) | 7.0 (6.0 to 8.0) | - |" in (
        document.section(results, set())
    )
    assert "judged yet of: 4x dilated." in document.section([results[0] | {"samples": _some(results)}], set())
    assert "No run has come to its end yet of: DiT" in document.section(_made_up_unets(), set())
    assert files[docs / document.FOLDER / "unet-gspn2-s0-2x.png"] == b"a grid"
    import xml.etree.ElementTree as tree

    root = tree.fromstring(files[docs / document.FOLDER / document.CURVES])
    # Distances of five models; losses of a single point have no line.
    assert len(root.findall(".//{http://www.w3.org/2000/svg}polyline")) == 2 * 5
    results[0]["judge"]["digest"] = "b"
    other = {"schema": runner.SCHEMA, **results[0]}
    (tmp_path / "unet-attention-s0.json").write_text(json.dumps(other))
    with pytest.raises(UserError, match="seed 0 by different judges"):
        document.load(tmp_path)
    for result in results:
        # Another folder's seed: what is compared is still judged alike.
        result["judge"]["digest"], result["judge"]["floor"] = "ab"[result["run"]["seed"]], 4.0
    results[-1]["judge"]["floor"] = 5.0
    told = document.section(results, set())
    assert "at a distance of 4.0, 5.0" in told
    assert "all models of a seed by one" in told


# -- the command


def test_the_command_runs_lists_and_writes_the_section(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
):
    shrink(monkeypatch)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(samples, "USES", ("1x",))
    monkeypatch.setattr(document, "USES", ("1x",))
    monkeypatch.setattr(document, "COLUMNS", {"1x": "32"})
    chosen = ["--models", "dit-gspn2", "--seeds", "0", "--out", "draw"]
    scale = ["--steps", "2", "--batch-size", "4", "--samples", "40", "--sampler-steps", "1", "--tests", "1"]
    scale += ["--judge-steps", "2", "--device", "cpu"]
    assert main(["draw", "judge", *chosen, *scale]) == 0
    assert "of held-out digits" in capsys.readouterr().out
    assert main(["draw", "list", *chosen]) == 0
    assert capsys.readouterr().out == "to do    dit-gspn2-s0\n"
    assert main(["draw", *chosen, *scale]) == 0
    assert "[1/1] dit-gspn2-s0: done:" in capsys.readouterr().out
    assert main(["draw", "list", *chosen]) == 0
    assert capsys.readouterr().out == "done     dit-gspn2-s0\n"
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / document.PAGE).write_text(f"{document.BEGIN}\n{document.END}\n")
    assert main(["draw", "docs", "--out", "draw", "--check"]) == 1
    assert main(["draw", "docs", "--out", "draw"]) == 0
    assert main(["draw", "docs", "--out", "draw", "--check"]) == 0
    assert main(["draw", *chosen, *scale, "--lr", "0.5"]) == 2
    assert "had other settings" in capsys.readouterr().err
