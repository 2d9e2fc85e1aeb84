"""`gspn2 bench` reads result files: damaged ones are refused, two compare, report and document tell all."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from bench_helpers import ROOT, content_with, documents
from gspn2.bench import beside, compare, document, figures, report, results, tables, terminal
from gspn2.cli.main import main


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


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"machine": None}, "'machine' of the file is None, expected an object"),
        ({"cases": [7]}, "case 1 is 7, expected an object"),
        ({"cases": [{"bench": "ladder", "case": "x", "facts": {}}]}, "'contenders' of ladder: x is None"),
        ({"ms": "1"}, "'ms' of gspn2 of ladder: x is '1', expected a number"),
        ({"name": None}, "'name' of a contender of ladder: x is None"),
        ({"ms": None}, "'ms' of gspn2 of ladder: x is None"),
    ],
)
def test_damaged_files_are_refused(tmp_path: Path, change: dict[str, Any], told: str) -> None:
    content = content_with(1.0)
    if set(change) <= set(content):
        content |= change
    else:
        content["cases"][0]["contenders"][0] |= change
    path = tmp_path / "r.json"
    path.write_text(json.dumps(content))
    with pytest.raises(results.ResultsError, match=re.escape(told)):
        results.load(path)


def test_a_time_that_is_missing_without_a_reason_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    path.write_text(json.dumps(content_with(1.0, contenders=[{"name": "gspn2"}])))
    with pytest.raises(results.ResultsError, match="gspn2 of ladder: x has no time, and nothing says why"):
        results.load(path)
    path.write_bytes(b"\x81\x00")
    with pytest.raises(results.ResultsError, match="not JSON"):
        results.load(path)


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
    assert main(["bench", "compare", str(paths[1]), str(paths[1])]) == 0, "wrong before, too"
    assert main(["bench", "compare", str(paths[0])]) == 2


def test_compare_names_what_is_missing() -> None:
    """A case that was not run, and a contender that was there, with the reason."""
    before, after = content_with(1.0), content_with(1.0, contenders=[{"name": "gspn2", "absent": "no GPU"}])
    before["cases"] += content_with(1.0, case="y")["cases"]
    after["cases"] += content_with(1.0, bench="sweep", case="z")["cases"]
    after["cases"][0]["contenders"].append(before["cases"][0]["contenders"][0] | {"name": "other"})
    assert compare.lines(compare.compare(before, after), 0.05)[1:] == [
        "only in the first  ladder: y (1 times)",
        "only in the first  ladder: x: gspn2, forward: no GPU",
        "only in the second  sweep: z (1 times)",
        "only in the second  ladder: x: other, forward: no such pass",
    ]


def test_compare_tells_why_each_pass_is_missing() -> None:
    both = [{**it, "name": "gspn2"} for it in passes(**{"forward:gspn2": 1.0, "backward:gspn2": 2.0})]
    before = content_with(1.0, contenders=[*both, {**both[0], "name": "other"}])
    gone = [{"name": "gspn2", "pass": "forward", "wrong": "y is off"}]
    gone += [{"name": "gspn2", "pass": "backward", "absent": "takes too long"}]
    after = content_with(1.0, contenders=[*gone, {**both[0], "name": "other"}])
    assert compare.compare(before, after).only_before == [
        "ladder: x: gspn2, forward: y is off",
        "ladder: x: gspn2, backward: takes too long",
    ]


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


def test_the_best_share_of_bandwidth_does_not_stand_alone() -> None:
    content = content_with(1.0)
    (row,) = content["cases"]
    row["facts"]["size"] = [1, 2, 3, 4]
    (it,) = row["contenders"]
    row["contenders"] = [
        {**it, "name": name, "share": share} for name, share in zip("abc", (0.9, 0.2, 0.1), strict=True)
    ]
    assert report.headlines(content["cases"]) == [
        ("90%", "of copy bandwidth at best, forward at 1 x 2 x 3 x 4; half of these times are below 20%")
    ]


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


def test_rates_are_of_the_run_that_measured_them() -> None:
    """A file may hold cases of other commits."""
    content = next(documents())
    row = {**content_with(1.0, bench="sweep")["cases"][0], "contenders": []}
    row["commit"] = content["machine"]["commit"]
    assert "Measured in the same run: copy " in document.text([{**content, "cases": [row]}])
    told = document.text([{**content, "cases": [row, {**row, "case": "y", "commit": "older"}]}])
    assert f"Measured with commit {row['commit']}: copy " in told
    assert "With commit older: sweep: y." in told


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


def passes(**milliseconds: float) -> list[dict[str, Any]]:
    """Contenders by name, with the pass before a colon."""
    counted = {"bytes": 1, "flops": 1, "gb_per_s": 1.0, "share": 0.5, "over_floor": 2.0, "images": 8}
    return [
        {"name": name, "pass": which, "ms": ms, "quartiles": [ms, ms], **counted}
        for key, ms in milliseconds.items()
        for which, name in [key.split(":")]
    ]


def test_a_sub_layer_is_compared_with_a_sub_layer() -> None:
    """Not with attention alone, which has no projections; and what has no rival is compared with nothing."""
    times = {"forward:SDPA flash": 4.0, "forward:GSPN-2, scan": 1.0, "train:GSPN-2, scan": 3.0}
    times |= {"forward:attention, sub-layer": 9.0, "forward:GSPN-2, sub-layer": 3.0}
    times |= {"forward:attention, block": 20.0, "forward:GSPN-2, block": 10.0, "train:GSPN-2, block": 50.0}
    found = {(it[1], it[0]): it[7] for it in tables.cells({"contenders": passes(**times)})}
    assert found["forward", "GSPN-2, scan"] == "4.00x"
    assert found["forward", "GSPN-2, sub-layer"] == "3.00x"
    assert found["forward", "GSPN-2, block"] == "2.00x"
    assert found["train", "GSPN-2, block"] == found["train", "GSPN-2, scan"] == ""


def test_what_was_not_counted_has_no_bandwidth() -> None:
    (it,) = passes(**{"image:GSPN-2": 5.0})
    (cells,) = tables.cells({"contenders": [it | {"bytes": 0, "flops": 0, "over_floor": None}]})
    assert cells[4:7] == ["-", "-", "-"]


def test_the_papers_figures_stand_beside_ours() -> None:
    """In every part that has any; and nothing stands where there is nothing to compare."""
    times = {"forward:baseline": 10.0, "forward:per-channel taps": 0.5, "forward:compact proxy": 0.25}
    rows = [{"case": "channels 256", "contenders": passes(**times)}]
    found = beside.table("sweep", rows)
    assert found is not None
    assert found.lines == [["channels 256", "forward", "27.4x", "20.0x", "-", "40.0x"]]
    assert beside.table("sweep", [{"case": "channels 16", "contenders": []}]) is None
    times = {"forward:SDPA flash": 9.0, "forward:SDPA cuDNN": 3.6, "forward:GSPN-2, scan": 0.1}
    times |= {"forward:attention, block": 20.0, "forward:GSPN-2, block": 10.0}
    found = beside.table("attention", [{"case": beside.SIGLIP, "contenders": passes(**times)}])
    assert found is not None
    assert found.lines[0] == ["module", "31.36", "0.174", "180.2x", "3.600", "0.100", "36.0x"], "the fastest"
    assert found.lines[1] == ["block", "63.08", "12.59", "5.0x", "20.00", "10.00", "2.0x"]
    rows = [{"case": "T, 224 pixels", "contenders": passes(**{"inference:gspn2_tiny": 4.0})}]
    found = beside.table("models", rows)
    assert found is not None
    assert found.lines[0] == ["GSPN-2-T", "1544", "2000"]
    assert beside.table("t2i", rows) is None


def test_every_section_of_the_document_can_be_linked_to() -> None:
    """GPUs first; a machine with several files has a title for each, and the method is told once."""
    text = document.text(list(documents()))
    titles = re.findall(r"^## (.*)$", text, re.MULTILINE)
    assert len(titles) == len(set(titles))
    assert re.findall(r"^- \[(.*)\]\(#", text, re.MULTILINE) == titles[1:]
    assert ["EPYC" in title for title in titles[1:]] == sorted("EPYC" in title for title in titles[1:])
    assert " ".join(text.split()).count("by device events around CUDA graphs") == 1


def test_a_baseline_that_is_far_from_the_released_kernel_is_told_at_the_top() -> None:
    content = next(documents())
    times = passes(**{"forward:baseline": 33.0}) + passes(**{"backward:baseline": 120.0})
    row = {"bench": "sweep", "case": "channels 64", "facts": {}}
    content = {**content, "cases": [{**row, "contenders": [it | {"released_ms": 80.0} for it in times]}]}
    told = "are off by as much, at sweep: channels 64, forward (0.41); sweep: channels 64, backward (1.50)."
    assert told in " ".join(document.text([content]).split())
    assert told in report.html(content, {})
    content["cases"][0]["contenders"] = [it | {"released_ms": it["ms"]} for it in times]
    assert tables.far(content) == ""


def test_a_contender_looks_the_same_in_every_panel() -> None:
    """Or the one legend above them names the wrong ones; also where others have no time."""
    pytest.importorskip("matplotlib")
    case = {"bench": "models", "facts": {"models": [], "pixels": 224}}
    compiled = {"inference, compiled:gspn2_tiny": 1.0, "inference, compiled:convnext": 2.0}
    compiled |= {"train, compiled, CUDA graphs:convnext": 2.0}
    eager = {f"inference:{name}": 3.0 for name in ("gspn2_tiny", "deit", "swin", "convnext")}
    small = {"inference:swin_small": 4.0, "inference:convnext_small": 5.0}
    found = {"T, compiled": compiled, "T, 224 pixels": eager, "S, 224 pixels": small}
    rows = [{**case, "case": name, "contenders": passes(**times)} for name, times in found.items()]
    picture = figures.models(rows)
    assert picture is not None
    assert len(picture.axes) == 4, "also of compiled training as CUDA graphs"
    lines = [line for axes in picture.axes for line in axes.get_lines()]
    looks = {line.get_label(): (line.get_color(), line.get_marker()) for line in lines}
    assert all(looks[line.get_label()] == (line.get_color(), line.get_marker()) for line in lines)
    assert len(set(looks.values())) == len(looks) == 6
