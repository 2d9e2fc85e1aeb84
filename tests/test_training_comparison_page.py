"""The page that is made of the comparison's results, and the command that runs and writes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from comparison_helpers import made_up
from gspn2.cli.main import main
from gspn2.training.comparison import MAIN, document

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "learning"

# -- the page


def test_the_page_is_in_step_with_its_results():
    for name, content in document.files(document.load(RESULTS), document.notes(RESULTS)).items():
        path = ROOT / "docs" / name
        assert path.exists(), (
            f"docs/{name} is missing: run `gspn2 learn docs --out benchmarks/results/learning`"
        )
        assert path.read_text(encoding="utf-8") == content, (
            f"docs/{name} is out of step: run `gspn2 learn docs --out benchmarks/results/learning`"
        )


def test_without_results_the_page_claims_nothing():
    files = document.files([])
    assert list(files) == ["learning.md"]
    assert "Nothing has been run yet" in files["learning.md"]
    assert "|" not in files["learning.md"]


def test_the_page_says_whether_the_goal_was_met():
    ours = [made_up("gspn2", 0.9, 10.0), made_up("gspn2", 0.94, 14.0, seed=1)]
    vit = [made_up("vit", 0.7, 20.0), made_up("vit", 0.74, 20.0, seed=1)]
    met = "| maze, 64 | 2 | yes, 92.0%, 72.0% | yes, 8 s, 20 s | yes, 82.0%, 62.0% | neither, 62.0%, 42.0% |"
    # The seed of 0.94 is there at half its time, 7 s, the other only at the end, 10 s.
    text = document.text([*ours, *vit])
    assert met in text
    assert "| GSPN-2 | 1,243,000 | 2 | 100 | 92.0% | 90.0% to 94.0% | 12 s | 82.0% | 62.0% | 8 s |" in text
    swapped = [made_up("vit", 0.9, 10.0), made_up("gspn2", 0.7, 5.0)]
    assert "| maze, 64 | 1 | no, 70.0%, 90.0% | no, never | no, 60.0%, 80.0% | neither, 40.0%, 60.0% |" in (
        document.text(swapped)
    )


def test_what_was_written_about_the_results_is_in_the_page(tmp_path: Path):
    (tmp_path / document.NOTES).write_text("Nobody knows why.\n")
    assert "\nNobody knows why.\n" in document.text([made_up("vit", 0.5, 1.0)], document.notes(tmp_path))


def test_two_that_guess_are_not_compared():
    text = document.text([made_up("gspn2", 0.52, 10.0), made_up("vit", 0.5, 20.0)])
    assert "| maze, 64 | 1 | neither, 52.0%, 50.0% | nothing to reach |" in text


def test_unequal_steps_or_seeds_are_not_compared():
    cut = made_up("vit", 0.5, 20.0, step=60)
    for others in ([cut], [made_up("vit", 0.5, 20.0, seed=1)]):
        assert "There are no runs of both with the same seeds and steps" in (
            document.text([made_up("gspn2", 0.9, 10.0), *others])
        )


def test_a_larger_size_with_a_rate_of_its_own_is_shown():
    """The choice of rates is made at the smallest size; what ran at another one only is not left out."""
    tried = [made_up("vit", 0.6, 1.0), made_up("vit", 0.7, 1.0)]
    tried[0]["run"]["lr"], tried[1]["run"]["lr"] = 1e-3, 2e-3
    for result in tried:
        result["validation"] = {"accuracy": result["accuracy"], "loss": 0.5}
    large = made_up("vit", 0.8, 1.0)
    large["run"] |= {"size": 128, "lr": 1e-3}
    text = document.text([*tried, large])
    assert "| ViT | 1,243,000 | 1 | 100 | 70.0%" in text
    assert "| ViT | 1,243,000 | 1 | 100 | 60.0%" not in text
    assert "| ViT | 1,243,000 | 1 | 100 | 80.0%" in text


def test_the_picture_has_a_curve_for_every_seed_and_panel():
    results = [made_up(name, 0.8, 10.0, seed) for name in MAIN for seed in (0, 1)]
    svg = document.files(results)["images/learning_maze_64.svg"]
    import xml.etree.ElementTree as tree

    root = tree.fromstring(svg)
    assert len(root.findall(".//{http://www.w3.org/2000/svg}polyline")) == 3 * 6


def test_no_curve_runs_along_an_edge_that_it_is_below():
    results = [made_up(name, 0.32, 10.0) for name in MAIN]  # with a point at 12%
    svg = document.files(results)["images/learning_maze_64.svg"]
    places = {
        float(y) for curve in re.findall(r'points="([^"]+)"', svg) for y in re.findall(r",([\d.]+)", curve)
    }
    assert max(places) < 290 - 48, "at the axis, where values that are lower are clipped to"


# -- the command


def test_the_command_runs_lists_and_writes_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.chdir(tmp_path)
    chosen = ["--tasks", "maze", "--sizes", "32", "--seeds", "0", "--contenders", "vit", "--out", "learn"]
    chosen += ["--lr", "0.001", "0.002"]
    scale = ["--steps", "2", "--batch-size", "4", "--train-images", "8", "--test-images", "4", "--tests", "1"]
    assert main(["learn", "list", *chosen]) == 0
    assert capsys.readouterr().out == (
        "to do    maze-32-vit-lr0.001-s0\nto do    maze-32-vit-lr0.002-s0\n"
        "then     the others, at the learning rates that are best\n"
    )
    assert main(["learn", *chosen, *scale, "--device", "cpu"]) == 0
    said = capsys.readouterr().out
    assert "[2/2] maze-32-vit-lr0.002-s0: done:" in said
    assert "maze, vit: learning rate 0.00" in said
    assert "[1/1] maze-32-vit-lr0.00" in said
    assert main(["learn", "list", *chosen]) == 0
    assert capsys.readouterr().out == ("done     maze-32-vit-lr0.001-s0\ndone     maze-32-vit-lr0.002-s0\n")
    assert main(["learn", "docs", "--out", "learn", "--check"]) == 1
    assert main(["learn", "docs", "--out", "learn"]) == 0
    assert main(["learn", "docs", "--out", "learn", "--check"]) == 0
    assert (tmp_path / "docs" / "images" / "learning_maze_32.svg").exists()
    assert (tmp_path / "docs" / document.EXAMPLES).exists()
    assert main(["learn", *chosen, "--steps", "3", "--device", "cpu"]) == 2
    assert "had other settings" in capsys.readouterr().err
