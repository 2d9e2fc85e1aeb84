"""Result rows of `gpu.py` as compact text; `!` marks a number that misses its target."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

Row = dict[str, Any]


def cache_bytes(device: torch.device) -> int | None:
    """Second-level cache of a GPU."""
    if device.type == "cpu":
        return None
    return torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size


def text(section: str, rows: Sequence[Row]) -> str:
    """The section's table."""
    good = [row for row in rows if "error" not in row]
    table = _TABLES[section](good) if good else []
    widths = [max(len(line[i]) for line in table) for i in range(len(table[0]))] if table else []
    lines = [
        "  ".join(cell.ljust(width) if i == 0 else cell.rjust(width) for i, (cell, width) in enumerate(pairs))
        for pairs in (list(zip(line, widths, strict=True)) for line in table)
    ]
    copies = sorted(row["copy_gb_per_s"] for row in good if "copy_gb_per_s" in row)
    about = f", copy {copies[0]:.0f} to {copies[-1]:.0f} GB/s" if copies else ""
    missed = sum(not it["met"] for row in good for it in _judged(row))
    total = sum(1 for row in good for _ in _judged(row))
    without = f", {len(rows) - len(good)} cases without a speed" if len(good) < len(rows) else ""
    lines.insert(0, f"== {section}: {total - missed} of {total} targets met{without}{about}")
    lines += [
        f"NO SPEED {row['name']} {row.get('forced', '')}: {row['error'][:150]}"
        for row in rows
        if "error" in row
    ]
    return "\n".join(lines)


def _judged(row: Row) -> list[Row]:
    parts = [row, *(value for value in row.values() if isinstance(value, dict))]
    return [part for part in parts if "met" in part]


def _name(row: Row, *without: str) -> str:
    words = [word for word in row["name"].split() if word not in without]
    return " ".join(words)


def _plan(row: Row) -> str:
    plans = row.get("plans", {})
    return "/".join(dict.fromkeys(plan["variant"] for plan in plans.values())) or "-"


def _mark(it: Row, shown: str) -> str:
    return shown + ("!" if it.get("met") is False else " ")


def _share(it: Row) -> str:
    return _mark(it, f"{100 * it['share']:.1f}%") if it else "-"


def _time(it: Row) -> str:
    us = it["us"]
    return _mark(it, f"{us:.1f}" if us < 1000 else f"{us:.0f}")


def _by_direction(
    rows: Sequence[Row], cells: Callable[[Row], list[str]]
) -> list[tuple[str, dict[str, list[str]]]]:
    """One entry for each problem and variant; cells by direction."""
    found: dict[str, dict[str, list[str]]] = {}
    for row in rows:
        direction = row["directions"][0]
        key = f"{_name(row, direction, 'planes')} {_plan(row)}"
        found.setdefault(key, {})[direction] = cells(row)
    return list(found.items())


def _line_scan(rows: Sequence[Row]) -> list[list[str]]:
    names = ["down", "up", "right", "left"]
    table = [["forward, share of copy", *names, "down us", "right us"]]
    grouped = _by_direction(rows, lambda row: [_share(row["forward"]), _time(row["forward"])])
    for name, cells in grouped:
        shares = [cells[direction][0] if direction in cells else "-" for direction in names]
        times = [cells[d][1].rstrip("! ") if d in cells else "-" for d in ("down", "right")]
        table.append([name, *shares, *times])
    return table


def _gspn1(rows: Sequence[Row]) -> list[list[str]]:
    passes, names = ("forward", "backward"), ("down", "right")
    heads = [f"{d} {w}" for d in names for w in ("fwd", "bwd")]
    table = [["factor over GSPN-1; us", *heads, *(f"{head} us" for head in heads)]]
    grouped = _by_direction(
        rows,
        lambda row: (
            [_mark(row[w], f"{row[w]['factor']:.1f}x") for w in passes]
            + [f"{row[w]['us']:.1f}" for w in passes]
        ),
    )
    for name, cells in grouped:
        absent = ["-"] * 4
        factors = [cell for d in names for cell in cells.get(d, absent)[:2]]
        times = [cell for d in names for cell in cells.get(d, absent)[2:]]
        table.append([name, *factors, *times])
    return table


def _by_case(rows: Sequence[Row]) -> list[list[str]]:
    table = [["share of copy; us; us a line", "fwd", "fwd us", "a line", "bwd", "bwd us", "a line", "plan"]]
    for row in rows:
        cells = []
        for it in (row["forward"], row.get("backward")):
            shown = it or {}
            plain = {key: value for key, value in shown.items() if key != "met"}
            about_time = shown.get("target", {}).get("metric") in ("us", "over_floor")
            cells += [_share(plain if about_time else shown)]
            cells += [_time(shown if about_time else plain), f"{it['us_per_line']:.3f}"] if it else ["-", "-"]
        table.append([_name(row), *cells, _plan(row)])
    return table


def _calls(rows: Sequence[Row]) -> list[list[str]]:
    table = [["us", "eager", "with grad", "and backward", "kernel", "one replay", "over kernel", "profiler"]]
    for row in rows:
        replay = row.get("replay")
        cells = [_time(row["eager"]), _time(row["eager_with_grad"]), _time(row["forward_and_backward"])]
        if replay:
            cells += [
                _time(row["kernel"]),
                f"{replay['us']:.1f}",
                _mark(replay, f"{replay['over_kernel_us']:.1f}"),
            ]
            cells += [f"{row['profiler_us']:.1f}" if row["profiler_us"] else "-"]
        table.append([_name(row), *cells, *["-"] * (7 - len(cells))])
    return table


def _memory(rows: Sequence[Row]) -> list[list[str]]:
    table = [["MB", "inputs", "outputs", "scratch", "peak over tensors", "extra over inputs + gradients"]]
    for row in rows:
        sizes = [f"{row[key] / 1e6:.1f}" for key in ("inputs_bytes", "outputs_bytes", "scratch_bytes")]
        ratio = _mark(row, f"{row['peak_over_tensors']:.3f}")
        table.append([_name(row), *sizes, ratio, f"{row['extra_over_inputs_and_gradients']:.3f}"])
    return table


_TABLES: dict[str, Callable[[Sequence[Row]], list[list[str]]]] = {
    "line_scan": _line_scan,
    "gspn1": _gspn1,
    "propagate": _by_case,
    "few_planes": _by_case,
    "models": _by_case,
    "calls": _calls,
    "memory": _memory,
}
