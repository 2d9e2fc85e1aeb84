"""LayerNorm of a sum with few proxy channels as an operator of its own, where compiled models are trained."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gspn2.models import blocks
from gspn2.nn.layers import Pointwise
from gspn2.ops import fused
from gspn2.ops.normed_sum import normed_sum, worth_it

EPS = 1e-6


def draw(
    dtype: torch.dtype, parameters: torch.dtype, proxies: int = 2, bias: bool = True, device: str = "cpu"
) -> list[Any]:
    """x, y, weight, bias, gain and shift, for 24 channels; rows that are far from centered."""
    torch.manual_seed(0)

    def tensor(*shape: int, like: torch.dtype) -> Tensor:
        return torch.randn(*shape).to(device, like).requires_grad_()

    x = (torch.randn(2, 5, 3, 24) + 2).to(device, dtype).requires_grad_()
    return [
        x,
        tensor(2, 5, 3, proxies, like=dtype),
        tensor(24, proxies, like=parameters),
        tensor(24, like=parameters) if bias else None,
        tensor(24, like=parameters),
        tensor(24, like=parameters),
    ]


def mine(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor | None, gain: Tensor, shift: Tensor) -> Tensor:
    return normed_sum(x, (y, weight, bias), (gain, shift, EPS))


def plain(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor | None, gain: Tensor, shift: Tensor) -> Tensor:
    return F.layer_norm(x + F.linear(y, weight, bias), x.shape[-1:], gain, shift, EPS)


def with_gradients(function: Any, inputs: list[Any]) -> list[Tensor]:
    n = function(*inputs)
    weights = torch.linspace(-1, 1, n.numel()).view(n.shape).to(n)
    wanted = [it for it in inputs if it is not None]
    return [n, *torch.autograd.grad((n * weights).sum(), wanted)]


def check_16_bits(inputs: list[Any]) -> None:
    """Against float64 from the same rounded numbers."""
    exact = [None if it is None else it.detach().double().requires_grad_() for it in inputs]
    # z and its gradient are rounded, n and the gradients are once more.
    rounding = {torch.bfloat16: 2e-2, torch.float16: 3e-3}[inputs[0].dtype]
    found = [part.detach() for part in with_gradients(mine, inputs)]
    right = [part.detach().to(found[0].device) for part in with_gradients(plain, exact)]
    for part, exactly in zip(found, right, strict=True):
        assert float((part.double() - exactly).norm() / exactly.norm()) < rounding
    for part, given in zip(found[1:], [it for it in inputs if it is not None], strict=True):
        assert part.dtype == given.dtype


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("proxies", [1, 2, 4])
def test_is_the_norm_of_the_sum(proxies: int, bias: bool) -> None:
    inputs = draw(torch.float64, torch.float64, proxies, bias)
    for found, right in zip(with_gradients(mine, inputs), with_gradients(plain, inputs), strict=True):
        torch.testing.assert_close(found, right)


@pytest.mark.parametrize("parameters", [torch.float32, None], ids=["float32", "same"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_in_16_bits(dtype: torch.dtype, parameters: torch.dtype | None) -> None:
    check_16_bits(draw(dtype, parameters or dtype))


def test_operator_tells_the_truth_about_itself() -> None:
    for bias in (True, False):
        inputs = draw(torch.float32, torch.float32, bias=bias)[:4]
        torch.library.opcheck(torch.ops.gspn2.normed_sum, (*inputs, EPS))


def test_what_is_not_a_number_stays_in_its_pixel() -> None:
    inputs = draw(torch.bfloat16, torch.float32)
    with torch.no_grad():
        inputs[0][0, 0, 0, 5] = torch.nan
        inputs[0][1, 2, 1, 0] = torch.inf
        expected = torch.zeros(2, 5, 3, dtype=torch.bool)
        expected[0, 0, 0] = expected[1, 2, 1] = True
        found = mine(*inputs).isnan()
    assert torch.equal(found.all(-1), expected)
    assert torch.equal(found.any(-1), expected)


def test_second_derivatives_are_refused() -> None:
    inputs = draw(torch.float64, torch.float64)
    (dx,) = torch.autograd.grad(mine(*inputs).square().sum(), inputs[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


def trained(model: nn.Module, x: Tensor, runner: Any = None) -> list[Tensor]:
    model.zero_grad()
    x = x.detach().requires_grad_()
    y = (model if runner is None else runner)(x)
    y.float().square().mean().backward()
    return [y.detach(), x.grad, *(parameter.grad for parameter in model.parameters())]


@pytest.mark.parametrize("compiled", [False, True])
def test_a_model_that_takes_it_is_the_same(compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = timm.create_model("test_gspn2", num_classes=5)
    x = torch.randn(2, 3, 64, 96)
    right = trained(model, x)
    called: list[int] = []

    def spy(x: Tensor, *rest: Any) -> Tensor:
        called.append(x.shape[-1])
        return normed_sum(x, *rest)

    monkeypatch.setattr(blocks, "worth_it", lambda x: True)
    monkeypatch.setattr(blocks, "normed_sum", spy)
    torch._dynamo.reset()
    runner = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
    for found, exactly in zip(trained(model, x, runner), right, strict=True):
        torch.testing.assert_close(found, exactly, rtol=1e-3, atol=1e-5)
    assert called == [24, 48, 72, 72, 96]


def test_only_layers_as_they_were_made(monkeypatch: pytest.MonkeyPatch) -> None:
    class Adapted(Pointwise):
        pass

    monkeypatch.setattr(blocks, "worth_it", lambda x: True)

    def refuse(*_: Any) -> Tensor:
        raise AssertionError

    monkeypatch.setattr(blocks, "normed_sum", refuse)
    x, seen = torch.randn(1, 16, 8, 8), []
    many = blocks.GSPNModule(16, 1.5, 3, proxy_dim=fused.MOST_PROXIES + 1)
    adapted = blocks.GSPNModule(16, 1.5, 3, proxy_dim=2)
    adapted.mixer.from_proxy = Adapted(2, 24)
    hooked = blocks.GSPNModule(16, 1.5, 3, proxy_dim=2)
    for part in (hooked.mixer, hooked.mixer.from_proxy, hooked.norm2):
        part.register_forward_hook(lambda *_: seen.append(1))
        assert hooked(x).shape == x.shape
    assert len(seen) == 6
    for module in (many, adapted):
        assert module(x).shape == x.shape


def test_not_where_it_does_not_pay() -> None:
    x = torch.randn(2, 16, 4, 4, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
    assert not worth_it(x)  # not compiled
    assert not torch.compile(worth_it, backend="eager")(x)  # not on a GPU


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("proxies", [1, 2, 4])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_on_a_gpu(dtype: torch.dtype, proxies: int, bias: bool) -> None:
    inputs = draw(dtype, torch.float32, proxies, bias, device="cuda")
    assert fused._takes(inputs[0], 24)
    check_16_bits(inputs)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("channels", [8, 96, 576, 1536, 2048])
def test_every_width_on_a_gpu(channels: int) -> None:
    """The same bits on every run, and rows up to the last one."""
    torch.manual_seed(0)
    x, y = (torch.randn(3, 7, 11, c, device="cuda").bfloat16() for c in (channels, 2))
    weight, bias = torch.randn(channels, 2, device="cuda"), torch.randn(channels, device="cuda")
    z, scale = torch.ops.gspn2.normed_sum(x, y, weight, bias, EPS)
    exact = torch.ops.gspn2.normed_sum(*(it.double().cpu() for it in (x, y, weight, bias)), EPS)
    assert float((z.double().cpu() - exact[0]).abs().max() / exact[0].abs().max()) < 5e-3
    torch.testing.assert_close(scale.double().cpu(), exact[1], rtol=1e-4, atol=0)
    again = torch.ops.gspn2.normed_sum(x, y, weight, bias, EPS)
    assert torch.equal(z, again[0])
    assert torch.equal(scale, again[1])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_compiled_training_on_a_gpu(dtype: torch.dtype) -> None:
    """Results and gradients of a compiled model are about as far from float32 as an eager one's."""
    torch.manual_seed(0)
    model = timm.create_model("test_gspn2", num_classes=5).cuda().to(memory_format=torch.channels_last)
    x = torch.randn(4, 3, 64, 96).cuda()
    exact = trained(model, x)

    def error(runner: Any) -> float:
        """The largest of a parameter, beside its gradient and a hundredth of that of all."""
        with torch.autocast("cuda", dtype):
            y = runner(x)
        model.zero_grad()
        (1024 * y.float().square().mean()).backward()
        found = [y.detach(), *(parameter.grad / 1024 for parameter in model.parameters())]
        right = [exact[0], *exact[2:]]
        floor = 0.01 * float(torch.cat([part.flatten() for part in right[1:]]).norm())
        pairs = zip(found, right, strict=True)
        return max(float((mine.float() - part).norm() / (part.norm() + floor)) for mine, part in pairs)

    torch._dynamo.reset()
    assert error(torch.compile(model, fullgraph=True)) < 2 * error(model) + 0.05
