"""GSPN-2 mixers in place of the self-attentions of a diffusers UNet."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file

import diffusion_helpers as tiny
from gspn2.integrations.diffusers import (
    AttentionMixer,
    UNetMixers,
    is_mounted,
    mixers_of,
    mount,
    unmount,
)
from processes import printed_by

UNETS = {"sdxl": tiny.sdxl_unet, "sd15": tiny.sd15_unet}
SIZES = [(16, 16), (16, 24), (20, 12)]


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(params=list(UNETS))
def unet(request):
    return UNETS[request.param]()


def run(unet, height=16, width=24, **more):
    with torch.no_grad():
        return unet(**tiny.inputs(unet, height, width), **more).sample


def weights_file(folder: Path) -> Path:
    return folder / "diffusion_pytorch_model.safetensors"


def test_every_self_attention_is_swapped_and_nothing_else(unet):
    before = {name: module for name, module in unet.named_modules() if name.endswith(("attn1", "attn2"))}
    mixers = mount(unet)
    swapped = dict(mixers.layers())
    assert swapped.keys() == {name for name in before if name.endswith("attn1")}
    taps = [module.tokens.mixer.initial_taps for module in swapped.values()]
    assert taps == [("vertical", "horizontal")[number % 2] for number in range(len(taps))]
    for name, module in unet.named_modules():
        if name.endswith("attn1"):
            assert isinstance(module, AttentionMixer)
            assert module is swapped[name]
            assert module.tokens.mixer.proxy_dim == module.tokens.mixer.dim // 8
        elif name.endswith("attn2"):
            assert module is before[name]


def test_fresh_mixers_put_out_zero(unet):
    """The same as a UNet whose self-attentions add nothing."""
    cut = copy.deepcopy(unet)
    for name, module in cut.named_modules():
        if name.endswith("attn1"):
            torch.nn.init.zeros_(module.to_out[0].weight)
            torch.nn.init.zeros_(module.to_out[0].bias)
    mount(unet)
    torch.testing.assert_close(run(unet), run(cut), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("size", SIZES)
def test_mixers_get_the_grid_of_their_level(unet, size):
    grids = {}

    def note(name):
        def hook(module, args, kwargs):
            grids[name] = kwargs["gspn2_grid"]

        return hook

    mixers = mount(unet)
    for name, mixer in mixers.layers():
        mixer.register_forward_pre_hook(note(name), with_kwargs=True)
    run(unet, *size)
    levels = {name: len(unet.down_blocks) - 1 if name.startswith("mid") else None for name in grids}
    for name in grids:
        block = int(name.split(".")[1]) if levels[name] is None else None
        if name.startswith("down"):
            levels[name] = block
        elif name.startswith("up"):
            levels[name] = len(unet.up_blocks) - 1 - block
    assert grids == {name: (size[0] >> level, size[1] >> level) for name, level in levels.items()}
    assert grids.keys() == dict(mixers.layers()).keys()


def test_the_orientation_of_the_image_matters(unet):
    """The same tokens on a grid that was guessed the other way round give something else."""
    mixers = mount(unet, zero_output=False)
    _, mixer = next(iter(mixers.layers()))
    tokens = torch.randn(1, 6 * 4, mixer.tokens.mixer.dim)
    with torch.no_grad():
        wide, high = mixer(tokens, gspn2_grid=(4, 6)), mixer(tokens, gspn2_grid=(6, 4))
    assert not torch.allclose(wide, high)


def test_unmount_restores_the_outputs_exactly(unet):
    inputs = [run(unet, *size) for size in SIZES]
    weights = {name: tensor.clone() for name, tensor in unet.state_dict().items()}
    mixers = mount(unet, zero_output=False)
    assert is_mounted(unet)
    assert not torch.equal(run(unet, *SIZES[0]), inputs[0])
    assert unmount(unet) is mixers
    assert not is_mounted(unet)
    for size, expected in zip(SIZES, inputs, strict=True):
        assert torch.equal(run(unet, *size), expected)
    after = unet.state_dict()
    assert list(after) == list(weights)
    assert all(torch.equal(after[name], weights[name]) for name in weights)
    assert not any(module._forward_pre_hooks for module in unet.modules())


def test_unmounted_attentions_follow_the_unet(unet):
    mount(unet)
    unet.to(torch.float64)
    unmount(unet)
    assert {parameter.dtype for parameter in unet.parameters()} == {torch.float64}


def test_a_copy_of_a_mounted_unet_is_its_own(unet):
    mount(unet, zero_output=False)
    expected = run(unet)
    twin = copy.deepcopy(unet)
    mixers_of(twin).requires_grad_(False)
    for parameter in mixers_of(twin).parameters():
        parameter.zero_()
    assert torch.equal(run(unet), expected)
    assert not torch.equal(run(twin), expected)
    unmount(twin)
    assert is_mounted(unet)
    assert torch.equal(run(unet), expected)


def test_saved_mixers_load_in_a_fresh_process(tmp_path):
    unet = tiny.sdxl_unet()
    mixers = mount(unet, zero_output=False, groups=2)
    mixers.save_pretrained(tmp_path / "mixers")
    torch.save(run(unet, 12, 20), tmp_path / "expected.pt")
    unmount(unet)
    unet.save_pretrained(tmp_path / "unet")
    script = (
        "import sys, torch\n"
        "import diffusion_helpers as tiny\n"
        "from diffusers import UNet2DConditionModel\n"
        "from gspn2.integrations.diffusers import UNetMixers, mount\n"
        "torch.set_num_threads(1)\n"
        "unet = UNet2DConditionModel.from_pretrained(sys.argv[1] + '/unet').eval()\n"
        "mixers = UNetMixers.from_pretrained(sys.argv[1] + '/mixers')\n"
        "assert mixers.config.groups == 2\n"
        "mount(unet, mixers)\n"
        "with torch.no_grad():\n"
        "    output = unet(**tiny.inputs(unet, 12, 20)).sample\n"
        "assert torch.equal(output, torch.load(sys.argv[1] + '/expected.pt')), 'not the same'\n"
        "print('same')\n"
    )
    assert printed_by(script, tmp_path) == "same"


@pytest.mark.parametrize("fault", ["missing", "unexpected", "shape"])
def test_loading_is_strict(tmp_path, fault):
    mount(tiny.sd15_unet()).save_pretrained(tmp_path)
    file = weights_file(tmp_path)
    weights = load_file(file)
    name = next(name for name in weights if name.endswith("to_proxy.weight"))
    if fault == "missing":
        del weights[name]
    elif fault == "unexpected":
        weights["more.weight"] = torch.zeros(3)
    else:
        weights[name] = weights[name][:, :-1].contiguous()
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises((ValueError, RuntimeError), match=r"expected exactly|to_proxy"):
        UNetMixers.from_pretrained(tmp_path)


def test_mixers_load_in_the_dtype_asked_for(tmp_path):
    mount(tiny.sd15_unet()).save_pretrained(tmp_path)
    mixers = UNetMixers.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in mixers.parameters()} == {torch.bfloat16}


def test_gradients_are_the_same_under_checkpointing(unet):
    mixers = mount(unet, zero_output=False)
    unet.requires_grad_(False).train()
    mixers.requires_grad_(True)
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            unet.enable_gradient_checkpointing()
        mixers.zero_grad()
        # Another size in between: a grid kept as a state would be wrong in the backward pass.
        loss = unet(**tiny.inputs(unet, 16, 12)).sample.square().mean()
        run(unet, 8, 16)
        loss.backward()
        gradients.append({name: p.grad.clone() for name, p in mixers.named_parameters()})
    assert all(g.abs().sum() > 0 for name, g in gradients[0].items() if name.endswith("from_proxy.weight"))
    for name, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], expected)


@pytest.mark.parametrize("how", ["cast", "offload"])
def test_weights_that_are_brought_for_a_call(how):
    """Stored in 8 bits, or on no device at all, until a layer is called."""
    unet = tiny.sd15_unet()
    expected = run(unet)
    mount(unet, zero_output=False)
    mixed = run(unet)
    if how == "cast":
        unet.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)
        assert (run(unet) - mixed).norm() < 0.2 * mixed.norm()
        return
    accelerate = pytest.importorskip("accelerate")
    accelerate.cpu_offload(unet, torch.device("cpu"))
    assert {p.device.type for p in mixers_of(unet).parameters()} == {"meta"}
    torch.testing.assert_close(run(unet), mixed)
    with pytest.raises(ValueError, match="offloaded layer by layer"):
        unmount(unet)
    with pytest.raises(ValueError, match="mixers are mounted already"):
        mount(unet)
    accelerate.hooks.remove_hook_from_module(unet, recurse=True)
    unmount(unet)
    torch.testing.assert_close(run(unet), expected)


def test_compiled_unet_follows_the_size():
    unet = tiny.sd15_unet()
    mount(unet, zero_output=False)
    torch._dynamo.reset()
    compiled = torch.compile(unet, backend="eager", fullgraph=True)
    for size in [(8, 16), (16, 8)]:
        torch.testing.assert_close(run(compiled, *size), run(unet, *size), atol=1e-5, rtol=1e-4)
    torch._dynamo.reset()


def test_a_pipeline_from_files_works_unchanged(tmp_path):
    from diffusers import DiffusionPipeline

    tiny.sdxl_pipeline(tmp_path).save_pretrained(tmp_path / "pipeline")
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "pipeline")
    pipe.set_progress_bar_config(disable=True)

    def image(height, width):
        generator = torch.Generator().manual_seed(0)
        return pipe(
            "a cat", num_inference_steps=2, height=height, width=width, output_type="np", generator=generator
        ).images

    before = image(64, 96)
    mount(pipe.unet, zero_output=False)
    for height, width in [(64, 64), (64, 96), (96, 64)]:
        assert image(height, width).shape == (1, height, width, 3)
    assert abs(image(64, 96) - before).max() > 0
    unmount(pipe.unet)
    assert (image(64, 96) == before).all()


def test_a_unet_that_cannot_be_unmounted_still_runs():
    """For want of memory, say: here an attention has none of its own."""
    unet = tiny.sd15_unet()
    attention = [module for name, module in unet.named_modules() if name.endswith("attn1")][-1]
    mount(unet, zero_output=False)
    expected = run(unet)
    attention.to("meta")
    with pytest.raises(NotImplementedError, match="meta"):
        unmount(unet)
    assert is_mounted(unet)
    assert torch.equal(run(unet), expected)


def lora(unet, names, rank=2):
    """Weights of a LoRA on linear layers, as training scripts save them."""
    generator = torch.Generator().manual_seed(1)
    weights = {}
    for name, module in unet.named_modules():
        if isinstance(module, torch.nn.Linear) and any(part in name for part in names):
            out, inner = module.weight.shape
            weights[f"unet.{name}.lora_A.weight"] = torch.randn(rank, inner, generator=generator)
            weights[f"unet.{name}.lora_B.weight"] = torch.randn(out, rank, generator=generator)
    assert weights
    return weights


@pytest.mark.parametrize("parts", [["attn2.to_"], ["attn1.to_", "attn2.to_"]], ids=["cross", "all"])
def test_lora_on_cross_attention_works(tmp_path, parts):
    """Loaded before and after mounting; what it has for self-attention has nothing to act on."""
    pytest.importorskip("peft")
    weights = lora(tiny.sdxl_unet(), parts)
    outputs = []
    for first in ("mount", "lora"):
        pipe = tiny.sdxl_pipeline(tmp_path)
        torch.manual_seed(3)
        if first == "lora":
            pipe.load_lora_weights(dict(weights))
        mount(pipe.unet, zero_output=False)
        plain = run(pipe.unet)
        if first == "mount":
            pipe.load_lora_weights(dict(weights))
            assert not torch.allclose(run(pipe.unet), plain)
        outputs.append(run(pipe.unet))
    torch.testing.assert_close(outputs[0], outputs[1])


def test_ip_adapter_works():
    """Its weights are keyed by the order of the cross-attentions, and its kwargs reach every attention."""
    unet = tiny.sdxl_unet()
    mount(unet, zero_output=False)
    plain = run(unet)
    generator = torch.Generator().manual_seed(2)
    attentions = [module for name, module in unet.named_modules() if name.endswith("attn2")]
    keys = {}
    for i, attention in enumerate(attentions):
        shape = (attention.inner_dim, attention.cross_attention_dim)
        for part in ("to_k_ip", "to_v_ip"):
            keys[f"{2 * i + 1}.{part}.weight"] = torch.randn(*shape, generator=generator)
    width = unet.config.cross_attention_dim
    projection = {
        "proj.weight": torch.randn(4 * width, 32, generator=generator),
        "proj.bias": torch.zeros(4 * width),
        "norm.weight": torch.ones(width),
        "norm.bias": torch.zeros(width),
    }
    unet._load_ip_adapter_weights([{"image_proj": projection, "ip_adapter": keys}], low_cpu_mem_usage=False)
    unet.eval()
    given = tiny.inputs(unet, 16, 24)
    embeds = torch.randn(2, 1, 32, generator=generator)
    given["added_cond_kwargs"]["image_embeds"] = [embeds]

    def output(**more):
        with torch.no_grad():
            return unet(**given, **more).sample

    adapted = output()
    assert not torch.allclose(adapted, plain)
    mask = torch.zeros(1, 1, 128, 192)
    mask[..., :96] = 1
    masked = output(cross_attention_kwargs={"ip_adapter_masks": [mask]})
    assert not torch.allclose(masked, adapted)
    unmount(unet)
    assert output().shape == plain.shape


def test_attentions_that_stay_never_see_the_grid(caplog, unet):
    """They would warn of an argument they do not know, at every step."""
    from diffusers.utils import logging

    mount(unet)
    seen = []
    for name, module in unet.named_modules():
        if name.endswith("attn2"):
            module.register_forward_pre_hook(lambda m, args, kwargs: seen.append(kwargs), with_kwargs=True)
    logging.enable_propagation()
    run(unet)
    logging.disable_propagation()
    assert seen
    assert not any("gspn2_grid" in kwargs for kwargs in seen)
    assert "not expected" not in caplog.text


def test_what_cannot_be_swapped_is_refused():
    plain = {"down_block_types": ("AttnDownBlock2D", "DownBlock2D"), "up_block_types": ("UpBlock2D",) * 2}
    with pytest.raises(ValueError, match=r"cannot swap down_blocks\.0\.attentions\.0"):
        mount(tiny.sd15_unet(**plain, mid_block_type="UNetMidBlock2D"))
    none = {**plain, "down_block_types": ("DownBlock2D",) * 2, "mid_block_type": None}
    with pytest.raises(ValueError, match="at least one Transformer2DModel"):
        mount(tiny.sd15_unet(**none))
    with pytest.raises(TypeError, match="expected a UNet2DConditionModel, got Linear"):
        mount(torch.nn.Linear(2, 2))


def test_cross_attention_only_blocks_keep_their_attention():
    unet = tiny.sd15_unet(only_cross_attention=(True, False))
    expected = {name for name, module in mount(unet).layers()}
    assert expected == {"mid_block.attentions.0.transformer_blocks.0.attn1"}
    assert run(unet).shape == (2, 4, 16, 24)


def test_bad_calls_are_refused(unet):
    mixers = mount(unet)
    with pytest.raises(ValueError, match="mounted already"):
        mount(unet)
    with pytest.raises(ValueError, match="mixers are mounted"):
        unet.save_pretrained("nowhere")
    _, mixer = next(iter(mixers.layers()))
    tokens = torch.zeros(1, 16, mixer.tokens.mixer.dim)
    with pytest.raises(ValueError, match="expected the token grid"):
        mixer(tokens)
    with pytest.raises(ValueError, match="attention_mask"):
        mixer(tokens, attention_mask=torch.zeros(1, 16), gspn2_grid=(4, 4))
    with pytest.raises(ValueError, match="encoder_hidden_states"):
        mixer(tokens, tokens, gspn2_grid=(4, 4))
    unmount(unet)
    with pytest.raises(ValueError, match="no mixers are mounted"):
        unmount(unet)
    with pytest.raises(ValueError, match="proxy_ratio"):
        mount(unet, proxy_ratio=0)
    with pytest.raises(TypeError, match=r"proxy_ratio: expected an int, got 2\.5"):
        mount(unet, proxy_ratio=2.5)
    with pytest.raises(TypeError, match="mixers: expected UNetMixers"):
        mount(unet, "folder")
    with pytest.raises(ValueError, match="bring their own options"):
        mount(unet, mixers, groups=2)


def test_mixers_of_another_unet_are_refused():
    mixers = mount(tiny.sdxl_unet())
    unet = tiny.sd15_unet()
    with pytest.raises(ValueError, match="made for another UNet"):
        mount(unet, mixers)
    assert not is_mounted(unet)
    assert isinstance(unet, UNet2DConditionModel)
    assert run(unet).isfinite().all()
