"""Fused operators: kernels in Triton's interpreter, operators without a GPU, their place in the layers."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import gspn2.models  # noqa: F401  (registers them with timm)
from cuda_emulator import compiler, run_launch
from cuda_emulator.memory import Memory
from gspn2.backends.cuda import response
from gspn2.backends.cuda.geometry import Device
from gspn2.nn import FFN
from gspn2.nn.layers import Pointwise, _Gelu, _gelu, is_plain
from gspn2.ops import fused

EPS = 1e-6


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton comes with PyTorch's CUDA wheels")
def test_kernels() -> None:
    script = Path(__file__).with_name("fused_kernels.py")
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "all kernels agree" in done.stdout


@pytest.mark.skipif(compiler() is None, reason="the emulator needs g++ 12 on Linux")
@pytest.mark.parametrize(
    ("shape", "proxies", "dtype", "parameters", "whole"),
    [
        ((2, 37, 96), 2, torch.bfloat16, torch.float32, False),
        ((1, 70, 120), 2, torch.float16, torch.float16, False),
        ((2, 21, 96), 2, torch.bfloat16, torch.float32, True),
        ((1, 11, 144), 1, torch.float16, torch.float16, True),
        ((2, 9, 576), 0, torch.bfloat16, torch.bfloat16, True),
    ],
    ids=str,
)
def test_response_kernel(
    shape: tuple[int, int, int],
    proxies: int,
    dtype: torch.dtype,
    parameters: torch.dtype,
    whole: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Half a warp and a whole one a pixel, lanes without a pair, images in shares, no proxies."""
    torch.manual_seed(0)
    monkeypatch.setattr(response, "_ROUNDS", 1)
    device, (batch, pixels, channels) = Device(multiprocessors=1), shape
    names = ("gain", "shift", "weight", "bias")
    given = {name: torch.randn(channels).to(parameters) for name in names}
    mixed = {"y": torch.randn(batch, pixels, proxies).to(dtype)}
    mixed |= {"proxy_weight": torch.randn(channels, proxies).to(parameters)}
    mixed |= {"proxy_bias": torch.randn(channels).to(parameters)}
    x = torch.randn(shape).to(dtype) + 2
    problem = response.Problem(*shape, proxies, dtype, parameters)
    launch, arguments = response.plan(problem, (EPS, EPS), whole, device)
    sums = (batch, launch.grid // batch, 2, channels)
    empty = {"to": shape} if whole else {"means": shape[:2], "scales": shape[:2], "sums": sums}
    found = {
        name: torch.full(size, torch.nan, dtype=dtype if whole else None) for name, size in empty.items()
    }
    present = {"x": x, **(mixed if proxies else {}), **given, **found}
    memory = Memory(present, set(found))
    order = ("x", "y", "proxy_weight", "proxy_bias", *names, "means", "scales", "sums", "to")
    addresses = [memory.tensors[name].data_ptr() if name in present else 0 for name in order]
    packed = b"".join(address.to_bytes(8, "little") for address in addresses)
    run_launch(launch, packed + arguments[len(packed) :], memory, 1, device)
    assert not memory.wrongly_written()
    memory.copy_back()

    v = x.double()
    if proxies:
        v = v + F.linear(*(mixed[name].double() for name in ("y", "proxy_weight", "proxy_bias")))
    mean, scale = v.mean(2), (v.var(2, unbiased=False) + EPS).rsqrt()
    z = (v - mean[..., None]) * scale[..., None]
    if not whole:
        assert sums[1] > 1 or pixels < 64
        torch.testing.assert_close(found["means"].double(), mean, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found["scales"].double(), scale, rtol=1e-5, atol=0)
        right = torch.stack((z.sum(1), z.square().sum(1)), 1)
        torch.testing.assert_close(found["sums"].double().sum(1), right, rtol=1e-5, atol=1e-4)
        return
    gain, shift, weight, bias = (given[name].double() for name in names)
    n = z * gain + shift
    r = (n.square().mean(1, keepdim=True) + EPS**2).sqrt()
    right = n * (1 + weight * r / (r.mean(2, keepdim=True) + EPS)) + bias
    rounding = {torch.bfloat16: 8e-3, torch.float16: 1e-3}[dtype]
    torch.testing.assert_close(found["to"].double(), right, rtol=rounding, atol=rounding / 2)


def _calls(dtype: torch.dtype, device: str = "cpu") -> dict[str, tuple[Any, tuple[Any, ...]]]:
    """Operator and arguments, by name: images of 16 channels."""
    torch.manual_seed(0)

    def draw(*shape: int, like: torch.dtype = dtype) -> Tensor:
        return torch.randn(*shape).to(device, like)

    channel = [draw(16, like=torch.float32) for _ in range(6)]
    x, wide, back = draw(2, 5, 3, 16), (draw(64, 16), draw(64)), (draw(16, 64), draw(16))
    ops = torch.ops.gspn2
    norm = (channel[0], channel[1], EPS)
    return {
        "ffn": (ops.fused_ffn, (x, *norm, *wide, *back, True)),
        "norm_linear": (ops.fused_norm_linear, (x, *norm, *wide)),
        "narrow_linear": (ops.fused_narrow_linear, (x, draw(7, 16), draw(7))),
        "linear_gelu": (ops.fused_linear_gelu, (x, *wide)),
        "stem": (ops.fused_stem, (draw(2, 9, 6, 3), draw(16, 3, 3, 3), draw(16), 2, *norm)),
        "response": (
            ops.fused_response,
            (
                x,
                draw(2, 5, 3, 2),
                draw(16, 2, like=torch.float32),
                *channel[2:3],
                *norm,
                *channel[3:5],
                EPS,
                *wide,
            ),
        ),
    }


@pytest.mark.parametrize("name", list(_calls(torch.float32)))
def test_operators_tell_the_truth_about_themselves(name: str) -> None:
    op, arguments = _calls(torch.float32)[name]
    torch.library.opcheck(op, arguments, test_utils=("test_schema", "test_faketensor"))
    x = arguments[0].requires_grad_()
    with pytest.raises(RuntimeError, match="no gradient"):
        op(*arguments).sum().backward()
    assert x.grad is None


@pytest.mark.parametrize(
    "options",
    [
        {"dims": (16, 32, 48, 160)},
        {"proxy_dim": 8, "ls_init_value": 0.3, "drop_path_rate": 0.1, "in_chans": 1},
    ],
    ids=["tiny", "scaled"],
)
def test_a_fused_model_is_the_same_function(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = timm.create_model("test_gspn2", num_classes=5, **options).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
        x = torch.randn(2, model.in_chans, 64, 96)
        right = model(x)
        called: list[str] = []
        monkeypatch.setattr(fused, "at_work", lambda x: not torch.is_grad_enabled())
        for name in ("ffn", "norm_linear", "linear_gelu", "narrow_linear", "stem", "response"):
            function = getattr(fused, name)
            spy = lambda *a, f=function, n=name: called.append(n) or f(*a)  # noqa: E731
            monkeypatch.setattr(fused, name, spy)
        torch.testing.assert_close(model(x), right, rtol=1e-4, atol=1e-5)
    assert {"ffn", "norm_linear", "stem", "response"} <= set(called)
    assert ("linear_gelu" in called) == ("dims" in options)


def test_counted_like_what_they_replace(monkeypatch: pytest.MonkeyPatch) -> None:
    model = timm.create_model("test_gspn2", dims=(16, 32, 48, 160)).eval().to("meta")
    x = torch.empty(1, 3, 64, 64, device="meta")
    counts = []
    for at_work in (False, True):
        monkeypatch.setattr(fused, "at_work", lambda x, answer=at_work: answer)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(x)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1]


def test_layers_that_were_replaced_are_not_fused(monkeypatch: pytest.MonkeyPatch) -> None:
    """An adapter in the place of a linear layer has weights of its own."""

    class Adapted(Pointwise):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    ffn = FFN(16).eval()
    ffn.fc2 = Adapted(64, 16)
    assert is_plain(ffn.fc1, ffn.norm, ffn.act)
    assert not is_plain(ffn.fc2)
    with torch.no_grad():
        x = torch.randn(1, 16, 4, 4)
        right = ffn(x)
        monkeypatch.setattr(fused, "at_work", lambda x: True)
        torch.testing.assert_close(ffn(x), right)


def test_gelu_of_16_bits() -> None:
    """Values and slopes of the formula that compiled models take for 16 bits; other dtypes keep PyTorch's."""
    x = torch.linspace(-20, 20, 4001).requires_grad_()
    exact = x.detach().double().requires_grad_()
    (slope,) = torch.autograd.grad(_Gelu.apply(x).sum(), x)
    (right,) = torch.autograd.grad(F.gelu(exact).sum(), exact)
    assert float((_Gelu.apply(x) - F.gelu(exact)).detach().abs().max()) < 7e-7
    assert float((slope - right).abs().max()) < 2e-5
    assert _Gelu.apply(torch.tensor([torch.inf]))[0] == torch.inf
    assert _Gelu.apply(torch.tensor([torch.nan])).isnan().all()
    assert torch.equal(_gelu(x, torch.nn.GELU()), F.gelu(x))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", list(_calls(torch.float32)))
def test_operators_on_a_gpu(name: str, dtype: torch.dtype) -> None:
    """Kernels against the operators' own fallback in float64 from the same rounded numbers."""
    op, arguments = _calls(dtype, "cuda")[name]
    assert fused._takes(arguments[0], 16)
    exact = [it.double().cpu() if isinstance(it, Tensor) else it for it in arguments]
    found, right = op(*arguments).double().cpu(), op(*exact)
    assert float((found - right).abs().max() / right.abs().max()) < (
        0.02 if dtype == torch.bfloat16 else 3e-3
    )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("compiled", [False, True])
def test_a_fused_model_on_a_gpu(compiled: bool) -> None:
    torch.manual_seed(0)
    model = timm.create_model("test_gspn2", dims=(16, 32, 48, 160)).cuda().eval()
    model = model.to(memory_format=torch.channels_last)
    x = torch.randn(2, 3, 64, 96).cuda()
    runner = torch.compile(model, fullgraph=True) if compiled else model
    with torch.no_grad():
        right = model(x)
        with torch.autocast("cuda", torch.bfloat16):
            mixed = runner(x)
        half = model.bfloat16()(x.bfloat16())
    for found in (mixed, half):
        assert float((found.float() - right).norm() / right.norm()) < 0.05
