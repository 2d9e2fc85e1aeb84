"""Tiles of an autoencoder: parts of one picture, however it is cut."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

import diffusion_helpers as tiny
from gspn2.integrations.diffusers import vae as module
from gspn2.integrations.diffusers.memory import PeakMemory, peak_of
from gspn2.integrations.diffusers.vae import TiledVae

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def vae():
    """Norms with their own weights, and an attention that matters."""
    made = tiny.vae(block_out_channels=(8, 8, 16, 16))
    generator = torch.Generator().manual_seed(5)
    for name, parameter in made.named_parameters():
        if "norm" in name and name.endswith("bias"):
            parameter.data.normal_(generator=generator)
        if "attentions" in name and name.endswith("weight") and "norm" not in name:
            parameter.data.mul_(6)
    return made


def latents(height, width):
    generator = torch.Generator().manual_seed(height + width)
    ramp = torch.linspace(-2, 2, width).expand(1, 4, height, width)
    return torch.randn(1, 4, height, width, generator=generator) + ramp


def decoded(vae, x, tile):
    return torch.cat(list(TiledVae(vae, tile).decode(x)), dim=2)


def whole(vae, x):
    with torch.no_grad():
        return vae.decode(x / vae.config.scaling_factor).sample


@pytest.mark.parametrize("size", [(24, 20), (9, 33)])
def test_decoding_in_tiles_is_decoding(vae, size):
    x = latents(*size)
    expected = whole(vae, x)
    for tile in (8, 13, 64):
        torch.testing.assert_close(decoded(vae, x, tile), expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("size", [(24, 20), (9, 33)])
def test_encoding_in_tiles_is_encoding(vae, size):
    generator = torch.Generator().manual_seed(1)
    image = torch.rand(1, 3, 8 * size[0], 8 * size[1], generator=generator) * 2 - 1
    with torch.no_grad():
        expected = vae.encode(image).latent_dist.mode() * vae.config.scaling_factor
    for tile in (8, 13, 64):
        torch.testing.assert_close(TiledVae(vae, tile).encode(image), expected, atol=2e-5, rtol=1e-4)


@pytest.fixture
def small_survey(monkeypatch):
    """A survey that sees part of these small pictures only, as it does of a large one."""
    monkeypatch.setattr(module, "SURVEY_AREA", 400)
    monkeypatch.setattr(module, "SURVEY_CROP", 10)
    monkeypatch.setattr(module, "SURVEY_MARGIN", 3)
    monkeypatch.setattr(module, "SURVEY_KEYS", 50)


@pytest.mark.usefixtures("small_survey")
def test_memory_without_data_is_that_of_all_tiles(vae):
    """Few of the tiles are run for it, and those with most beside them."""
    x = latents(6, 150)
    kept = copy.deepcopy(vae).to("meta")
    runs = []
    kept.decoder.register_forward_pre_hook(lambda *_: runs.append(1))
    tiled, shadow = TiledVae(vae, 6), TiledVae(kept, 6)
    with PeakMemory() as real:
        strips = [strip.shape for strip in tiled.decode(x)]
    assert [strip.shape for strip in shadow.decode(x.to("meta"))] == strips
    assert len(runs) < 12 < 25
    foreseen = peak_of(lambda: [strip.shape for strip in shadow.decode(x.to("meta"))])
    assert real.peak <= foreseen <= 1.01 * real.peak


@pytest.mark.usefixtures("small_survey")
def test_memory_of_huge_pictures_takes_few_operators(vae):
    """A picture with 10000 times the tiles takes twice as many, not 10000 times."""

    class Counted(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.count += 1
            return func(*args, **(kwargs or {}))

    counts = []
    for side in (80, 8000):
        x = torch.empty(1, 4, side, side, device="meta")
        with Counted() as counted:
            rows = sum(strip.shape[2] for strip in TiledVae(copy.deepcopy(vae).to("meta"), 16).decode(x))
        assert rows == 8 * side
        counts.append(counted.count)
    assert counts[1] < 2 * counts[0]


@pytest.mark.usefixtures("small_survey")
def test_beyond_the_survey_the_cut_does_not_show(vae):
    """No seams: two ways to cut give the same pixels. Tiles that each see only themselves do not."""
    x = latents(40, 30)
    first, second = decoded(vae, x, 10), decoded(vae, x, 16)
    torch.testing.assert_close(first, second, atol=2e-5, rtol=1e-4)
    # Tiles that see only themselves, margin or not, depend on the cut.
    apart = [torch.cat([whole(vae, part) for part in x.split(rows, dim=2)], dim=2) for rows in (10, 20)]
    assert (apart[0] - apart[1]).abs().max() > 0.1
    image = torch.nn.functional.interpolate(x[:, :3], scale_factor=8, mode="bicubic")
    torch.testing.assert_close(
        TiledVae(vae, 10).encode(image), TiledVae(vae, 16).encode(image), atol=2e-5, rtol=1e-4
    )


@pytest.mark.usefixtures("small_survey")
@pytest.mark.parametrize("size", [(40, 30), (21, 20), (3, 200), (200, 3), (37, 401)])
def test_a_survey_is_spread_over_the_picture(size):
    height, width = size
    crops, counted = module._survey_crops(height, width)
    area = sum((crop.bottom - crop.top) * (crop.right - crop.left) for crop in crops)
    assert area <= 400
    assert len({(crop.bottom - crop.top, crop.right - crop.left) for crop in crops}) == 1
    for crop, part in zip(crops, counted, strict=True):
        assert 0 <= crop.top <= part.top < part.bottom <= crop.bottom <= height
        assert 0 <= crop.left <= part.left < part.right <= crop.right <= width
    # The crops' centre is the picture's.
    assert abs(sum(crop.left + crop.right for crop in crops) / len(crops) - width) <= 2
    assert abs(sum(crop.top + crop.bottom for crop in crops) / len(crops) - height) <= 2


def test_the_vae_is_left_as_it_was(vae):
    x = latents(12, 12)
    before = whole(vae, x)
    next(TiledVae(vae, 6).decode(x)).sum()
    tiled = TiledVae(vae, 6).decode(x)
    next(tiled)
    tiled.close()
    assert torch.equal(whole(vae, x), before)


def test_float16_is_upcast_where_it_overflows():
    half = tiny.vae(force_upcast=True).half()
    strips = list(TiledVae(half, 6).decode(latents(12, 8)))
    assert {strip.dtype for strip in strips} == {torch.float32}
    assert half.dtype == torch.float16
    assert torch.cat(strips, dim=2).isfinite().all()


def test_bfloat16_is_as_good_as_untiled(vae):
    import copy

    exact = whole(vae, latents(20, 12))
    low = copy.deepcopy(vae).bfloat16()
    tiled = decoded(low, latents(20, 12), 8).float()
    with torch.no_grad():
        untiled = low.decode(latents(20, 12).bfloat16() / low.config.scaling_factor).sample.float()
    assert (tiled - exact).abs().max() <= 2 * (untiled - exact).abs().max()


def test_progress_and_bad_arguments(vae):
    seen = []
    list(TiledVae(vae, 8, progress=lambda done, total: seen.append((done, total))).decode(latents(10, 20)))
    assert seen == [(i, 6) for i in range(1, 7)]
    with pytest.raises(ValueError, match="tile"):
        TiledVae(vae, 0)
    with pytest.raises(ValueError, match="multiples of 8"):
        TiledVae(vae).encode(torch.zeros(1, 3, 16, 20))
