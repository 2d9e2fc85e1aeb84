"""`gspn2 bench attention`: a layer that is wrong in either pass gets no speed, ours or theirs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from bench_helpers import HOST, make_machine_small, rates, settings
from gspn2.backends import BACKENDS
from gspn2.backends import cpu as cpu_backend
from gspn2.bench import attention, runner
from gspn2.bench.attention import Layer
from gspn2.bench.case import Case

LAYER = Layer("small", 2, 32, 2, (5, 8), block=True)


@pytest.fixture(autouse=True)
def small_machine(threads: None, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    make_machine_small(monkeypatch)


def measured() -> dict[tuple[str, str], dict[str, Any]]:
    case = Case("attention", LAYER.name, {}, lambda device: attention.contenders(LAYER, HOST))
    rows = runner.Runner(settings()).run(case, rates())["contenders"]
    return {(it["name"], it.get("pass", "")): it for it in rows}


def wrong(found: dict[tuple[str, str], dict[str, Any]]) -> set[tuple[str, str]]:
    assert all(("ms" in it) == ("wrong" not in it) for it in found.values() if "absent" not in it)
    return {key for key, it in found.items() if "wrong" in it}


def test_every_pass_is_checked_and_timed() -> None:
    """Attention by its definition on the first tokens; ours by the reference, gradients too."""
    found = measured()
    assert wrong(found) == set()
    for what in ("sub-layer", "block"):
        assert found[f"attention, {what}", "forward"]["error_of"]["y"] < 1e-5
        assert found[f"GSPN-2, {what}", "train"]["error_of"]["gradients"] < 1e-5
    assert {key[0] for key, it in found.items() if "absent" in it} == {"SDPA cuDNN", "SDPA efficient"}


def test_attention_that_is_off_gets_no_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = F.scaled_dot_product_attention
    monkeypatch.setattr(
        F, "scaled_dot_product_attention", lambda *args, **kwargs: 1.01 * right(*args, **kwargs)
    )
    names = ("SDPA flash", "SDPA math", "attention, sub-layer", "attention, block")
    assert wrong(measured()) == {(name, "forward") for name in names}


@pytest.mark.parametrize("broken", ["propagate", "propagate_backward"])
def test_a_mixer_that_is_off_gets_no_speed(monkeypatch: pytest.MonkeyPatch, broken: str) -> None:
    right = getattr(cpu_backend, broken)

    def spoiled(*args: Any) -> Any:
        found = right(*args)
        return (
            1.01 * found
            if isinstance(found, torch.Tensor)
            else tuple(None if it is None else 1.01 * it for it in found)
        )

    monkeypatch.setattr(BACKENDS["cpu"], broken, spoiled)
    ours = [("GSPN-2, scan"), ("GSPN-2, sub-layer"), ("GSPN-2, block")]
    which = "forward" if broken == "propagate" else "train"
    assert {(name, which) for name in ours} <= wrong(measured())
