"""Less memory for a UNet, and how much it will be."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from diffusers import UNet2DConditionModel

import diffusion_helpers as tiny
from gspn2.integrations.diffusers import mount
from gspn2.integrations.diffusers.execution import frugal, graphed
from gspn2.integrations.diffusers.memory import PeakMemory, bytes_of, peak_of
from gspn2.integrations.diffusers.stages import Stage, direct, progressive

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(params=["sdxl", "sd15"])
def unet(request):
    made = tiny.sdxl_unet() if request.param == "sdxl" else tiny.sd15_unet()
    mount(made, zero_output=False)
    return made


def test_one_by_one_and_in_runs_is_the_same(unet):
    given = tiny.inputs(unet, 12, 20)
    batches, lengths = [], []

    def note(module, args, output):
        batches.append(args[0].shape[0])
        lengths.append(args[0].shape[1])

    block = unet.mid_block.attentions[0].transformer_blocks[0]
    with torch.no_grad():
        expected = unet(**given).sample
        with frugal(unet, tokens=7):
            block.ff.net[2].register_forward_hook(note)
            assert torch.equal(unet(**given).sample, unet(**given, return_dict=False)[0])
            torch.testing.assert_close(unet(**given).sample, expected, atol=1e-5, rtol=1e-4)
        assert set(batches) == {1}
        assert max(lengths) == 7
        assert torch.equal(unet(**given).sample, expected)
    assert not any("forward" in module.__dict__ for module in unet.modules())


def test_graphs_need_a_gpu(unet):
    given = tiny.inputs(unet, 8, 8, batch=1)
    with torch.no_grad(), graphed(unet):
        unet(**given)
        with pytest.raises(ValueError, match="expected on a CUDA device, for its graphs, got cpu"):
            unet(**given)
    assert "forward" not in unet.__dict__


def test_tensors_alive_are_counted():
    before = torch.zeros(1000)
    with PeakMemory() as memory:
        a = torch.zeros(100)
        b = (before[:50] + 1).view(5, 10)
        c = a * 2
        del a
        assert (memory.live, memory.peak) == (4 * 150, 4 * 250)
        before.add_(1)
        c = c[:10]
        assert (memory.live, memory.peak) == (4 * 150, 4 * 250)
        del b, c
        assert memory.live == 0


def test_the_peak_without_data_is_the_peak_with(unet):
    """The same code on "meta" and on the CPU keeps the same tensors alive."""
    given = tiny.inputs(unet, 24, 16, batch=1)
    with torch.no_grad(), frugal(unet, tokens=50), PeakMemory() as real:
        unet(**given)
    with torch.device("meta"):
        shadow = UNet2DConditionModel.from_config(unet.config)
    mount(shadow)
    given = {
        name: {key: each.to("meta") for key, each in value.items()} if isinstance(value, dict) else value
        for name, value in given.items()
    }
    given = {name: value.to("meta") if torch.is_tensor(value) else value for name, value in given.items()}
    with frugal(shadow, tokens=50):
        foreseen = peak_of(lambda: shadow(**given))
    assert bytes_of(shadow) == bytes_of(unet)
    # Attention on a CPU may lay out its operands anew; fused kernels do not.
    assert foreseen <= real.peak <= 1.1 * foreseen


def test_runs_beyond_the_second_take_no_more_memory():
    """With data all of them are run, without only those that can be the worst."""
    unet = tiny.sdxl_unet()
    feed_forward = unet.mid_block.attentions[0].transformer_blocks[0].ff
    runs = []
    feed_forward.net[0].register_forward_pre_hook(lambda *_: runs.append(1))
    x = torch.randn(1, 1000, 64)
    with frugal(unet, tokens=90):
        with torch.no_grad(), PeakMemory() as real:
            feed_forward(x)
        assert len(runs) == 12
        feed_forward.to("meta")
        shadow = x.to("meta")
        assert peak_of(lambda: feed_forward(shadow)) == real.peak
        assert len(runs) == 14


def test_attention_is_counted_without_its_matrix():
    query = torch.empty(1, 2, 4096, 8, device="meta")

    def attend():
        torch.nn.functional.scaled_dot_product_attention(query, query, query)

    assert peak_of(attend) == query.numel() * 4


def test_stages_double_and_fall():
    stages = progressive(16384, 16384, 30, base=1024)
    assert [stage.height for stage in stages] == [1024, 2048, 4096, 8192, 16384]
    assert [stage.strength for stage in stages] == [1.0, 0.42, 0.373, 0.327, 0.28]
    assert [stage.evaluations for stage in stages] == [30, 12, 11, 9, 8]
    wide = progressive(2048, 4096, 20, base=1024)
    assert [(stage.height, stage.width) for stage in wide] == [(728, 1448), (1448, 2896), (2048, 4096)]
    assert [stage.height for stage in progressive(1536, 1536, 20, base=1024)] == [1024, 1536]
    assert progressive(1024, 1024, 20, base=1024) == direct(1024, 1024, 20) == [Stage(1024, 1024, 20, 1.0)]
    assert progressive(512, 512, 20, base=1024) == direct(512, 512, 20)
    given = progressive(4096, 4096, 20, base=1024, strengths=[0.5, 0.1])
    assert [stage.evaluations for stage in given] == [20, 10, 2]


def test_stages_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match="expected 2, one for each pass"):
        progressive(4096, 4096, 20, base=1024, strengths=[0.5])
    with pytest.raises(ValueError, match="more than 0 and at most 1"):
        progressive(2048, 2048, 20, base=1024, strengths=[1.5])
    with pytest.raises(ValueError, match="less than one"):
        progressive(2048, 2048, 2, base=1024)
