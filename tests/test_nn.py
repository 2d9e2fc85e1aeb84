"""The mixer, its token wrapper and the block parts."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import gspn2
from gspn2.backends.cuda.layouts import record_padding
from gspn2.nn import FFN, GRN, LPU, DropPath, LayerNorm2d, Mixer, Operands, TokenMixer

pytestmark = pytest.mark.filterwarnings("ignore:gspn2 runs the slow reference")

DIM = 12
VARIANTS = [
    pytest.param({}, id="default"),
    pytest.param({"operands_from": "input"}, id="input"),
    pytest.param({"groups": 4}, id="per-channel"),
    pytest.param({"groups": 2, "operands_from": "input"}, id="grouped-input"),
    pytest.param({"chunk": 3}, id="local"),
    pytest.param({"directions": ("left", "down")}, id="two-directions"),
    pytest.param({"lam": False}, id="no-lam"),
    pytest.param({"gate": False}, id="no-gate"),
    pytest.param({"lam": False, "gate": False, "operands_from": "input"}, id="taps-only"),
    pytest.param({"bias": False}, id="no-bias"),
    pytest.param({"bias": False, "operands_from": "input"}, id="no-bias-input"),
]


def image(*shape: int, seed: int = 0, channels_last: bool = True, **options) -> Tensor:
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), **options)
    return x.contiguous(memory_format=torch.channels_last) if channels_last else x


def seeded(module_type, *args, seed: int = 0, **options):
    torch.manual_seed(seed)
    return module_type(*args, **options)


def shake(module: nn.Module) -> None:
    """Move every parameter away from its initial value, so that none is 0 or 1 by design."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)


