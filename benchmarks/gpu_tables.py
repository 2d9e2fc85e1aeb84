"""The tables of what `gpu.py` measured, for `tables.py`: one for each section, and all targets in one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import markdown_table as md

Result = dict[str, Any]
Case = dict[str, Any]

MISSED = " (missed)"
_PASSES = ("forward", "backward")
_BYTES = (
    "Shares are of the bandwidth of a large copy, timed in turn within the same run; bytes are counted as "
    "every input read once and every output written once."
)


def _good(result: Result) -> list[Case]:
    return [case for case in result["cases"] if "error" not in case]


def _failed(result: Result) -> str:
    names = [case["name"] for case in result["cases"] if "error" in case]
    return f" Without a result: {', '.join(names)}." if names else ""


def _cell(it: Case | None, text: Callable[[Case], str]) -> str:
    if it is None:
        return "-"
    return text(it) + (MISSED if it.get("met") is False else "")


def _share(it: Case) -> str:
    return md.percent(it["share"])


def _by_direction(cases: Iterable[Case]) -> dict[tuple[str, str, str], dict[str, Case]]:
    found: dict[tuple[str, str, str], dict[str, Case]] = {}
    for case in cases:
        key = (md.size(case["size"]), case["dtype"], case["taps"])
        found.setdefault(key, {})[case["directions"][0]] = case
    return found


def line_scan(result: Result) -> str:
    """Shares of copy bandwidth of single directions."""
    names = ("down", "up", "right", "left")
    rows = []
    for key, cases in _by_direction(_good(result)).items():
        shares = [_cell(cases[name]["forward"] if name in cases else None, _share) for name in names]
        rows.append([*key, md.ms(cases["down"]["forward"]["ms"]) if "down" in cases else "-", *shares])
    heads = ["B, C, H, W", "dtype", "taps", "down, ms", *names]
    text = f"`line_scan`, forward, planes. {_BYTES}{_failed(result)}"
    return md.table(heads, rows, left=3) + md.note(result, text)


def gspn1(result: Result) -> str:
    """Times beside those of GSPN-1's kernel."""
    rows = []
    for (size, dtype, _), cases in _by_direction(_good(result)).items():
        some = next(iter(cases.values()))
        row = [size, dtype]
        for which in _PASSES:
            row.append(md.ms(some[which]["gspn1_ms"]))
            for direction in ("right", "down"):
                it = cases[direction][which] if direction in cases else None
                row.append(_cell(it, lambda it: f"{md.short_ms(it['ms'])} ({md.times(it['factor'])})"))
        rows.append(row)
    heads = ["B, C, H, W", "dtype"]
    for which in _PASSES:
        heads += [f"GSPN-1 {which}, ms", "right", "down"]
    text = (
        "`line_scan`, per-channel taps, planes: milliseconds, and how many times faster than GSPN-1, which "
        f"scans to the right. GSPN-1's times: {result['gspn1_source']}.{_failed(result)}"
    )
    return md.table(heads, rows, left=2) + md.note(result, text)


def _layout(case: Case) -> str:
    return "planes" if case["layout"] == "planes" else "channels innermost"


def propagate(result: Result) -> str:
    """Four directions at once on large images."""
    rows = []
    for case in _good(result):
        options = md.yes(case["lam_and_gate"]) + (", states kept" if "kept_states" in case else "")
        row = [md.size(case["size"]), _layout(case), case["taps"], options]
        for which in _PASSES:
            row += [md.ms(case[which]["ms"]), _cell(case[which], _share)]
        rows.append(row)
    heads = ["B, C, H, W", "layout", "taps", "lam, gate"]
    for which in _PASSES:
        heads += [f"{which}, ms", "share of copy"]
    text = f"`propagate`, four directions, bfloat16. {_BYTES}{_failed(result)}"
    return md.table(heads, rows, left=4) + md.note(result, text)


def few_planes(result: Result) -> str:
    """Where time for each line is the limit."""
    rows = []
    for case in _good(result):
        names = case["directions"]
        row = [md.size(case["size"]), case["dtype"], names[0] if len(names) == 1 else "four", _layout(case)]
        row.append(_cell(case["forward"], lambda it: md.us(it["us"])))
        row += [f"{1e3 * case['forward']['us_per_line']:.0f}", f"{case['forward']['target']['value']:g}"]
        rows.append([*row, md.us(case["backward"]["us"])])
    heads = ["B, C, H, W", "dtype", "directions", "layout", "forward, us", "ns a line", "target, us"]
    text = (
        "One direction: `line_scan` with per-channel taps; four: `propagate` with shared taps, lam and gate. "
        "A launch in a CUDA graph of many, input sets in rotation so that none is in the cache."
        f"{_failed(result)}"
    )
    return md.table([*heads, "backward, us"], rows, left=4) + md.note(result, text)


