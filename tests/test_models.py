"""The backbones as timm sees them: every registered GSPN-2, heavy work on the smallest."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from timm.models import FeatureListNet
from timm.optim import create_optimizer_v2, param_groups_layer_decay
from torch import Tensor, nn

import gspn2.models
from gspn2.nn import Mixer

NAMES = timm.list_models("*gspn2*")
SMALL = "test_gspn2"
# Parameters in millions and MACs in billions at 224 (GSPN-2, arXiv 2512.07884).
PUBLISHED = {"gspn2_tiny": (24, 4.2), "gspn2_small": (50, 9.2), "gspn2_base": (89, 14.2)}


def create(name: str = SMALL, seed: int = 0, **options) -> nn.Module:
    torch.manual_seed(seed)
    return timm.create_model(name, **options)


def images(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def meta(name: str, **options) -> nn.Module:
    with torch.device("meta"):
        return timm.create_model(name, **options)


def test_all_models_are_registered():
    assert {"gspn2_tiny", "gspn2_small", "gspn2_base", SMALL} == set(NAMES)
    for name in NAMES:
        assert callable(getattr(gspn2.models, name))
        assert timm.is_model(name)


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_sizes_are_the_published_ones(name):
    model = meta(name)
    parameters, macs = PUBLISHED[name]
    assert gspn2.models.count_parameters(model) / 1e6 == pytest.approx(parameters, rel=0.03)
    counted = gspn2.models.count_macs(model) / 1e9
    assert 0.9 * macs < counted <= 1.03 * macs


def test_the_smallest_is_small():
    assert gspn2.models.count_parameters(meta(SMALL)) < 0.5e6


def test_macs_include_propagation_and_grow_linearly_with_pixels():
    mixer = Mixer(8, 4, operands_from="input")
    pixels = 6 * 5
    projections = 8 * (4 + 4 * (4 + 4 + 3)) + 4 * 8
    assert gspn2.models.count_macs(mixer, (8, 6, 5)) == pixels * (projections + 5 * 4 * 4)
    model = meta(SMALL, num_classes=0)
    assert gspn2.models.count_macs(model, (3, 256, 256)) == 16 * gspn2.models.count_macs(model, (3, 64, 64))


@pytest.mark.parametrize("name", NAMES)
def test_forward(name):
    model = create(name, num_classes=5).eval()
    with torch.inference_mode():
        y = model(images(2, 3, 64, 64))
    assert y.shape == (2, 5)
    assert torch.isfinite(y).all()
    assert (y[0] != y[1]).any()


@pytest.mark.parametrize("name", NAMES)
def test_default_cfg(name):
    model = meta(name)
    cfg = model.default_cfg
    assert cfg["first_conv"] + ".weight" in model.state_dict()
    assert cfg["classifier"] + ".weight" in model.state_dict()
    assert model.get_classifier() is model.get_submodule(cfg["classifier"])
    features = model.forward_features(torch.empty(1, *cfg["input_size"], device="meta"))
    assert features.shape[2:] == cfg["pool_size"]
    assert model.num_classes == 1000
    assert model.num_features == model.head_hidden_size == features.shape[1]


@pytest.mark.parametrize("name", NAMES)
def test_asking_for_weights_that_do_not_exist_is_an_error(name):
    assert not timm.is_model_pretrained(name)
    with pytest.raises(RuntimeError, match="No pretrained weights exist"):
        timm.create_model(name, pretrained=True)


@pytest.mark.parametrize("size", [(32, 32), (33, 47), (96, 40), (65, 64)])
@pytest.mark.parametrize(
    "options", [{}, {"ls_init_value": 1e-2, "drop_path_rate": 0.1}, {"operands_from": "proxy", "groups": 2}]
)
def test_every_parameter_gets_a_finite_gradient(size, options):
    model = create(num_classes=5, **options).train()
    x = images(4, 3, *size).requires_grad_()
    nn.functional.cross_entropy(model(x), torch.tensor([0, 1, 2, 3])).backward()
    assert torch.isfinite(x.grad).all()
    assert (x.grad != 0).any(dim=1).float().mean() > 0.99
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        # One pixel has no neighbors: at 1 x 1 nothing depends on the taps.
        if "grn.weight" not in name:
            assert parameter.grad.abs().max() > 0, name


def test_fresh_mixers_get_what_they_are_made_for():
    """Taps, lam and gate of a fresh mixer depend on its input if that is of about unit size."""
    model = create(num_classes=5).eval()
    sizes, spreads = [], []

    def look(mixer, given):
        sizes.append(given[0].square().mean().sqrt().item())
        logits = mixer.operands(given[0]).logits
        spreads.append((logits - logits.mean(dim=(0, -2, -1), keepdim=True)).std().item())

    for mixer in (it for it in model.modules() if isinstance(it, Mixer)):
        mixer.register_forward_pre_hook(look)
    with torch.no_grad():
        model(images(2, 3, 64, 64))
    # Small maps lose most of what a 7x7 convolution adds up.
    assert 0.1 < min(sizes) < max(sizes) < 1.5, sizes
    assert min(spreads) > 0.01, spreads


def test_features_have_the_strides_they_claim():
    x = images(1, 3, 65, 97)
    model = create(features_only=True).eval()
    assert isinstance(model, FeatureListNet)
    features = model(x)
    assert model.feature_info.channels() == [feature.shape[1] for feature in features]
    assert model.feature_info.reduction() == [4, 8, 16, 32]
    assert all(feature.is_contiguous(memory_format=torch.channels_last) for feature in features)
    for feature, stride in zip(features, model.feature_info.reduction(), strict=True):
        assert feature.shape[2:] == (-(-65 // stride), -(-97 // stride))
    two = create(features_only=True, out_indices=(1, 3)).eval()(x)
    assert len(two) == 2
    assert torch.equal(two[0], features[1])
    assert torch.equal(two[1], features[3])


def test_forward_intermediates_are_the_features():
    x = images(1, 3, 64, 48)
    model = create().eval()
    features = create(features_only=True).eval()(x)
    final, intermediates = model.forward_intermediates(x)
    assert torch.equal(final, model.forward_features(x))
    for intermediate, feature in zip(intermediates, features, strict=True):
        assert torch.equal(intermediate, feature)
    last_two = model.forward_intermediates(x, indices=2, intermediates_only=True)
    assert torch.equal(last_two[0], features[2])
    assert torch.equal(last_two[1], features[3])
    early = model.forward_intermediates(x, indices=[0, 1], stop_early=True, intermediates_only=True)
    assert torch.equal(early[1], features[1])
    with pytest.raises(ValueError, match="output_fmt: expected 'NCHW', got 'NLC'"):
        model.forward_intermediates(x, output_fmt="NLC")


@pytest.mark.parametrize("wrapper", ["getter", "fx"])
def test_features_through_other_wrappers(wrapper):
    x = images(1, 3, 64, 48)
    wrapped = create(features_only=True, feature_cls=wrapper, out_indices=(0, 2)).eval()
    features = create(features_only=True, out_indices=(0, 2)).eval()(x)
    for got, expected in zip(wrapped(x), features, strict=True):
        assert torch.equal(got, expected)


def test_pruned_model_gives_the_same_intermediates():
    x = images(1, 3, 64, 48)
    model = create().eval()
    expected = model.forward_intermediates(x, indices=[0, 2], intermediates_only=True)
    before = gspn2.models.count_parameters(model)
    assert model.prune_intermediate_layers([0, 2]) == [0, 2]
    assert gspn2.models.count_parameters(model) < before
    for got, wanted in zip(model.forward_intermediates(x, [0, 2])[1], expected, strict=True):
        assert torch.equal(got, wanted)
    assert torch.equal(model(x), expected[1])
    assert model.num_features == model.head_hidden_size == 48
    model.reset_classifier(5, "avg")
    assert model(x).shape == (1, 5)


@pytest.mark.parametrize("pool", ["avg", "max", "avgmax", ""])
def test_reset_classifier(pool):
    x = images(2, 3, 64, 64)
    model = create().eval()
    model.reset_classifier(7, pool)
    y = model(x)
    assert y.shape == ((2, 7) if pool else (2, 7, 2, 2))
    assert model.num_classes == 7
    model.reset_classifier(0)
    headless = model(x)
    assert torch.equal(headless, model.forward_head(model.forward_features(x), pre_logits=True))
    assert headless.shape == ((2, model.num_features) if pool else (2, model.num_features, 2, 2))
    created = create(num_classes=0, global_pool="").eval()
    assert created(x).shape == (2, model.num_features, 2, 2)


def test_dropout_of_the_head():
    model = create(drop_rate=0.5)
    x = images(2, 3, 64, 64)
    assert not torch.equal(model.train()(x), model(x))
    assert torch.equal(model.eval()(x), model(x))


def test_checkpointing_changes_no_gradient():
    x = images(2, 3, 64, 64)
    model = create(num_classes=5).train()
    twin = copy.deepcopy(model)
    twin.set_grad_checkpointing(True)
    for each in (model, twin):
        each(x).square().sum().backward()
    for (name, parameter), other in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert torch.equal(parameter.grad, other.grad), name
    twin.set_grad_checkpointing(False)
    assert not any(stage.grad_checkpointing for stage in twin.stages)


@pytest.mark.parametrize("channels", [1, 4])
def test_other_input_channels(channels):
    model = create(in_chans=channels, num_classes=5).eval()
    assert model(images(1, channels, 64, 64)).shape == (1, 5)
    assert model.in_chans == channels


def test_channels_last_input_gives_the_same():
    model = create().eval()
    x = images(2, 3, 65, 64)
    expected = model(x)
    last = x.contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(model(last), expected, rtol=1e-4, atol=1e-5)
    model = model.to(memory_format=torch.channels_last)
    torch.testing.assert_close(model(last), expected, rtol=1e-4, atol=1e-5)
    features = model.forward_features(x)
    assert features.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("compiled", [False, True])
def test_hooks_see_every_layer(compiled):
    """Whoever watches, moves or gathers layers from outside: no layer is computed past its call."""
    model = create(depths=(2,), dims=(16,), chunk=0, drop_path_rate=0.1, ls_init_value=0.1).eval()
    x = images(1, 3, 32, 48)
    expected = model(x)
    torch._dynamo.reset()
    seen = set()
    for name, module in model.named_modules():
        module.register_forward_hook(lambda *_, name=name: seen.add(name))
    runner = torch.compile(model, fullgraph=True, backend="eager") if compiled else model
    torch.testing.assert_close(runner(x), expected)
    assert seen == {name for name, _ in model.named_modules()}
    torch._dynamo.reset()


@pytest.mark.parametrize("compiled", [False, True])
def test_parts_may_be_replaced(compiled):
    """A block or its FFN by something else, as in ablations; and a hook on all blocks together counts."""

    class Sum(torch.nn.Module):
        def forward(self, x, other=None):
            return x if other is None else x + other

    model = create(depths=(3,), dims=(16,), chunk=0).eval()
    blocks = model.stages[0].blocks
    first, second = copy.deepcopy(blocks[0]), copy.deepcopy(blocks[2])
    blocks[1], blocks[2].ffn = torch.nn.Identity(), Sum()
    x = images(1, 3, 32, 48)
    middle = first(model.stem(x))
    middle = second.lpu(middle)
    expected = model.forward_head(middle + second.gspn(middle))
    torch._dynamo.reset()
    seen = []
    blocks.register_forward_hook(lambda *_: seen.append(True))
    runner = torch.compile(model, fullgraph=True, backend="eager") if compiled else model
    torch.testing.assert_close(runner(x), expected)
    assert seen
    torch._dynamo.reset()


def test_gradients_of_every_sample():
    model = create(num_classes=3, depths=(1,), dims=(8,), chunk=0).eval()
    parameters, x = dict(model.named_parameters()), images(2, 3, 16, 12)

    def score(parameters, x):
        return torch.func.functional_call(model, parameters, (x[None],)).square().sum()

    found = torch.func.vmap(torch.func.grad(score), in_dims=(None, 0))(parameters, x)
    for i in range(2):
        for name, expected in torch.func.grad(score)(parameters, x[i]).items():
            torch.testing.assert_close(found[name][i], expected, rtol=1e-4, atol=1e-6)


def test_the_same_bits_again():
    x = images(2, 3, 64, 64)
    first, second = create().eval(), create().eval()
    assert torch.equal(first(x), first(x))
    assert torch.equal(first(x), second(x))


def test_batch_does_not_leak_between_images():
    model = create().eval()
    x = images(3, 3, 64, 64)
    alone = torch.cat([model(image[None]) for image in x])
    torch.testing.assert_close(model(x), alone, rtol=1e-4, atol=1e-5)


def test_safetensors_round_trip(tmp_path):
    from safetensors.torch import save_file

    model = create(num_classes=5).eval()
    path = tmp_path / "weights.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, path)
    x = images(1, 3, 64, 64)
    loaded = create(seed=7, num_classes=5, checkpoint_path=str(path)).eval()
    assert torch.equal(loaded(x), model(x))
    cfg = {"file": str(path), "num_classes": 5}
    pretrained = create(seed=7, pretrained=True, pretrained_cfg_overlay=cfg, num_classes=5).eval()
    assert torch.equal(pretrained(x), model(x))
    other_head = create(seed=7, pretrained=True, pretrained_cfg_overlay=cfg, num_classes=9).eval()
    assert other_head(x).shape == (1, 9)
    assert torch.equal(other_head.forward_features(x), model.forward_features(x))
    gray = create(seed=7, pretrained=True, pretrained_cfg_overlay=cfg, num_classes=5, in_chans=1).eval()
    assert gray(x[:, :1]).shape == (1, 5)


def test_state_dict_is_strict():
    model = create(num_classes=5)
    state = model.state_dict()
    create(seed=7, num_classes=5).load_state_dict(state, strict=True)
    state.pop("stages.0.blocks.0.gspn.mixer.merge")
    with pytest.raises(RuntimeError, match="merge"):
        create(num_classes=5).load_state_dict(state, strict=True)


@pytest.mark.parametrize("name", NAMES)
def test_layer_decay_sorts_every_parameter(name):
    model = meta(name)
    spared = model.no_weight_decay()
    groups = param_groups_layer_decay(model, 0.05, no_weight_decay_list=spared, layer_decay=0.8)
    scale = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    assert len(scale) == len(list(model.parameters()))
    named = dict(model.named_parameters())
    in_order = ["stem.conv1.weight", "stages.0.blocks.0.lpu.conv.weight", "stages.1.blocks.0.gspn.fc1.weight"]
    in_order += [f"stages.3.blocks.{len(model.stages[3].blocks) - 1}.ffn.fc2.weight", "head.fc.weight"]
    scales = [scale[id(named[key])] for key in in_order]
    assert scales == sorted(set(scales))
    assert scales[-1] == 1.0
    assert decay[id(named["stages.2.blocks.0.gspn.mixer.merge"])] == 0.0
    assert decay[id(named["stages.2.blocks.0.gspn.mixer.to_operands.bias"])] == 0.0
    assert decay[id(named["stages.2.blocks.0.gspn.fc1.weight"])] == 0.05


def test_coarse_groups():
    from timm.models import group_parameters

    groups = group_parameters(create(), create().group_matcher(coarse=True))
    assert len(groups) == 6


def test_a_few_steps_of_training_lower_the_loss():
    model = create(num_classes=4, drop_path_rate=0.1).train()
    optimizer = create_optimizer_v2(model, opt="adamw", lr=2e-3, weight_decay=0.05, layer_decay=0.9)
    x, target = images(8, 3, 48, 48), torch.arange(8) % 4
    losses = []
    for _ in range(12):
        loss = nn.functional.cross_entropy(model(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


def test_under_autocast():
    model = create().eval()
    x = images(2, 3, 64, 64)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        y = model(x)
    assert torch.isfinite(y).all()
    assert nn.functional.cosine_similarity(y.float(), model(x)).min() > 0.99


def test_compiled_model_is_the_same():
    model = create(depths=(1,), dims=(16,), chunk=0).eval()
    x = images(1, 3, 32, 48)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)


def test_options_reach_the_mixers():
    options = {"groups": 2, "directions": ("down", "left"), "operands_from": "proxy", "backend": "reference"}
    model = create(proxy_dim=(2, 2, 4, 4), chunk=(2, 3, 4, 0), **options)
    mixers = [[m for m in stage.modules() if isinstance(m, Mixer)] for stage in model.stages]
    for stage, proxy_dim, chunk in zip(mixers, (2, 2, 4, 4), (2, 3, 4, None), strict=True):
        assert stage
        for mixer in stage:
            assert (mixer.proxy_dim, mixer.chunk) == (proxy_dim, chunk)
            for key, value in options.items():
                assert getattr(mixer, key) == value
    uniform = create(proxy_dim=4, chunk=0)
    assert all(m.proxy_dim == 4 and m.chunk is None for m in uniform.modules() if isinstance(m, Mixer))


def test_custom_sizes():
    isotropic = create(depths=(3,), dims=(24,), stem_stride=1, chunk=0, in_chans=1, num_classes=10)
    assert isotropic(images(2, 1, 8, 8)).shape == (2, 10)
    assert isotropic.forward_features(images(2, 1, 8, 8)).shape == (2, 24, 8, 8)
    assert isotropic.feature_info[0]["reduction"] == 1
    pyramid = create(depths=(1, 1), dims=(16, 32), stem_stride=2, chunk=0)
    assert [f["reduction"] for f in pyramid.feature_info] == [2, 4]
    both = create(depths=(1, 1), dims=(16, 32), chunk=0, features_only=True)
    assert [f.shape[1] for f in both(images(1, 3, 32, 32))] == [16, 32]
    for options, message in [
        ({"depths": (1, 1)}, "depths, dims: expected one entry a stage"),
        ({"drop_path_rate": 1.5}, r"drop_path_rate: expected a probability in \[0, 1\), got 1.5"),
        ({"stem_stride": 3}, "stem_stride: expected 1, 2 or 4, got 3"),
        ({"chunk": (1, 2)}, "chunk: expected one value, or one for each of 4 stages"),
        ({"chunk": 8.0}, r"chunk: expected one value, .*, got 8\.0"),
        ({"proxy_dim": 3, "groups": 2}, "groups: expected a divisor of proxy_dim = 3, got 2"),
        ({"kernel_size": 4}, "kernel_size: expected an odd number of at least 1, got 4"),
        ({"expand_ratio": 0.01}, r"expand_ratio: expected at least one channel, got 0\.01 of 16"),
        ({"mlp_ratio": 0}, "ratio: expected at least one channel, got 0 of 16"),
        ({"drop_path_rate": -0.1}, r"rate: expected a probability in \[0, 1\)"),
    ]:
        with pytest.raises(ValueError, match=message):
            create(**options)


def test_construction_on_a_device_and_in_a_dtype():
    model = create(device="meta", dtype=torch.bfloat16)
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


@pytest.mark.usefixtures("poisoned")
def test_a_model_made_on_meta_gets_its_initial_weights():
    """As a fresh one has them: the same where they are constant, of the same spread elsewhere."""
    made = create(device="meta", ls_init_value=0.1).to_empty(device="cpu")
    assert all(parameter.isnan().all() for parameter in made.parameters())
    made.init_weights()
    expected = dict(create(ls_init_value=0.1).named_parameters())
    for name, parameter in made.named_parameters():
        if expected[name].std() < 1e-6:
            assert torch.equal(parameter, expected[name]), name
        else:
            assert parameter.std().item() == pytest.approx(expected[name].std().item(), rel=0.4), name
    assert made(images(1, 3, 64, 64)).isfinite().all()


def test_scans_of_blocks_begin_vertical_and_horizontal_in_turns():
    model = create(depths=(1, 2), dims=(16, 16), chunk=0, proxy_dim=2)
    mixers = [module for module in model.modules() if isinstance(module, Mixer)]
    assert [mixer.initial_taps for mixer in mixers] == ["vertical", "horizontal", "vertical"]
    rest = [mixer.to_operands.bias[-12:].view(4, 3).sigmoid() for mixer in mixers]
    heaviest = [(taps / taps.sum(1, keepdim=True)).amax(1) for taps in rest]
    vertical = torch.tensor([1 / 3, 1 / 3, 0.9, 0.9])
    for largest, expected in zip(heaviest, (vertical, vertical.flip(0), vertical), strict=True):
        torch.testing.assert_close(largest, expected, atol=0.01, rtol=0)
    leaning = create(depths=(1, 2), dims=(16, 16), chunk=0, proxy_dim=2, initial_taps="diagonal")
    assert {it.initial_taps for it in leaning.modules() if isinstance(it, Mixer)} == {"diagonal"}


def test_far_pixels_matter():
    """Two blocks carry one corner everywhere, the opposite one included, far beyond their convolutions."""
    model = create(depths=(2,), dims=(16,), chunk=0).eval()
    x = images(1, 3, 128, 128)
    poked = x.clone()
    poked[:, :, :4, :4] += 3.0
    with torch.no_grad():
        change = (model.forward_features(poked) - model.forward_features(x)).abs().amax(dim=1)[0]
    assert change[-1, -1] > 1e-5
    assert (change > 0).float().mean() > 0.99
