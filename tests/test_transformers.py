"""GSPN-2 mixers in place of the self-attentions of vision encoders of transformers."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

pytest.importorskip("transformers")

import transformers as hf

import vision_helpers as tiny
from gspn2.integrations.transformers import (
    is_mounted,
    mixers_of,
    mount,
    unmount,
)

WITH_PREFIX = [name for name, number in tiny.PREFIX.items() if number]


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(params=list(tiny.PREFIX))
def encoder(request):
    return tiny.encoder(request.param)


def test_every_attention_is_swapped_and_put_back(encoder):
    """Outputs differ with mixers and are the same bits without, whatever the size."""
    expected = [tiny.run(encoder, grid) for grid in tiny.GRIDS]
    weights = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    hooks = [len(module._forward_pre_hooks) for module in encoder.modules()]
    kinds = [type(module) for module in encoder.modules()]
    mixers = mount(encoder, zero_output=False)
    assert is_mounted(encoder)
    assert mixers_of(encoder) is mixers
    assert tiny.swapped(encoder).keys() == dict(mixers.layers()).keys()
    assert len(tiny.swapped(encoder)) == tiny.SIZES["num_hidden_layers"]
    for number, (_, mixer) in enumerate(mixers.layers()):
        assert mixer.mixer.proxy_dim == 32 // 8
        assert mixer.mixer.initial_taps == ("vertical", "horizontal")[number % 2]
    for grid, before in zip(tiny.GRIDS, expected, strict=True):
        after = tiny.run(encoder, grid)
        assert after.shape == before.shape
        assert after.isfinite().all()
        assert not torch.allclose(after, before)
    assert unmount(encoder) is mixers
    assert not is_mounted(encoder)
    for grid, before in zip(tiny.GRIDS, expected, strict=True):
        assert torch.equal(tiny.run(encoder, grid), before)
    after = encoder.state_dict()
    assert list(after) == list(weights)
    assert all(torch.equal(after[name], weights[name]) for name in weights)
    assert [len(module._forward_pre_hooks) for module in encoder.modules()] == hooks
    assert [type(module) for module in encoder.modules()] == kinds


def test_mixers_get_the_grid_of_the_image(encoder):
    """Rows and columns as they are, not the other way round, and no tokens of the prefix."""
    mixers = mount(encoder)
    seen = []
    for _, mixer in mixers.layers():
        mixer.register_forward_pre_hook(lambda module, args: seen.append((args[0].shape[1], args[1])))
    for grid in tiny.GRIDS:
        seen.clear()
        tiny.run(encoder, grid)
        assert seen == [(grid[0] * grid[1], grid)] * tiny.SIZES["num_hidden_layers"]


@pytest.mark.parametrize("name", WITH_PREFIX)
def test_tokens_of_the_prefix_read_out_as_before(name):
    """In the first layer, where they see the same tokens, they get what attention gave them."""
    model = tiny.encoder(name)
    prefix = tiny.PREFIX[name]
    layer = next(iter(dict(mount(tiny.encoder(name)).layers())))
    outputs = {}

    def note(key):
        def hook(module, args, output):
            outputs[key] = output[0] if isinstance(output, tuple) else output

        return hook

    model.get_submodule(layer).register_forward_hook(note("attention"))
    tiny.run(model, (4, 6))
    mount(model, zero_output=False)
    model.get_submodule(layer).register_forward_hook(note("mixer"))
    tiny.run(model, (4, 6))
    torch.testing.assert_close(outputs["mixer"][:, :prefix], outputs["attention"][:, :prefix])
    assert not torch.allclose(outputs["mixer"][:, prefix:], outputs["attention"][:, prefix:])


@pytest.mark.parametrize("readout", ["attention", "average"])
def test_class_tokens_learn_from_the_image(readout):
    model = tiny.encoder("ViT")
    mixers = mount(model, zero_output=False, readout=readout)
    pixels = tiny.images((4, 6)).requires_grad_()
    tiny.tokens(model, pixels)[:, 0].square().sum().backward()
    # Every pixel counts, and every mixer that can: the last one comes after the last readout of the grid.
    assert (pixels.grad.abs().amax(dim=1) > 0).all()
    first = next(mixers.layers())[1].mixer
    assert all(parameter.grad.abs().sum() > 0 for parameter in first.parameters())
    averaging = readout == "average"
    assert any("q_proj" in name for name, _ in model.named_parameters()) != averaging
    if averaging:
        mixer = next(iter(tiny.swapped(model).values()))
        x = torch.randn(2, 25, 32)
        mixed, maps = mixer(x, gspn2_grid=(4, 6))
        torch.testing.assert_close(mixed[:, 0], mixed[:, 1:].mean(dim=1))
        assert maps is None


def test_zero_output_cuts_attention():
    """Fresh mixers add nothing until they learn; the parameters that do not run are none of the model's."""
    model = tiny.encoder("SiglipVision")
    before = model.num_parameters()
    attention = sum(p.numel() for n, p in model.named_parameters() if "self_attn" in n)
    cut = copy.deepcopy(model)
    for name, module in cut.named_modules():
        if name.endswith("self_attn"):
            torch.nn.init.zeros_(module.out_proj.weight)
            torch.nn.init.zeros_(module.out_proj.bias)
    mixers = mount(model)
    torch.testing.assert_close(tiny.run(model, (4, 6)), tiny.run(cut, (4, 6)))
    assert model.num_parameters() == before - attention + mixers.num_parameters()