def models(result: Result) -> str:
    """What the mixers of a backbone ask for."""
    rows = []
    for case in _good(result):
        row = [md.size(case["size"])]
        for which in _PASSES:
            it = case[which]
            row += [_cell(it, lambda it: md.us(it["us"])), md.us(it["copy_us"]), f"{it['over_floor']:.2f}"]
        rows.append(row)
    heads = ["B, C, H, W"]
    for which in _PASSES:
        heads += [f"{which}, us", "copy, us", "over the floor"]
    text = (
        "`propagate`, four directions, shared taps, lam and gate, channels innermost, bfloat16. The floor is "
        "the larger of 6 us and the time in which as many bytes are copied; the target is 1.5 times that."
        f"{_failed(result)}"
    )
    return md.table(heads, rows) + md.note(result, text)


def calls(result: Result) -> str:
    """The host's part."""
    rows = []
    for case in _good(result):
        eager = _cell(case["eager"], lambda it: md.us(it["us"]))
        row = [md.size(case["size"]), _layout(case), eager, md.us(case["eager_with_grad"]["us"])]
        row += [md.us(case["forward_and_backward"]["us"]), md.us(case["kernel"]["us"])]
        rows.append([*row, _cell(case["replay"], lambda it: f"{it['over_kernel_us']:.1f}")])
    heads = ["B, C, H, W", "layout", "eager", "with grad", "with grad, and backward", "kernel"]
    text = (
        "Microseconds; `propagate`, four directions, shared taps, lam and gate, bfloat16. Eager: time on the "
        "host until the call returns. Kernel: one of many launches in a CUDA graph; the last column is what "
        f"replaying a graph of a single call takes beyond that.{_failed(result)}"
    )
    return md.table([*heads, "replay, beyond the kernel"], rows, left=2) + md.note(result, text)


def memory(result: Result) -> str:
    """The most that a training step holds."""
    rows = []
    for case in _good(result):
        operator = f"`{case['operator']}`" + (", lam and gate" if case["lam_and_gate"] else "")
        sizes = [f"{case[key] / 1e6:.0f} MB" for key in ("inputs_bytes", "outputs_bytes", "scratch_bytes")]
        ratio = _cell(case, lambda it: f"{it['peak_over_tensors']:.3f}")
        row = [md.size(case["size"]), case["dtype"], _layout(case), case["taps"], operator, *sizes, ratio]
        rows.append([*row, f"{case['extra_over_inputs_and_gradients']:.2f}"])
    heads = ["B, C, H, W", "dtype", "layout", "taps", "operator", "inputs and dy", "y and gradients"]
    heads += ["beyond these", "peak over all tensors", "extra over inputs and gradients"]
    text = f"Forward and backward through autograd, the allocator's peak.{_failed(result)}"
    return md.table(heads, rows, left=5) + md.note(result, text)


@dataclass(frozen=True)
class Goal:
    """One line of the summary.

    Args:
        what: in words.
        section: whose results show it.
        part: "forward", "backward", ...; "" for the case itself.
        among: whether a case belongs to it.
        short: is it in the README's table, too?
    """

    what: str
    section: str
    part: str
    among: Callable[[Case], bool] = lambda case: True
    short: bool = False


def _scan(what: str, taps: str, directions: Sequence[str], short: bool = False) -> Goal:
    among = lambda case: case["taps"] == taps and case["directions"][0] in directions  # noqa: E731
    return Goal(what, "line_scan", "forward", among, short)


def _is_first(case: Case) -> bool:
    """The first row of GSPN-1's table, which has a target of its own."""
    return case["size"] == [16, 8, 1024, 1024] and case["dtype"] == "bfloat16"


