"""Mixers of vision encoders learn what the self-attentions do that they stand in for."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")

import vision_helpers as tiny
from gspn2.integrations.transformers import Distiller, is_mounted, unmount

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("name", ["ViT", "Siglip2Vision"])
def test_mixers_learn_what_attention_does(name):
    """Losses fall, the teacher stays, and padding is none of it."""
    cases = {
        "ViT": (tiny.encoder("ViT"), {"pixel_values": tiny.images((4, 4))}),
        "Siglip2Vision": (tiny.siglip2(), tiny.padded([(2, 5), (5, 2)], 12)),
    }
    teacher, inputs = cases[name]
    with torch.no_grad():
        before = teacher(**inputs).last_hidden_state
    distiller = Distiller(teacher)
    assert not is_mounted(teacher)
    learning = {id(p) for p in distiller.parameters() if p.requires_grad}
    assert learning == {id(p) for p in distiller.mixers.parameters()}
    optimizer = torch.optim.Adam(distiller.mixers.parameters(), lr=1e-2)
    losses = []
    for _ in range(12):
        found = distiller(**inputs)
        assert found.keys() == {"features", "output", "loss"}
        optimizer.zero_grad()
        found["loss"].backward()
        optimizer.step()
        losses.append(found["loss"].item())
    assert losses[-1] < 0.9 * losses[0]
    with torch.no_grad():
        assert torch.equal(teacher(**inputs).last_hidden_state, before)
        unmount(distiller.student)
        assert torch.equal(distiller.student(**inputs).last_hidden_state, before)
    with pytest.raises(ValueError, match="weights: expected some of features, output"):
        Distiller(teacher, {"feature": 1.0})


@pytest.mark.parametrize("name", ["SiglipVision", "DINOv3ViT"])
def test_a_teacher_goes_where_the_student_goes(name):
    """Also with what they do not share: attentions that were replaced, and buffers."""
    teacher = tiny.encoder(name)
    distiller = Distiller(teacher).double()
    tensors = [*teacher.parameters(), *teacher.buffers()]
    assert all(tensor.dtype == torch.float64 for tensor in tensors if tensor.is_floating_point())
    assert distiller(tiny.images((4, 4)).double())["loss"].isfinite()
    frozen = {id(p) for p in distiller.parameters() if not p.requires_grad}
    assert frozen <= {id(p) for p in teacher.parameters()}
    with pytest.raises(TypeError, match="teacher: expected a model, got str"):
        Distiller("vit")


def test_padding_does_not_count_in_what_is_learnt():
    inputs = tiny.padded([(2, 5), (3, 3)], 12)
    distiller = Distiller(tiny.siglip2(), zero_output=False)
    expected = distiller(**inputs)
    shorter = distiller(
        **{name: t[:, :10] if t.ndim > 1 and t.shape[1] > 2 else t for name, t in inputs.items()}
    )
    for name, loss in expected.items():
        torch.testing.assert_close(shorter[name], loss)
