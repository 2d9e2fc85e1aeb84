"""Markdown tables, the note under each, and how numbers are written in them."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from typing import Any

Result = dict[str, Any]

_UNBROKEN = "\0"  # stands for a space where no line may be broken


def table(
    heads: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1, words: Sequence[int] = ()
) -> str:
    """Numbers to the right, the first `left` columns and those in `words` to the left."""
    rule = ["---" if i < left or i in words else "---:" for i in range(len(heads))]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (heads, rule, *rows))


def note(result: Result, text: str) -> str:
    """What the table shows, and what it was measured on, with and how."""
    on = result["machine"]
    commit = f"commit {on['commit']}" + (" with uncommitted changes" if on["uncommitted_changes"] else "")
    command = on["command"].replace(" ", _UNBROKEN)
    facts = ", ".join([*_where(on), commit, on["date"]])
    lines = textwrap.fill(
        f"{text} Measured on {facts}: `{command}`.", 118, break_long_words=False, break_on_hyphens=False
    )
    return f"\n{lines.replace(_UNBROKEN, ' ')}\n"


def _where(on: Result) -> list[str]:
    """The machine and the versions that matter there."""
    python = [f"Python {on['python']}", f"PyTorch {on['torch']}"]
    if "device" in on:
        tools = [f"{name} {on[name]}" for name in ("cuda-core", "nvidia-cuda-nvrtc") if on.get(name)]
        return [
            f"{on.get('gpus', 'one')} {on['device']}",
            f"driver {on['driver']}",
            f"CUDA {on['cuda']}",
            *python,
            *tools,
        ]
    tools = [f"{name} {on[name]}" for name in ("numba", "timm") if name in on]
    return [on["processor"], f"{on['threads']} threads", on["system"], *python, *tools]


def size(sizes: Sequence[int]) -> str:
    return ", ".join(str(n) for n in sizes)


def yes(value: bool) -> str:
    return "yes" if value else "no"


def ms(value: float) -> str:
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:.0f}"


def short_ms(value: float) -> str:
    """Milliseconds where they may be few: three digits at least."""
    return f"{value:.4f}" if value < 0.1 else f"{value:.3f}" if value < 1 else f"{value:.2f}"


def us(value: float) -> str:
    return f"{value:.1f}" if value < 100 else f"{value:.0f}"


def seconds(value: float) -> str:
    return f"{1e3 * value:.0f} ms" if value < 0.1 else f"{value:.2f} s" if value < 10 else f"{value:.1f} s"


def times(value: float) -> str:
    return f"{value:.1f}x"


def percent(value: float) -> str:
    return f"{100 * value:.1f}%"


def or_none(text: Callable[[float], str], value: float | None) -> str:
    return "-" if value is None else text(value)
