"""`gspn2 bench t2i`: what is composed is marked, what is wrong gets no speed, what is absent is told."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from gspn2.bench import ahead, document, figures, rates, report, runner, t2i
from gspn2.bench.measure import Work
from gspn2.bench.results import Row, find, timed
from gspn2.bench.t2i_image import DIRECT, IMAGE, PROGRESSIVE, SHORTENED, Setting
from gspn2.bench.t2i_sdxl import SDXL, TINY
from gspn2.bench.t2i_step import ATTENTION, CUT, MIXERS, STEP, composed, layer_pass, self_attentions
from gspn2.integrations.diffusers.untrained import make_unet

pytestmark = pytest.mark.usefixtures("one_thread")
HOST = torch.device("cpu")


@pytest.fixture
def measure(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs a case once, quickly."""
    monkeypatch.setattr(rates, "copy", lambda device: Work(lambda _: torch.ones(64).clone()))
    monkeypatch.setattr(rates, "COPY_BYTES", 2**16)
    settings = runner.Settings(HOST, rounds=1, seconds=0.0)
    fast = {"fastest_gb_per_s": 1.0, "matrix_tflop_per_s": 1.0}
    return lambda case: runner.Runner(settings).run(case, dict(fast))


def row(case: str, found: Row) -> Row:
    facts = {"model": TINY.name, "pixels": 64}
    return {"bench": "t2i", "case": case, "facts": facts, "commit": "abc", "seconds": 1.0, **found}


def test_a_step_three_ways(measure: Any) -> None:
    found = row("step, 64 pixels", measure(t2i._case(TINY, 64, 1.0)))
    assert [it["name"] for it in timed(found)] == [ATTENTION, MIXERS, CUT]
    ours = find(found, MIXERS, STEP)
    assert ours is not None
    assert set(ours["error_of"]) == {"mixer of 64 channels", "mixer of 128 channels"}
    assert ours["flops"] > find(found, CUT, STEP)["flops"]  # type: ignore[index]
    assert document._t2i([found]).splitlines()[2].startswith("| 64 pixels | step | ")
    assert figures.t2i([found]) is not None


def test_a_mixer_that_is_off_gets_no_speed(measure: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from gspn2.integrations.diffusers.mixers import AttentionMixer

    right = AttentionMixer.forward

    def spoiled(self: AttentionMixer, *args: Any, **kwargs: Any) -> torch.Tensor:
        y = right(self, *args, **kwargs)
        return y if self.tokens.mixer.backend == "reference" else y * 1.01

    monkeypatch.setattr(AttentionMixer, "forward", spoiled)
    found = measure(t2i._case(TINY, 64, 1.0))
    wrong = [it for it in found["contenders"] if "wrong" in it]
    assert [(it["name"], "mixer of 64 channels" in it["wrong"]) for it in wrong] == [(MIXERS, True)]
    assert find(found, MIXERS, STEP) is None


def test_without_diffusers_it_says_so(measure: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(t2i, "find_spec", lambda name: None)
    found = measure(t2i._case(TINY, 64, 1.0))
    assert {it["absent"] for it in found["contenders"]} == {
        'diffusers is not installed: pip install "gspn2[diffusers]"'
    }


def test_a_picture_with_evaluations_left_out(measure: Any) -> None:
    """The direct pass follows from a step, the progressive one from a shorter one."""
    case = t2i._case(TINY, 256, 1.0, Setting(256, evaluations=2, from_side=256, steps=8))
    found = row(case.name, measure(case))
    assert not [it for it in found["contenders"] if "wrong" in it]
    direct, ours = find(found, DIRECT, IMAGE), find(found, PROGRESSIVE, IMAGE)
    step, short = find(found, ATTENTION, STEP), find(found, PROGRESSIVE, SHORTENED)
    assert None not in (direct, ours, step, short)
    assert 100 * step["ms"] < direct["ms"] < 100 * step["ms"] + short["ms"]  # type: ignore[index]
    assert ours["ms"] > short["ms"]
    assert "1 x " in ours["note"], "3 of the second stage's evaluations, of which 2 were run"
    text = document._t2i([found])
    assert text.count("*") >= 3
    assert "composed: 100 x" in text
    ((_, told),) = report.headlines([found])
    assert told.startswith("as fast as 50 steps with attention")


def test_the_step_of_large_pictures_is_composed_of_layers() -> None:
    rows = [composed(CUT, STEP, 50.0, "x"), composed(ATTENTION, layer_pass(640), 7.0, "x")]
    case = t2i._case(SDXL, 16384, 1.0)
    assert case.derive(rows) == []
    rows.append(composed(ATTENTION, layer_pass(1280), 2.0, "x"))
    (found,) = case.derive(rows)
    assert found["ms"] == 50.0 + 10 * 7.0 + 60 * 2.0
    assert found["note"] == "composed: 50.0 ms without self-attention + 10 x 7.0 ms + 60 x 2.0 ms"


@pytest.mark.parametrize("shape", [SDXL, TINY])
def test_self_attentions_are_counted_from_the_configuration(shape: Any) -> None:
    unet = make_unet(shape.unet, torch.device("meta"), torch.float32)
    dims = [module.query_dim for _, module in self_attentions(unet)]
    assert {dim: dims.count(dim) for dim in dims} == shape.self_attentions


def test_kernels_of_all_stages_are_known_before_the_run() -> None:
    from gspn2.backends.cuda.geometry import Device

    case = t2i._case(TINY, 256, 1.0, Setting(256), steps=())
    one = t2i._case(TINY, 64, 1.0)
    assert ahead.kernels([case], Device())
    assert ahead.kernels([one], Device())
