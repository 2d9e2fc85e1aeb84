"""Depthwise convolution: kernels in the emulator, the operator, and its place in the layers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import gspn2.models  # noqa: F401  (registers them with timm)
from cuda_emulator import KernelError, compiler, run_launch
from cuda_emulator.memory import Memory
from gspn2.backends.cuda import depthwise, driver
from gspn2.backends.cuda.geometry import Device, Launch
from gspn2.models.blocks import Stem
from gspn2.ops.depthwise import depthwise as depthwise_op

needs_compiler = pytest.mark.skipif(compiler() is None, reason="the emulator needs g++ 12 on Linux")


def _images(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape).to(dtype).to(memory_format=torch.channels_last)


def _emulate(options: tuple[Any, ...], multiprocessors: int = 3, **tensors: Tensor | None) -> None:
    """Runs a plan's launch; the tensors by the names of `Params` in the kernel."""
    x = tensors["x"]
    assert x is not None
    device = Device(multiprocessors=multiprocessors)
    launch, arguments, groups = depthwise.plan(tuple(x.shape), options, device)  # type: ignore[arg-type]
    present = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    if options[-1][-1]:
        present["partial"] = torch.full((groups, options[2] ** 2 + 1, x.shape[1]), torch.nan)
    memory = Memory(present, {"y", "partial"})
    names = ("x", "dy", "weight", "bias", "y", "partial", "other")
    addresses = [memory.tensors[name].data_ptr() if name in present else 0 for name in names]
    packed = b"".join(address.to_bytes(8, "little") for address in addresses) + arguments[56:]
    run_launch(launch, packed, memory, 1, device)
    wrong = memory.wrongly_written()
    if wrong:
        raise KernelError(wrong)
    memory.copy_back()
    if options[-1][-1]:
        tensors["y"].copy_(present["partial"].sum(0))  # type: ignore[union-attr]