class Recorder(TorchDispatchMode):
    """Names of all operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def written_out(mixer: Mixer, x: Tensor) -> Tensor:
    """The mixer's definition, pixel matrices and all, with no folding of weights."""
    batch, _, height, width = x.shape
    scans, channels = len(mixer.directions), mixer.proxy_dim
    pixels = x.permute(0, 2, 3, 1)

    def linear(layer, source):
        product = source @ layer.weight.T
        return product if layer.bias is None else product + layer.bias

    proxy = linear(mixer.to_proxy, pixels)
    made = linear(mixer.to_operands, proxy if mixer.operands_from == "proxy" else pixels)
    lam, gate, logits = made.split(mixer.sizes, dim=-1)
    ones = torch.ones(batch, height, width, scans * channels, dtype=x.dtype)
    lam = (lam if lam.shape[-1] else ones).reshape(batch, height, width, scans, channels)
    gate = (gate if gate.shape[-1] else ones).reshape(batch, height, width, scans, channels)
    logits = logits.reshape(batch, height, width, scans, mixer.groups, 3)
    y = torch.zeros(batch, channels, height, width, dtype=x.dtype)
    for d, direction in enumerate(mixer.directions):
        lines = height if direction in ("down", "up") else width
        lines = lines if mixer.chunk is None else min(lines, mixer.chunk)
        y += (
            mixer.merge[d, :, None, None]
            / lines
            * gspn2.propagate(
                proxy.permute(0, 3, 1, 2),
                logits[:, :, :, d : d + 1].permute(0, 3, 4, 5, 1, 2),
                lam[:, :, :, d : d + 1].permute(0, 3, 4, 1, 2),
                gate[:, :, :, d : d + 1].permute(0, 3, 4, 1, 2),
                directions=(direction,),
                chunk=mixer.chunk,
            )
        )
    return linear(mixer.from_proxy, y.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


@pytest.mark.parametrize("options", VARIANTS)
@pytest.mark.parametrize("size", [(5, 7), (8, 8), (1, 6), (1, 1)])
def test_mixer_is_its_definition(options, size):
    mixer = seeded(Mixer, DIM, 4, **options).double()
    shake(mixer)
    x = image(2, DIM, *size, dtype=torch.float64)
    torch.testing.assert_close(mixer(x), written_out(mixer, x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("options", VARIANTS)
def test_mixer_gradients_are_those_of_its_definition(options):
    mixer = seeded(Mixer, DIM, 4, **options).double()
    shake(mixer)
    x = image(2, DIM, 5, 6, dtype=torch.float64).requires_grad_()
    leaves = [x, *mixer.parameters()]
    dy = image(2, DIM, 5, 6, seed=3, dtype=torch.float64)
    for got, expected in zip(
        torch.autograd.grad(mixer(x), leaves, dy),
        torch.autograd.grad(written_out(mixer, x), leaves, dy),
        strict=True,
    ):
        assert expected.abs().max() > 0
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("operands_from", ["proxy", "input"])
@pytest.mark.parametrize("batch", [1, 3])
def test_operands_are_views_of_one_channels_last_tensor(operands_from, batch):
    mixer = seeded(Mixer, DIM, 4, operands_from=operands_from)
    operands = mixer.operands(image(batch, DIM, 6, 5))
    assert isinstance(operands, Operands)
    assert operands.x.shape == (batch, 4, 6, 5)
    assert operands.logits.shape == (batch, 4, 1, 3, 6, 5)
    assert operands.lam.shape == operands.gate.shape == (batch, 4, 4, 6, 5)
    packed = 4 * (4 + 4 + 3) + (4 if operands_from == "input" else 0)
    assert mixer.padding == 0
    for tensor in (operands.logits, operands.lam, operands.gate):
        assert tensor.stride()[-2:] == (5 * packed, packed)
        assert tensor.untyped_storage().data_ptr() == operands.lam.untyped_storage().data_ptr()
        assert tensor.untyped_storage().nbytes() == batch * 6 * 5 * packed * 4
    shared = operands.x.untyped_storage().data_ptr() == operands.lam.untyped_storage().data_ptr()
    assert shared == (operands_from == "input")
    assert operands.x.stride()[1] == 1


@pytest.mark.parametrize("operands_from", ["proxy", "input"])
def test_wide_records_are_padded_to_vectors(operands_from):
    """As the planner imagines them; parameters and results are what they would be without."""
    mixer = seeded(Mixer, DIM, 16, operands_from=operands_from)
    assert sum(mixer.sizes) == 4 * (16 + 16 + 3)
    assert mixer.padding == record_padding(16, sum(mixer.sizes)) == 4
    x = image(2, DIM, 6, 5)
    operands = mixer.operands(x)
    packed = 4 * (16 + 16 + 3) + 4 + (16 if operands_from == "input" else 0)
    for tensor in (operands.logits, operands.lam, operands.gate):
        assert tensor.stride()[-2:] == (5 * packed, packed)
    assert mixer.to_operands.weight.shape[0] == sum(mixer.sizes)
    expected = written_out(mixer, x)
    torch.testing.assert_close(mixer(x), expected)
    mixer(x).sum().backward()
    found = mixer.to_operands.weight.grad
    mixer.zero_grad()
    written_out(mixer, x).sum().backward()
    torch.testing.assert_close(found, mixer.to_operands.weight.grad)


@pytest.mark.parametrize("operands_from", ["proxy", "input"])
def test_no_layout_copies_and_one_cat_in_backward(operands_from):
    mixer = seeded(Mixer, DIM, 4, operands_from=operands_from)
    x = image(2, DIM, 6, 5).requires_grad_()
    with Recorder() as forward:
        y = mixer(x)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert not {"clone", "copy_", "contiguous", "_to_copy"} & set(forward.names)
    with Recorder() as backward:
        y.backward(torch.ones_like(y))
    assert not {"slice_backward", "select_backward", "split_with_sizes_backward"} & set(backward.names)
    assert backward.names.count("cat") == 1
    assert not {"clone", "contiguous", "_to_copy"} & set(backward.names)


def test_mixer_takes_any_layout():
    mixer = seeded(Mixer, DIM, 4)
    plain = image(2, DIM, 6, 9, channels_last=False)
    expected = mixer(plain)
    torch.testing.assert_close(mixer(plain.contiguous(memory_format=torch.channels_last)), expected)
    strided = torch.zeros(2, DIM, 12, 18)[:, :, ::2, ::2].copy_(plain)
    torch.testing.assert_close(mixer(strided), expected)


@pytest.mark.parametrize("options", VARIANTS)
def test_projections_with_something_around_them_are_called(options):
    """What an adapter or a hook makes of lam, gate, taps and proxy counts; nothing else changes."""
    mixer = seeded(Mixer, DIM, 4, **options)
    shake(mixer)
    x = image(2, DIM, 5, 7)
    expected = mixer(x)
    called = []
    for name in ("to_proxy", "to_operands", "from_proxy"):
        mixer.get_submodule(name).register_forward_hook(lambda *_, name=name: called.append(name))
    torch.testing.assert_close(mixer(x), expected)
    assert called == ["to_proxy", "to_operands", "from_proxy"]

    class Doubled(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.weight, self.bias, self.inner = inner.weight, inner.bias, inner

        def forward(self, x: Tensor) -> Tensor:
            return 2 * self.inner(x)

    for name in ("to_proxy", "to_operands"):
        adapted = seeded(Mixer, DIM, 4, **options)
        adapted.load_state_dict(mixer.state_dict())
        setattr(adapted, name, Doubled(getattr(adapted, name)))
        doubled = seeded(Mixer, DIM, 4, **options)
        doubled.load_state_dict(mixer.state_dict())
        with torch.no_grad():
            for parameter in getattr(doubled, name).parameters():
                parameter *= 2
        torch.testing.assert_close(adapted(x), doubled(x))


def test_looking_at_operands_gives_what_forward_mixes():
    mixer = seeded(Mixer, DIM, 4, chunk=3, directions=("right", "up"))
    x = image(2, DIM, 6, 5)
    y = gspn2.propagate(*mixer.operands(x), directions=mixer.directions, chunk=mixer.chunk)
    torch.testing.assert_close(mixer.from_proxy(y), mixer(x))


@pytest.mark.parametrize("constant", [False, True], ids=["noise", "constant"])
@pytest.mark.parametrize(
    ("proxy_dim", "size", "options"),
    [(2, 8, {"operands_from": "input"}), (8, 24, {}), (32, 16, {"groups": 32}), (8, 16, {"chunk": 4})],
)
def test_hundred_fresh_mixers_are_stable(constant, proxy_dim, size, options):
    """Noise averages out and a constant adds up: between them lies every image."""
    torch.manual_seed(0)
    depth, dim = 100, 32
    mixers = [Mixer(dim, proxy_dim, **options) for _ in range(depth)]
    x = image(1, dim, 1, 1) if constant else image(1, dim, size, size)
    x = x.expand(1, dim, size, size).clone(memory_format=torch.channels_last).requires_grad_()
    h = x
    for mixer in mixers:
        h = h + mixer(h)
        ratio = (h.square().mean() / x.square().mean()).sqrt().item()
        assert 0.3 < ratio < 10
    (h * image(*h.shape, seed=1)).sum().backward()
    assert 0.3 < x.grad.square().mean().sqrt() < 10
    norms = [[p.grad.norm().item() for p in mixer.parameters()] for mixer in (mixers[0], mixers[-1])]
    for first, last in zip(*norms, strict=True):
        assert 0.02 < first / last < 50


@pytest.mark.parametrize("proxy_dim", [2, 16])
@pytest.mark.parametrize("corner", [(0, 0), (0, -1), (-1, 0), (-1, -1)])
def test_a_fresh_mixer_joins_opposite_corners(proxy_dim, corner):
    mixer = seeded(Mixer, DIM, proxy_dim)
    x = image(1, DIM, 64, 64)
    poked = x.clone()
    poked[:, :, corner[0], corner[1]] += 1.0
    with torch.no_grad():
        change = (mixer(poked) - mixer(x)).abs().amax(dim=(0, 1))
    opposite = change[-1 - corner[0], -1 - corner[1]].item()
    rounding = torch.finfo(torch.float32).eps * mixer(x).abs().max().item()
    assert opposite > 10 * rounding


@pytest.mark.parametrize(
    ("taps", "along", "beside"),
    [
        ("straight", [(0, 40), (40, 0)], [(40, 40), (40, -40)]),
        ("diagonal", [(40, 40), (40, -40)], [(0, 40), (40, 0)]),
        ("vertical", [(40, 0), (40, -40)], [(0, 40), (40, 40)]),
        ("horizontal", [(0, 40), (40, 40)], [(40, 0), (40, -40)]),
    ],
)
def test_where_a_fresh_mixer_carries_a_pixel(taps, along, beside):
    """Straight scans go along rows or columns, diagonal ones along diagonals: 40 lines on it is there."""
    mixer = seeded(Mixer, DIM, 4, initial_taps=taps)
    x = image(1, DIM, 96, 96)
    poked = x.clone()
    poked[:, :, 48, 48] += 1.0
    with torch.no_grad():
        change = (mixer.double()(poked.double()) - mixer(x.double())).square().sum(dim=(0, 1)).sqrt()

    def sent(to):
        # As wide as the bell of straight scans; those that lean stay a little behind their diagonal.
        places = [(s * y + 48, s * x + 48) for s in (1, -1) for y, x in to]
        return sum(change[max(0, y - 6) : y + 7, max(0, x - 6) : x + 7].sum().item() for y, x in places)

    assert sent(along) > 100 * sent(beside)


def test_initial_taps_are_known():
    with pytest.raises(ValueError, match=r"initial_taps: expected one of straight, diagonal, .*got 'curved'"):
        Mixer(DIM, 4, initial_taps="curved")


def test_amplitude_does_not_depend_on_image_size():
    mixer = seeded(Mixer, DIM, 4)
    pixel = image(1, DIM, 1, 1)
    sizes = [(16, 16), (64, 64), (16, 64)]
    with torch.no_grad():
        means = [mixer(pixel.expand(1, DIM, *size)).mean(dim=(2, 3)) for size in sizes]
    for mean in means[1:]:
        torch.testing.assert_close(mean, means[0], rtol=0.1, atol=0.01)


def test_local_mixer_stays_in_its_chunk():
    mixer = seeded(Mixer, DIM, 4, chunk=4, directions=("down",))
    x = image(1, DIM, 12, 5)
    poked = x.clone()
    poked[:, :, 4:8] += 1.0
    with torch.no_grad():
        changed = (mixer(poked) != mixer(x)).any(dim=1).any(dim=0).any(dim=1)
    assert changed.tolist() == [4 <= row < 8 for row in range(12)]


@pytest.mark.parametrize("operands_from", ["proxy", "input"])
def test_mixer_under_autocast(operands_from):
    mixer = seeded(Mixer, DIM, 4, operands_from=operands_from)
    x = image(2, DIM, 6, 5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = mixer(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), mixer(x), rtol=0.05, atol=0.01)


@pytest.mark.parametrize("options", [{}, {"gate": False}, {"operands_from": "input", "chunk": 4}])
def test_mixer_compiles_once_for_all_sizes(options):
    mixer = seeded(Mixer, DIM, 4, **options)
    torch._dynamo.reset()
    compiles = 0

    def count(graph, example_inputs):
        nonlocal compiles
        compiles += 1
        return graph.forward

    compiled = torch.compile(mixer, fullgraph=True, dynamic=True, backend=count)
    for size in [(6, 5), (8, 12), (9, 7), (13, 11)]:
        x = image(2, DIM, *size)
        torch.testing.assert_close(compiled(x), mixer(x))
    assert compiles == 1


@pytest.mark.parametrize("assign", [False, True])
def test_mixer_is_its_parameters(assign):
    """Nothing is lost over the device "meta", where large models are made."""
    mixer = seeded(Mixer, DIM, 4)
    assert set(mixer.state_dict()) == {name for name, _ in mixer.named_parameters()}
    with torch.device("meta"):
        other = Mixer(DIM, 4)
    other = other if assign else other.to_empty(device="cpu")
    other.load_state_dict(mixer.state_dict(), assign=assign)
    x = image(1, DIM, 4, 7)
    assert torch.equal(other(x), mixer(x))


def test_mixer_refuses_by_name():
    for arguments, options, message in [
        ((DIM, 0), {}, "proxy_dim: expected at least 1, got 0"),
        ((0, 2), {}, "dim: expected at least 1, got 0"),
        ((DIM, 4), {"groups": 3}, "groups: expected a divisor of proxy_dim = 4, got 3"),
        ((DIM, 4), {"chunk": 0}, "chunk: expected at least 1, got 0"),
        ((DIM, 4), {"operands_from": "x"}, "operands_from: expected one of proxy, input, got 'x'"),
        ((DIM, 4), {"directions": ()}, "directions: expected some of"),
        ((DIM, 4), {"directions": ("up", "up")}, "none twice"),
        ((DIM, 4), {"directions": ("north",)}, "north"),
    ]:
        with pytest.raises(ValueError, match=message):
            Mixer(*arguments, **options)
    for directions in ("up", {"up", "down"}, None):
        with pytest.raises(TypeError, match="directions: expected a sequence of names"):
            Mixer(DIM, 4, directions=directions)
    for name in ("lam", "gate", "bias", "keep_hidden"):
        with pytest.raises(TypeError, match=f"{name}: expected True or False, got 2"):
            Mixer(DIM, 4, **{name: 2})
    with pytest.raises(TypeError, match=r"proxy_dim: expected an int, got 2\.0"):
        Mixer(DIM, 2.0)
    with pytest.raises(ValueError, match=r"x: expected \(B, 12, H, W\), got shape \(1, 5, 4, 4\)"):
        Mixer(DIM, 4)(torch.zeros(1, 5, 4, 4))


@pytest.mark.parametrize("prefix", [0, 2])
def test_token_mixer_mixes_the_grid_and_nothing_else(prefix):
    tokens = seeded(TokenMixer, DIM, 4, prefix_tokens=prefix, operands_from="input")
    x = image(2, prefix + 15, DIM, channels_last=False)
    y = tokens(x, (3, 5))
    grid = x[:, prefix:].transpose(1, 2).unflatten(2, (3, 5))
    torch.testing.assert_close(y[:, prefix:], tokens.mixer(grid).flatten(2).transpose(1, 2))
    assert torch.equal(y[:, :prefix], x[:, :prefix])
    assert not torch.allclose(tokens(x, (5, 3))[:, prefix:], y[:, prefix:])


def test_token_mixer_never_guesses_the_grid():
    tokens = TokenMixer(DIM, 4)
    with pytest.raises(ValueError, match=r"grid: expected H \* W = .* = 17 - 0 = 17, got 4 x 4 = 16"):
        tokens(torch.zeros(1, 17, DIM), (4, 4))
    with pytest.raises(ValueError, match="announced by prefix_tokens"):
        TokenMixer(DIM, 4, prefix_tokens=2)(torch.zeros(1, 17, DIM), (4, 4))
    with pytest.raises(ValueError, match="grid"):
        tokens(torch.zeros(1, 16, DIM), (-4, -4))
    with pytest.raises(ValueError, match=r"x: expected \(B, N, 12\)"):
        tokens(torch.zeros(1, DIM, 4, 4), (4, 4))
    for grid in (4, (4.0, 4), "44", (4, 4, 1)):
        with pytest.raises(TypeError, match=r"grid: expected \(H, W\), two whole numbers, got"):
            tokens(torch.zeros(1, 16, DIM), grid)
    with pytest.raises(ValueError, match="prefix_tokens: expected at least 0, got -1"):
        TokenMixer(DIM, 4, prefix_tokens=-1)
    with pytest.raises(TypeError, match=r"prefix_tokens: expected an int, got 1\.5"):
        TokenMixer(DIM, 4, prefix_tokens=1.5)


def test_lpu_adds_a_depthwise_convolution():
    lpu = seeded(LPU, DIM)
    x = image(2, DIM, 5, 6)
    assert lpu.conv.weight.shape == (DIM, 1, 3, 3)
    torch.testing.assert_close(lpu(x) - x, lpu.conv(x))


def test_what_is_put_around_an_lpus_convolution_sees_its_whole_input():
    lpu = LPU(DIM)
    x, other = torch.randn(2, 1, DIM, 5, 6)
    expected = lpu(x, other)
    seen = []
    lpu.conv.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    torch.testing.assert_close(lpu(x, other), expected)
    assert torch.equal(seen[0], x + other)


def test_grn_is_its_formula_and_starts_as_identity():
    grn = GRN(DIM)
    x = image(2, DIM, 5, 6)
    torch.testing.assert_close(grn(x), x)
    shake(grn)
    response = torch.linalg.vector_norm(x, dim=(2, 3), keepdim=True)
    relative = response / response.mean(dim=1, keepdim=True)
    weight, bias = grn.weight[:, None, None], grn.bias[:, None, None]
    torch.testing.assert_close(grn(x), weight * (x * relative) + bias + x, rtol=1e-4, atol=1e-5)


def test_grn_survives_blank_images_and_half_precision():
    grn = GRN(DIM)
    shake(grn)
    x = torch.zeros(1, DIM, 4, 4, requires_grad=True)
    grn(x).sum().backward()
    assert torch.isfinite(x.grad).all()
    large = image(1, DIM, 4, 4) * 1e3
    half = grn.half()(large.half())
    assert half.dtype == torch.float16
    torch.testing.assert_close(half.float(), grn.float()(large), rtol=5e-3, atol=1.0)


def test_layer_norm_is_over_channels():
    norm = LayerNorm2d(DIM)
    shake(norm)
    x = image(2, DIM, 5, 6)
    expected = nn.functional.layer_norm(x.movedim(1, -1), (DIM,), norm.weight, norm.bias, 1e-6).movedim(-1, 1)
    torch.testing.assert_close(norm(x), expected)
    assert norm(x).is_contiguous(memory_format=torch.channels_last)


def test_drop_path_drops_samples_and_keeps_the_mean():
    torch.manual_seed(0)
    drop = DropPath(0.25)
    x = torch.ones(4000, 1, 2, 2)
    y = drop(x)
    kept = y[:, 0, 0, 0]
    assert torch.equal(y, kept[:, None, None, None].expand_as(y))
    assert kept.unique().tolist() == [0.0, pytest.approx(4 / 3)]
    assert y.mean().item() == pytest.approx(1.0, abs=0.03)
    assert drop.eval()(x) is x
    with pytest.raises(ValueError, match=r"rate: expected a probability in \[0, 1\), got 1.0"):
        DropPath(1.0)


def test_ffn_has_its_lpu_and_two_residuals():
    ffn = seeded(FFN, DIM, 4.0, layer_scale=0.5)
    x = image(2, DIM, 5, 6)
    local = ffn.lpu(x)
    branch = ffn.fc2(nn.functional.gelu(ffn.fc1(ffn.norm(local))))
    assert ffn.fc1.weight.shape == (4 * DIM, DIM)
    torch.testing.assert_close(ffn(x), local + 0.5 * branch)
    torch.manual_seed(0)
    dropped = FFN(DIM, drop_path=0.999)
    torch.testing.assert_close(dropped(x), dropped.lpu(x))