@pytest.mark.parametrize("name", ["Dinov2", "SiglipVision"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradients_are_the_same_under_checkpointing(name, reentrant):
    model = tiny.encoder(name)
    mixers = mount(model, zero_output=False)
    model.requires_grad_(False).train()
    mixers.requires_grad_(True)
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        mixers.zero_grad()
        # Another size in between: a grid kept as a state would be wrong in the backward pass.
        loss = tiny.tokens(model, tiny.images((4, 6)).requires_grad_()).square().mean()
        tiny.run(model, (6, 4))
        loss.backward()
        gradients.append({name: p.grad.clone() for name, p in mixers.named_parameters()})
    assert all(g.abs().sum() > 0 for name, g in gradients[0].items() if name.endswith("from_proxy.weight"))
    for name, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], expected)


@pytest.mark.parametrize("name", ["CLIPVision", "Dinov2"])
def test_compiled_encoders_follow_the_size(name):
    """Whether their layers hand the grid on (CLIP) or are called with it (DINOv2)."""
    model = tiny.encoder(name)
    mount(model, zero_output=False)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for grid in tiny.GRIDS[1:]:
        with torch.no_grad():
            output = tiny.tokens(compiled, tiny.images(grid))
        torch.testing.assert_close(output, tiny.run(model, grid), atol=1e-5, rtol=1e-4)
    torch._dynamo.reset()


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ["ViT", "Dinov2"])
def test_outputs_of_layers(name, implementation):
    """Hidden states as ever; no attention maps, and those that there were come back."""
    model = tiny.encoder(name)
    model.set_attn_implementation(implementation)
    pixels = tiny.images((4, 4))
    hidden = model(pixels, output_hidden_states=True).hidden_states
    fresh = tiny.encoder(name)
    fresh.set_attn_implementation(implementation)
    mount(fresh, zero_output=False)
    assert len(fresh(pixels, output_hidden_states=True).hidden_states) == len(hidden)
    with pytest.raises(ValueError, match="output_attentions: expected False"):
        fresh(pixels, output_attentions=True)
    unmount(fresh)
    if implementation == "eager":
        assert len(fresh(pixels, output_attentions=True).attentions) == 2
    again = fresh(pixels, output_hidden_states=True).hidden_states
    assert all(torch.equal(one, other) for one, other in zip(again, hidden, strict=True))


def test_autocast_and_dtypes():
    model = tiny.encoder("CLIPVision")
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    mount(model, zero_output=False)
    exact = tiny.run(model, (4, 6))
    with torch.autocast("cpu", torch.bfloat16):
        rounded = tiny.run(model, (4, 6))
    assert not torch.equal(rounded, exact)
    assert (rounded - exact).norm() < 0.05 * exact.norm()
    model.to(torch.float64)
    unmount(model)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float64}
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())


def test_classifiers_and_models_that_see():
    classifier = hf.ViTForImageClassification(hf.ViTConfig(**tiny.SIZES, num_labels=5))
    mount(classifier)
    labels = torch.tensor([1, 2])
    classifier(tiny.images((4, 4)), labels=labels).loss.backward()
    name = "vit.layers.0.attention.mixer.mixer.from_proxy.weight"
    assert dict(classifier.named_parameters())[name].grad.abs().sum() > 0
    torch.manual_seed(0)
    vision, text = hf.CLIPVisionConfig(**tiny.SIZES), hf.LlamaConfig(**tiny.TEXT)
    model = hf.LlavaForConditionalGeneration(
        hf.LlavaConfig(vision_config=vision, text_config=text, image_token_id=49)
    ).eval()
    ids = torch.tensor([[1, *[49] * 16, 2]])
    with torch.no_grad():
        before = model(input_ids=ids, pixel_values=tiny.images((4, 4), 1)).logits
        mount(model, zero_output=False)
        after = model(input_ids=ids, pixel_values=tiny.images((4, 4), 1)).logits
        assert not torch.allclose(after, before)
        unmount(model)
        assert torch.equal(model(input_ids=ids, pixel_values=tiny.images((4, 4), 1)).logits, before)