@needs_compiler
@pytest.mark.parametrize(
    ("shape", "side", "dtype", "weights", "flags"),
    [
        ((2, 6, 9, 17), 7, torch.bfloat16, torch.float32, (False, True, False, False, False)),
        ((1, 64, 7, 7), 3, torch.bfloat16, torch.bfloat16, (True, False, True, False, False)),
        ((3, 134, 5, 3), 3, torch.float32, torch.float32, (True, False, False, True, False)),
    ],
)
def test_kernel(
    shape: tuple[int, int, int, int],
    side: int,
    dtype: torch.dtype,
    weights: torch.dtype,
    flags: tuple[bool, bool, bool, bool, bool],
) -> None:
    torch.manual_seed(0)
    residual, silu, flip, second, _ = flags
    x = _images(*shape, dtype=dtype)
    weight, bias = torch.randn(shape[1], 1, side, side).to(weights), torch.randn(shape[1]).to(weights)
    y = torch.full_like(x, torch.nan)
    other = _images(*shape, dtype=dtype) if second else None
    _emulate((dtype, weights, side, flags), x=x, weight=weight, bias=bias, y=y, other=other)
    x = x if other is None else x.double() + other.double()
    turned = weight.flip(2, 3) if flip else weight
    right = F.conv2d(x.double(), turned.double(), bias.double(), padding=side // 2, groups=shape[1])
    right = right + x.double() if residual else right
    right = F.silu(right) if silu else right
    torch.testing.assert_close(y.double(), right, rtol=1e-5 if dtype == torch.float32 else 8e-3, atol=1e-5)


@needs_compiler
@pytest.mark.parametrize(
    ("shape", "dtype", "weights", "flip"),
    [
        # Part of a strip, of a slice of channels and of a block's strips; then two parts of the rows.
        ((2, 24, 6, 19), torch.bfloat16, torch.float32, False),
        ((1, 40, 29, 5), torch.float16, torch.float16, True),
    ],
)
def test_kernel_on_tensor_cores(
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    weights: torch.dtype,
    flip: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(depthwise, "_on_tensor_cores", lambda *_: True)
    x = _images(*shape, dtype=dtype)
    weight, bias = torch.randn(shape[1], 1, 7, 7).to(weights), torch.randn(shape[1]).to(weights)
    y = torch.full_like(x, torch.nan)
    _emulate((dtype, weights, 7, (False, not flip, flip, False, False)), x=x, weight=weight, bias=bias, y=y)
    rounded = weight.to(dtype).double()
    turned = rounded.flip(2, 3) if flip else rounded
    right = F.conv2d(x.double(), turned, bias.double(), padding=3, groups=shape[1])
    right = right if flip else F.silu(right)
    tolerance = {torch.bfloat16: 8e-3, torch.float16: 1e-3}[dtype]
    torch.testing.assert_close(y.double(), right, rtol=tolerance, atol=1e-4)


@needs_compiler
@pytest.mark.parametrize(
    ("shape", "dtype"),
    # The same; then several times 16 strips for a block.
    [((1, 40, 29, 5), torch.float16), ((9, 8, 5, 19), torch.bfloat16)],
)
def test_kernel_of_weight_gradients_on_tensor_cores(
    shape: tuple[int, int, int, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(depthwise, "_on_tensor_cores", lambda *_: True)
    x, dy = _images(*shape, dtype=dtype), _images(*shape, dtype=dtype)
    sums = torch.empty(50, shape[1])
    options = (dtype, torch.float32, 7, (False, False, False, False, True))
    _emulate(options, multiprocessors=1, x=x, dy=dy, y=sums)
    weight = torch.zeros(shape[1], 1, 7, 7, dtype=torch.float64, requires_grad=True)
    F.conv2d(x.double(), weight, padding=3, groups=shape[1]).backward(dy.double())
    assert weight.grad is not None
    torch.testing.assert_close(sums[:-1].t().double(), weight.grad.flatten(1), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(sums[-1].double(), dy.double().sum((0, 2, 3)), rtol=1e-5, atol=1e-4)


def test_tensor_cores_take_much_work_of_16_bits() -> None:
    flags = (False, True, False, False, False)
    takes = depthwise._on_tensor_cores
    assert takes((32, 96, 7, 7), (torch.bfloat16, torch.float32, 7, flags))
    assert not takes((31, 96, 7, 7), (torch.bfloat16, torch.float32, 7, flags))
    assert not takes((32, 96, 7, 7), (torch.float32, torch.float32, 7, flags))
    assert not takes((32, 96, 7, 7), (torch.bfloat16, torch.float32, 3, flags))
    assert not takes((32, 92, 7, 7), (torch.bfloat16, torch.float32, 7, flags))
    for refused in range(5):
        some = tuple(number == refused for number in range(5))
        assert takes((32, 96, 7, 7), (torch.float16, torch.float16, 7, some)) == (refused in (1, 2, 4))  # type: ignore[arg-type]


@needs_compiler
@pytest.mark.parametrize(
    ("channels", "side", "groups", "rows"),
    # Part of a block's channels; more groups than rows, not as many for each; two blocks of channels.
    [(6, 3, 1, 1), (36, 3, 291, 32), (64, 7, 17, 3)],
)
def test_kernel_of_sums(channels: int, side: int, groups: int, rows: int) -> None:
    torch.manual_seed(0)
    partial = torch.randn(groups, side**2 + 1, channels)
    weight, bias = torch.full((channels, 1, side, side), torch.nan), torch.full((channels,), torch.nan)
    launch, arguments = depthwise.plan_sums(channels, side, groups)
    assert launch.block == 32 * rows
    memory = Memory({"partial": partial, "weight": weight, "bias": bias}, {"weight", "bias"})
    addresses = [memory.tensors[name].data_ptr() for name in ("partial", "weight", "bias")]
    packed = b"".join(address.to_bytes(8, "little") for address in addresses) + arguments[24:]
    run_launch(launch, packed, memory, 1)
    assert not memory.wrongly_written()
    memory.copy_back()
    right = partial.double().sum(0)
    torch.testing.assert_close(weight.double().flatten(1), right[:-1].t(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(bias.double(), right[-1], rtol=1e-5, atol=1e-5)


@needs_compiler
@pytest.mark.parametrize(
    ("shape", "side", "dtype"),
    [((2, 6, 9, 17), 7, torch.bfloat16), ((1, 134, 7, 5), 3, torch.float32)],
)
def test_kernel_of_weight_gradients(shape: tuple[int, int, int, int], side: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, dy = _images(*shape, dtype=dtype), _images(*shape, dtype=dtype)
    sums = torch.empty(side * side + 1, shape[1])
    other = _images(*shape, dtype=dtype) if side == 3 else None
    flags = (False, False, False, other is not None, True)
    _emulate((dtype, torch.float32, side, flags), x=x, dy=dy, y=sums, other=other)
    x = x if other is None else x.double() + other.double()
    weight = torch.zeros(shape[1], 1, side, side, dtype=torch.float64, requires_grad=True)
    F.conv2d(x.double(), weight, padding=side // 2, groups=shape[1]).backward(dy.double())
    assert weight.grad is not None
    torch.testing.assert_close(sums[:-1].t().double(), weight.grad.flatten(1), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(sums[-1].double(), dy.double().sum((0, 2, 3)), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(("residual", "side"), [(False, 7), (True, 3)])
def test_operator_and_its_gradients(residual: bool, side: int) -> None:
    """Where no kernel runs PyTorch's convolutions do: values and gradients of the same function."""
    torch.manual_seed(0)
    x = _images(2, 6, 5, 9, dtype=torch.float32).requires_grad_()
    weight, bias = torch.randn(6, 1, side, side, requires_grad=True), torch.randn(6, requires_grad=True)
    dy = torch.randn_like(x)
    other = _images(2, 6, 5, 9, dtype=torch.float32).requires_grad_() if residual else None
    y = depthwise_op(x, weight, bias, other, residual=residual)
    assert y.is_contiguous(memory_format=torch.channels_last)
    source = x if other is None else x + other
    right = F.conv2d(source, weight, bias, padding=side // 2, groups=6) + (source if residual else 0)
    torch.testing.assert_close(y, right)
    inputs = (x, weight, bias) if other is None else (x, weight, bias, other)
    for found, expected in zip(
        torch.autograd.grad(y, inputs, dy), torch.autograd.grad(right, inputs, dy), strict=True
    ):
        torch.testing.assert_close(found, expected)
    with torch.no_grad():
        torch.testing.assert_close(
            depthwise_op(x, weight, bias, other, residual=residual, silu=True), F.silu(right)
        )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("shape", "side", "residual"),
    [((2, 64, 56, 56), 3, True), ((3, 134, 5, 9), 7, False), ((17, 136, 30, 9), 7, False)],
)
def test_operator_on_a_gpu(
    shape: tuple[int, int, int, int], side: int, residual: bool, dtype: torch.dtype
) -> None:
    """Values and gradients against float64, by kernels of this project."""
    torch.manual_seed(0)
    channels = shape[1]
    x, other, dy = (_images(*shape, dtype=dtype).cuda() for _ in range(3))
    weight, bias = torch.randn(channels, 1, side, side).cuda(), torch.randn(channels).cuda()
    assert depthwise.takes(x, weight, bias)

    def run(function: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
        inputs = [tensor.detach().requires_grad_() for tensor in tensors]
        y = function(*inputs)
        return (y.detach(), *torch.autograd.grad(y, inputs, dy.to(y.dtype)))

    def right(x: Tensor, weight: Tensor, bias: Tensor, *other: Tensor) -> Tensor:
        source = x + other[0] if other else x
        y = F.conv2d(source, weight, bias, padding=side // 2, groups=channels)
        return y + source if residual else y

    for inputs in ((x, weight, bias), (x, weight, bias, other)):
        found = run(lambda *given: depthwise_op(*given, residual=residual), *inputs)
        expected = run(right, *(tensor.double() for tensor in inputs))
        for ours, theirs in zip(found, expected, strict=True):
            error = (ours.double() - theirs).norm() / theirs.norm()
            assert error <= (2e-6 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps)


def test_gradients_of_weights_take_two_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second one adds up what the first one leaves, and writes what is returned."""
    runs: list[tuple[str, list[int]]] = []

    def load(launch: Launch, arguments: bytes, places: range, index: int) -> SimpleNamespace:
        assert len(arguments) >= 8 * len(places)
        return SimpleNamespace(run=lambda addresses, _: runs.append((launch.kernel.function, addresses)))

    monkeypatch.setattr(driver, "Loaded", load)
    monkeypatch.setattr(driver, "device", lambda _: Device())
    monkeypatch.setattr(driver, "current_device", lambda: -1)
    monkeypatch.setattr(driver, "stream", lambda _: 7)
    depthwise._ready.cache_clear()
    x, dy = _images(2, 6, 5, 4, dtype=torch.float32), _images(2, 6, 5, 4, dtype=torch.float32)
    weight, bias = depthwise.weight_gradient(dy, x, 3)
    depthwise._ready.cache_clear()
    (first, images), (second, sums) = runs
    assert (first, second) == ("depthwise_weights", "depthwise_sums")
    assert images[:2] == [x.data_ptr(), dy.data_ptr()]
    assert sums == [images[5], weight.data_ptr(), bias.data_ptr()]
    assert weight.shape == (6, 1, 3, 3)
    assert bias.shape == (6,)
    assert weight.dtype == bias.dtype == torch.float32


def test_registration() -> None:
    x = _images(2, 4, 5, 6, dtype=torch.float32)
    weight, bias = torch.randn(4, 1, 3, 3), torch.randn(4)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(
        torch.ops.gspn2.depthwise.default, (x, weight, bias, x.clone(), True, True), test_utils=checks
    )
    torch.library.opcheck(torch.ops.gspn2.depthwise_input.default, (x, weight, False), test_utils=checks)
    torch.library.opcheck(
        torch.ops.gspn2.depthwise_weights.default, (x, x.clone(), None, 3), test_utils=checks
    )
    args = (x.requires_grad_(), weight.requires_grad_(), bias.requires_grad_(), None, True, False)
    torch.library.opcheck(torch.ops.gspn2.depthwise.default, args)


def test_compiled_it_is_one_node() -> None:
    """With the same values and gradients as called directly, past the dispatcher."""
    torch.manual_seed(0)
    x, weight = _images(2, 4, 5, 6, dtype=torch.float32), torch.randn(4, 1, 3, 3)
    found = []
    for function in (torch.compile(depthwise_op, backend="aot_eager", fullgraph=True), depthwise_op):
        inputs = [tensor.detach().clone().requires_grad_() for tensor in (x, weight)]
        y = function(*inputs, residual=True)
        found.append((y.detach(), *torch.autograd.grad(y.square().sum(), inputs)))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
    graph = torch.export.export(_Alone(), (x, weight)).graph
    assert [node.target for node in graph.find_nodes(op="call_function", target=_OP)] == [_OP]


_OP = torch.ops.gspn2.depthwise.default


class _Alone(torch.nn.Module):
    def forward(self, x: Tensor, weight: Tensor) -> Tensor:
        return depthwise_op(x, weight)


def test_no_gradient_through_the_fused_activation() -> None:
    x = _images(1, 4, 5, 6, dtype=torch.float32).requires_grad_()
    with pytest.raises(RuntimeError, match="apply the activation after it"):
        depthwise_op(x, torch.randn(4, 1, 3, 3), silu=True).sum().backward()


def test_halves_of_blocks_in_a_row() -> None:
    """What compiled stages do between blocks is the same as adding before the next one."""
    torch.manual_seed(0)
    stage = timm.create_model("test_gspn2").stages[2].eval()
    x = torch.randn(1, 32, 8, 8).to(memory_format=torch.channels_last)
    with torch.no_grad():
        y, branch = stage.downsample(x), None
        for block in stage.blocks:
            y, branch = block.halves(y, branch)
        torch.testing.assert_close(y + branch, stage(x))


@pytest.mark.parametrize(("channels", "stride", "size"), [(3, 2, (9, 12)), (1, 1, (5, 4))])
def test_stem_as_a_matrix_product(
    channels: int, stride: int, size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    stem = Stem(channels, 16, stride)
    x = torch.randn(2, channels, *size)
    right = stem.conv1(x)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    monkeypatch.setattr(Tensor, "is_cuda", True)
    torch.testing.assert_close(stem._first(x), right)


def test_counted_like_a_convolution() -> None:
    x, weight = _images(2, 4, 5, 6, dtype=torch.float32), torch.randn(4, 1, 3, 3, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        y = depthwise_op(x.detach().requires_grad_(), weight)
        forward = counter.get_total_flops()
        y.sum().backward()
    with FlopCounterMode(display=False) as convolution:
        F.conv2d(x, weight, padding=1, groups=4)
    assert forward == convolution.get_total_flops()
    assert counter.get_total_flops() == 3 * forward