def goals() -> list[Goal]:
    """Every target of the operator on a GPU."""
    found = [
        _scan("`line_scan`, taps for each channel, down and up", "per-channel", ("down", "up"), True),
        _scan("`line_scan`, taps for each channel, right and left", "per-channel", ("right", "left"), True),
        _scan("`line_scan`, shared taps, each direction", "shared", ("down", "up", "right", "left")),
    ]
    for taps in ("shared", "per-channel"):
        for which in _PASSES:
            what = f"`propagate`, four directions, {taps} taps, {which}"
            among = lambda case, taps=taps: case["taps"] == taps and "kept_states" not in case  # noqa: E731
            found.append(Goal(what, "propagate", which, among, taps == "shared"))
    for which in _PASSES:
        found.append(Goal(f"over GSPN-1 at 16, 8, 1024, 1024, {which}", "gspn1", which, _is_first, True))
        found.append(Goal(f"over GSPN-1, all others, {which}", "gspn1", which, lambda c: not _is_first(c)))
    for size in ([1, 8, 1024, 1024], [1, 32, 128, 128], [1, 32, 64, 64], [1, 8, 64, 64]):
        four = "four directions" if size == [1, 8, 64, 64] else "one direction"
        what = f"few planes: {md.size(size)}, {four}"
        among = lambda case, size=size: case["size"] == size  # noqa: E731
        found.append(Goal(what, "few_planes", "forward", among, size == [1, 8, 1024, 1024]))
    return [
        *found,
        *(Goal(f"sizes of models, time over the floor, {w}", "models", w, short=True) for w in _PASSES),
        Goal("an eager call, time on the host", "calls", "eager", short=True),
        Goal("a replayed CUDA graph, beyond the kernel", "calls", "replay"),
        Goal("memory of training: peak over all tensors", "memory", "", short=True),
    ]


def summary(results: dict[str, Result], short: bool = False) -> str:
    """Every target, the range that was measured, and whether it is met."""
    rows = []
    for goal in goals():
        if short and not goal.short:
            continue
        cases = [case for case in _good(results[goal.section]) if goal.among(case)]
        parts = [case[goal.part] if goal.part else case for case in cases]
        if not parts:
            rows.append([goal.what, "-", "-", "no result"])
            continue
        target, met = parts[0]["target"], sum(part["met"] for part in parts)
        values = sorted(part[target["metric"]] for part in parts)
        ends = [_amount(target["metric"], value) for value in (values[0], values[-1])]
        span = ends[0] if ends[0] == ends[1] else f"{ends[0]} to {ends[1]}"
        verdict = "yes" if met == len(parts) else f"{met} of {len(parts)} cases"
        rows.append([goal.what, _amount(target["metric"], target["value"]), span, verdict])
    text = "Percentages are of copy bandwidth; both layouts, with and without lam and gate, where there are."
    commits = dict.fromkeys(result["machine"]["commit"] for result in results.values())
    if len(commits) > 1:
        text += f" Sections were measured at commits {', '.join(commits)}."
    text += "".join(_failed(result) for result in results.values())
    last = max(results.values(), key=lambda result: result["machine"]["date"])
    return md.table(["", "target", "measured", "met"], rows, words=(3,)) + md.note(last, text)


def _amount(metric: str, value: float) -> str:
    if metric == "share":
        return md.percent(value)
    if metric == "factor":
        return md.times(value)
    return f"{value:.2f}" if metric in ("over_floor", "peak_over_tensors") else f"{md.us(value)} us"


SECTIONS: dict[str, Callable[[Result], str]] = {
    "line_scan": line_scan,
    "gspn1": gspn1,
    "propagate": propagate,
    "few_planes": few_planes,
    "models": models,
    "calls": calls,
    "memory": memory,
}
PICTURE = "Shares of copy bandwidth of large problems, and times beside GSPN-1's kernel"
SUMMARIES = ("summary", "summary-compact")
NAMES = (*SECTIONS, *SUMMARIES)


def needs(name: str) -> tuple[str, ...]:
    """Sections whose results the table is made from."""
    return tuple(SECTIONS) if name in SUMMARIES else (name,)


def make(name: str, results: dict[str, Result]) -> str:
    """The table called `name`, from the results of the sections that it needs."""
    if name in SUMMARIES:
        return summary(results, short=name.endswith("-compact"))
    return SECTIONS[name](results[name])


def absent(name: str) -> str:
    """What stands in the place of a table that nobody has measured yet."""
    sections = "" if name in SUMMARIES else f" {name}"
    return f"*Not measured yet: `python benchmarks/gpu.py{sections}` on a GPU fills this table.*\n"