@pytest.mark.parametrize("again", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_is_its_own(again):
    model = tiny.encoder("Dinov2")
    mount(model, zero_output=False, readout="average")
    expected = tiny.run(model, (4, 6))
    twin = again(model)
    with torch.no_grad():
        for parameter in mixers_of(twin).parameters():
            parameter.zero_()
    assert torch.equal(tiny.run(model, (4, 6)), expected)
    assert not torch.equal(tiny.run(twin, (4, 6)), expected)
    unmount(twin)
    assert is_mounted(model)
    assert torch.equal(tiny.run(model, (4, 6)), expected)


def test_replicas_hand_their_own_grid_down():
    """As `nn.DataParallel` makes them, with which `Trainer` uses several GPUs of one process."""

    def replica(module):
        made = module._replicate_for_data_parallel()
        made._parameters, made._buffers = dict(module._parameters), dict(module._buffers)
        made._modules.update({name: replica(child) for name, child in module._modules.items()})
        return made

    model = tiny.encoder("Dinov2")
    mount(model, zero_output=False)
    assert torch.equal(tiny.run(replica(model), (4, 6)), tiny.run(model, (4, 6)))


def test_adapters_everywhere_leave_mixers_out():
    """`modules_to_save` trains them as they are."""
    peft = pytest.importorskip("peft")
    model = tiny.encoder("CLIPVision")
    mount(model, zero_output=False)
    before = tiny.run(model, (4, 4))
    where = {"target_modules": "all-linear", "exclude_modules": r".*\.mixer\..*"}
    adapter = peft.LoraConfig(**where, modules_to_save=["self_attn.mixer"], r=2)
    adapted = peft.get_peft_model(model, adapter)
    output = adapted(pixel_values=tiny.images((4, 4))).last_hidden_state
    torch.testing.assert_close(output, before)
    output.square().sum().backward()
    learnt = [name for name, p in adapted.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0]
    for part in ("from_proxy.weight", "mlp.fc1.lora_B", "q_proj.lora_B"):
        assert any(part in name for name in learnt), part


def test_adapters_of_the_readout_take_part_and_leave():
    peft = pytest.importorskip("peft")
    model = tiny.encoder("CLIPVision")
    plain = tiny.run(model, (4, 4))
    mount(model)
    before = tiny.run(model, (4, 4))
    adapter = peft.LoraConfig(target_modules=["q_proj", "out_proj"], r=2, init_lora_weights=False)
    adapted = peft.get_peft_model(model, adapter)
    output = adapted(pixel_values=tiny.images((4, 4))).last_hidden_state
    assert not torch.allclose(output, before)
    output[:, 0].sum().backward()
    assert all(
        p.grad.abs().sum() > 0 for name, p in adapted.named_parameters() if ".0." in name and "lora" in name
    )
    back = adapted.unload()
    torch.testing.assert_close(tiny.run(back, (4, 4)), before)
    unmount(back)
    assert torch.equal(tiny.run(back, (4, 4)), plain)


def test_images_of_several_grids_are_mixed_each_by_itself():
    """In a batch padded to one number of tokens, and alone; the padding can be anything."""
    model = tiny.siglip2()
    grids = [(2, 5), (5, 2), (3, 3), (2, 5)]
    mount(model, zero_output=False)
    with torch.no_grad():
        batch = model(**tiny.padded(grids, 12))
        for row, (height, width) in enumerate(grids):
            alone = model(**tiny.padded([(height, width)], height * width))
            tokens = batch.last_hidden_state[row : row + 1, : height * width]
            torch.testing.assert_close(tokens, alone.last_hidden_state, atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(
                batch.pooler_output[row : row + 1], alone.pooler_output, atol=1e-5, rtol=1e-4
            )
    inputs = tiny.padded(grids, 12)
    inputs["spatial_shapes"][0] = torch.tensor([3, 3])
    with pytest.raises(ValueError, match="pixel_attention_mask: expected ones"):
        model(**inputs)
    inputs["spatial_shapes"][0] = torch.tensor([4, 5])
    with pytest.raises(ValueError, match="spatial_shapes: expected 1 to 12 tokens an image, got 4 x 5"):
        model(**inputs)
    with pytest.raises(ValueError, match="a grid for each image"):
        model(**{**inputs, "spatial_shapes": torch.tensor([[2, 5]])})


def test_a_model_that_cannot_be_unmounted_still_runs():
    """For want of memory, say: here an attention has none of its own."""
    model = tiny.encoder("SiglipVision")
    mount(model, zero_output=False)
    expected = tiny.run(model, (4, 4))
    last = list(tiny.swapped(model).values())[-1]
    last.released().to("meta")
    with pytest.raises(NotImplementedError, match="meta"):
        unmount(model)
    assert is_mounted(model)
    assert torch.equal(tiny.run(model, (4, 4)), expected)


def refused():
    yield hf.CLIPTextModel(hf.CLIPTextConfig(**tiny.TEXT)), "its tokens are text and lie on no grid"
    swin = hf.SwinConfig(image_size=32, embed_dim=8, depths=[1, 1], num_heads=[1, 1], window_size=4)
    yield hf.SwinModel(swin), "it attends in windows"
    yield hf.ViTMAEModel(hf.ViTMAEConfig(**tiny.SIZES)), "it leaves tokens out"
    yield torch.nn.Linear(2, 2), "no vision encoder that is known here"
    two = torch.nn.ModuleDict({"a": tiny.encoder("ViT"), "b": tiny.encoder("Dinov2")})
    yield two, r"expected one vision encoder, got a \(ViTModel\), b \(Dinov2Model\); mount each"
    odd = tiny.encoder("ViT")
    odd.layers[1].attention = torch.nn.Identity()
    yield odd, r"cannot swap layers\.1\.attention: expected an attention of transformers, got Identity"


def test_what_cannot_be_swapped_is_refused():
    for model, message in refused():
        before = [type(module) for module in model.modules()]
        with pytest.raises(ValueError, match=message):
            mount(model)
        assert [type(module) for module in model.modules()] == before
    with pytest.raises(TypeError, match="expected a model of transformers, got str"):
        mount("vit")


def test_bad_calls_are_refused():
    model = tiny.encoder("ViT")
    with pytest.raises(TypeError, match="proxy_dims: expected an option of mixers"):
        mount(model, proxy_dims=4)
    with pytest.raises(ValueError, match="proxy_ratio"):
        mount(model, proxy_ratio=0)
    with pytest.raises(TypeError, match=r"mixers: expected VisionMixers, as .* got str"):
        mount(model, "mixers")
    with pytest.raises(ValueError, match="readout: expected one of attention, average, got 'mean'"):
        mount(model, readout="mean")
    assert not is_mounted(model)
    mixers = mount(model)
    with pytest.raises(ValueError, match="mounted already"):
        mount(model)
    with pytest.raises(ValueError, match="attention_mask: expected None"):
        model(tiny.images((4, 4)), attention_mask=torch.ones(2, 17))
    model(tiny.images((4, 4)))
    for alone in (model.layers[0], next(iter(tiny.swapped(model).values()))):
        with pytest.raises(ValueError, match="expected the token grid, got none"):
            alone(torch.zeros(1, 17, 32))
    assert "in place of ViTAttention, prefix_tokens=1, readout='attention'" in repr(model)
    unmount(model)
    with pytest.raises(ValueError, match="no mixers are mounted"):
        unmount(model)
    with pytest.raises(ValueError, match="bring their own options"):
        mount(model, mixers, groups=2)


@pytest.mark.gpu
def test_on_a_gpu():
    """In float32 as on the CPU, in 16 bits, and compiled; mixers are made where the model is."""
    device = torch.device("cuda")
    model = tiny.encoder("DINOv3ViT")
    mixers = mount(model, zero_output=False)
    expected = tiny.run(model, (4, 6))
    unmount(model)
    model.to(device)
    assert {parameter.device.type for parameter in mount(model).parameters()} == {device.type}
    unmount(model)
    mount(model, mixers)
    pixels = tiny.images((4, 6)).to(device)
    with torch.no_grad():
        torch.testing.assert_close(tiny.tokens(model, pixels).cpu(), expected, atol=1e-3, rtol=1e-3)
        model.to(torch.bfloat16)
        half = tiny.tokens(model, pixels.bfloat16()).float().cpu()
        torch._dynamo.reset()
        compiled = torch.compile(model, fullgraph=True)
        again = tiny.tokens(compiled, pixels.bfloat16()).float().cpu()
        torch._dynamo.reset()
    for rounded in (half, again):
        assert (rounded - expected).norm() < 0.05 * expected.norm()


@pytest.mark.gpu
def test_several_grids_on_a_gpu():
    model = tiny.siglip2()
    mount(model, zero_output=False)
    inputs = tiny.padded([(2, 5), (5, 2), (3, 3)], 12)
    with torch.no_grad():
        expected = model(**inputs)
        model.cuda()
        found = model(**{name: tensor.cuda() for name, tensor in inputs.items()})
    for name in ("last_hidden_state", "pooler_output"):
        torch.testing.assert_close(found[name].cpu(), expected[name], atol=1e-3, rtol=1e-3)
