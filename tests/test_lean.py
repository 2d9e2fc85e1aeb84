"""Layers that keep less for backward are the layers that they stand for, gradients included."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gspn2.models  # noqa: F401 - registers the backbones
from gspn2.nn import GRN, LayerNorm2d
from gspn2.ops import lean

EPS = 1e-6
Inputs = list[Tensor | None]


def draw(dtype: torch.dtype, parameters: torch.dtype, bias: bool = True, device: str = "cpu") -> Inputs:
    """x (2, 5, 3, 24), gain, shift, weight (7, 24), bias."""
    torch.manual_seed(0)
    shapes = ((2, 5, 3, 24), (24,), (24,), (7, 24), (7,))
    dtypes = (dtype, *[parameters] * 4)
    found = [torch.randn(shape).to(device, it) for shape, it in zip(shapes, dtypes, strict=True)]
    return [it.requires_grad_() for it in found[: None if bias else -1]] + ([] if bias else [None])


def lean_gelu(x: Tensor, _gain: Tensor, _shift: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return lean.gelu_linear(x, weight, bias)


def plain_gelu(x: Tensor, _gain: Tensor, _shift: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(F.gelu(x), weight, bias)


def lean_grn(x: Tensor, gain: Tensor, shift: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return lean.grn_linear(x, (gain, shift, EPS), (weight, bias))


def plain_grn(x: Tensor, gain: Tensor, shift: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    response = (x.square().mean((1, 2), keepdim=True) + EPS**2).sqrt()
    relative = response / (response.mean(-1, keepdim=True) + EPS)
    return F.linear(x * (1 + gain * relative) + shift, weight, bias)


def lean_norm(x: Tensor, gain: Tensor, shift: Tensor, _weight: Tensor, _bias: Tensor | None) -> Tensor:
    return lean.norm(x, gain, shift, EPS)


def plain_norm(x: Tensor, gain: Tensor, shift: Tensor, _weight: Tensor, _bias: Tensor | None) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], gain, shift, EPS)


PAIRS = {"gelu": (lean_gelu, plain_gelu), "grn": (lean_grn, plain_grn), "norm": (lean_norm, plain_norm)}


def with_gradients(function: Callable[..., Tensor], inputs: Inputs) -> list[Tensor | None]:
    y = function(*inputs)
    weights = torch.linspace(-1, 1, y.numel(), device=y.device).view(y.shape).to(y)
    wanted = [it for it in inputs if it is not None and it.requires_grad]
    return [y, *torch.autograd.grad((y * weights).sum(), wanted, allow_unused=True)]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", ["gelu", "grn"])
def test_as_the_layers_in_float64(name: str, bias: bool):
    inputs = draw(torch.float64, torch.float64, bias)
    mine, plain = (with_gradients(function, inputs) for function in PAIRS[name])
    for ours, theirs in zip(mine, plain, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", PAIRS)
def test_16_bits_with_float32_weights(name: str, dtype: torch.dtype):
    inputs = draw(dtype, torch.float32)
    mine, _ = PAIRS[name]
    exact: Inputs = [None if it is None else it.detach().double().requires_grad_() for it in inputs]
    # The linear layer takes rounded weights.
    for place in (3, 4):
        exact[place] = inputs[place].detach().to(dtype).double().requires_grad_()  # type: ignore[union-attr]
    results = zip(with_gradients(mine, inputs), with_gradients(PAIRS[name][1], exact), strict=True)
    for place, (ours, theirs) in enumerate(results):
        if ours is None or theirs is None:
            assert ours is theirs
            continue
        # y and dx are of 16 bits, gradients of weights of theirs.
        assert ours.dtype == (dtype if place < 2 else torch.float32)
        size = theirs.abs().max().item()
        bound = {torch.bfloat16: 3e-2, torch.float16: 4e-3}[dtype]
        torch.testing.assert_close(ours.double(), theirs, rtol=0, atol=bound * size)


@pytest.mark.parametrize("frozen", [(0,), (1, 2), (3, 4), (0, 1), (1,), (2,), (4,)])
@pytest.mark.parametrize("name", PAIRS)
def test_what_is_frozen_gets_no_gradient(name: str, frozen: tuple[int, ...]):
    whole = draw(torch.float32, torch.float32)
    mine, _ = PAIRS[name]
    expected = [it for place, it in enumerate(with_gradients(mine, whole)[1:]) if place not in frozen]
    inputs = [it.detach().requires_grad_(place not in frozen) for place, it in enumerate(whole)]  # type: ignore[union-attr]
    for ours, theirs in zip(with_gradients(mine, inputs)[1:], expected, strict=True):
        if theirs is None:
            assert ours is None
        else:
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_a_channel_of_zeros():
    """eps keeps its gradient finite."""
    inputs = draw(torch.float32, torch.float32)
    with torch.no_grad():
        inputs[0][..., 3] = 0  # type: ignore[index]
    mine, plain = (with_gradients(function, inputs) for function in PAIRS["grn"])
    for ours, theirs in zip(mine, plain, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def saved_bytes(function: Callable[[], Any], but: nn.Module) -> int:
    """What backward holds on to, without the weights themselves."""
    weights = {it.untyped_storage().data_ptr() for it in but.parameters()}
    held: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            held[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda it: it):
        function()
    return sum(it.untyped_storage().nbytes() for it in held.values())


def gradients(model: nn.Module, x: Tensor, amp: bool) -> dict[str, Tensor]:
    with torch.autocast(x.device.type, torch.bfloat16, enabled=amp):
        y = model(x).float()
    model.zero_grad()
    (y * torch.linspace(-1, 1, y.numel(), device=y.device).view(y.shape)).sum().backward()
    return {name: it.grad for name, it in model.named_parameters() if it.grad is not None}


def small(device: str = "cpu") -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model("test_gspn2", num_classes=5).to(device, memory_format=torch.channels_last)
    for module in model.modules():
        if isinstance(module, GRN):
            nn.init.normal_(module.weight, std=0.3)
    return model.train()


def test_a_backbone_takes_them_and_keeps_less(monkeypatch: pytest.MonkeyPatch):
    model, x = small(), torch.randn(2, 3, 64, 64)
    expected, before = gradients(model, x, amp=False), saved_bytes(lambda: model(x), model)
    monkeypatch.setattr(lean, "worth_it", lambda x: torch.is_grad_enabled())
    found, after = gradients(model, x, amp=False), saved_bytes(lambda: model(x), model)
    assert after < 0.9 * before
    for name, gradient in expected.items():
        size = gradient.abs().max().item()
        torch.testing.assert_close(found[name], gradient, rtol=0, atol=1e-4 * size + 1e-6, msg=name)


def test_layers_with_hooks_are_called(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(lean, "worth_it", lambda x: torch.is_grad_enabled())
    model, called = small(), []
    for module in model.modules():
        if isinstance(module, (GRN, nn.GELU)):
            module.register_forward_hook(lambda module, *_: called.append(module))
    model(torch.randn(1, 3, 32, 32))
    hooked = [it for it in model.modules() if isinstance(it, (GRN, nn.GELU))]
    assert len(called) == len(hooked)


def test_on_a_cpu_nothing_is_made_again():
    assert not lean.worth_it(torch.ones(1, 2, 3, 4))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("amp", [True, False])
def test_training_on_a_gpu(monkeypatch: pytest.MonkeyPatch, amp: bool):
    model, x = small("cuda"), torch.randn(2, 3, 64, 64, device="cuda")
    with torch.autocast("cuda", torch.bfloat16, enabled=amp):
        x = x.to(memory_format=torch.channels_last)
        after = saved_bytes(lambda: model(x), model)
    found = gradients(model, x, amp)
    monkeypatch.setattr(lean, "worth_it", lambda x: False)
    with torch.autocast("cuda", torch.bfloat16, enabled=amp):
        before = saved_bytes(lambda: model(x), model)
    expected = gradients(model, x, amp)
    assert after < (0.8 if amp else 0.9) * before
    # Of 16 bits small ones are sums of what is mostly rounding: all of them together.
    ours, theirs = (torch.cat([it.flatten() for it in every.values()]) for every in (found, expected))
    assert (ours - theirs).norm() < (3e-2 if amp else 1e-3) * theirs.norm()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_norm_has_the_bits_of_autocast(monkeypatch: pytest.MonkeyPatch):
    layer = LayerNorm2d(24).cuda()
    results = []
    for answer in (True, False):
        monkeypatch.setattr(lean, "worth_it", lambda x, answer=answer: answer)
        torch.manual_seed(1)
        x = torch.randn(2, 24, 5, 7, device="cuda", dtype=torch.bfloat16).requires_grad_()
        with torch.autocast("cuda", torch.bfloat16):
            y = layer(x)
        results.append([y, *torch.autograd.grad(y.float().square().sum(), [x, *layer.parameters()])])
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs)
