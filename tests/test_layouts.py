"""Any strides are legal, for inputs and for the incoming gradient, and nothing that came in is changed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import gspn2
from helpers import INPUTS, LAYOUTS, assert_close, channel_innermost, make_case, max_error, run, strided

pytestmark = pytest.mark.usefixtures("poisoned")


def test_the_layouts_are_what_they_say() -> None:
    case = make_case(2, 4, 5, 6, groups=2)
    packed, odd = channel_innermost(case), strided(case)
    width = packed.x.stride(3)
    assert packed.x.stride() == (30 * width, 1, 6 * width, width)
    assert len({tensor.untyped_storage().data_ptr() for tensor in packed.tensors().values()}) == 1
    assert not any(tensor.is_contiguous() for tensor in odd.tensors().values())
    assert all(tensor.storage_offset() > 0 for tensor in odd.tensors().values())
    for name in INPUTS:
        assert torch.equal(packed.tensors()[name], case.tensors()[name])
        assert torch.equal(odd.tensors()[name], case.tensors()[name])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize(("groups", "chunk"), [(1, None), (2, 4), (8, None)])
@pytest.mark.parametrize("layout", ["channel_innermost", "strided"])
def test_layouts_agree(layout: str, groups: int, chunk: int | None, dtype: torch.dtype, backend: str) -> None:
    """Bigger than the vectors: full vector registers, tails, several tiles."""
    case = make_case(2, 8, 19, 35, groups, chunk=chunk, dtype=dtype)
    expected = run(case, backend=backend)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-6
    assert_close(run(LAYOUTS[layout](case), backend=backend), expected, tolerance)


@pytest.mark.parametrize("name", [*INPUTS, "dy"])
def test_one_odd_tensor_among_planes(name: str, backend: str) -> None:
    """A fast path must look at the strides of every tensor, not of the first one."""
    case = make_case(2, 4, 6, 7, groups=2)
    for other in (channel_innermost(case), strided(case)):
        mixed = replace(case, **{name: getattr(other, name)})
        assert_close(run(mixed, backend=backend), run(case, backend=backend))


def expanded(tensor: Tensor, axis: int) -> Tensor:
    """The first slice along an axis, repeated with stride 0."""
    return tensor.narrow(axis, 0, 1).expand_as(tensor)


@pytest.mark.parametrize("axis", range(-6, 0))
def test_expanded(axis: int, backend: str) -> None:
    """Stride 0 along every axis in turn, the tap axis included; gradients are those of a copy."""
    case = make_case(3, 4, 5, 6, groups=2)
    case = case.map(lambda tensor: expanded(tensor, axis) if tensor.ndim >= -axis else tensor)
    assert case.logits.stride(axis) == 0
    assert_close(run(case, backend=backend), run(case.map(Tensor.contiguous), backend=backend))


def test_gradient_of_an_expanded_leaf(backend: str) -> None:
    """One gate for all samples and places: autograd sums its gradient."""
    case = make_case(3, 4, 5, 6)
    gate = torch.randn(1, 4, 4, 1, 1, dtype=torch.float64, requires_grad=True)
    spread = gate.expand(3, 4, 4, 5, 6)
    y = gspn2.propagate(case.x, case.logits, case.lam, spread, backend=backend)
    (found,) = torch.autograd.grad(y, gate, case.dy)
    full = run(replace(case, gate=spread.detach().contiguous()), backend=backend)["dgate"]
    assert max_error(found, full.sum((0, 3, 4), keepdim=True)) <= 1e-12


def test_overlapping_windows(backend: str) -> None:
    """Sliding windows of one image share memory; reading them is legal."""
    image = torch.randn(4, 11, 6, dtype=torch.float64)
    windows = image.unfold(1, 5, 2).permute(1, 0, 3, 2)  # (4 windows, C, 5, 6)
    case = make_case(4, 4, 5, 6)
    assert_close(
        run(replace(case, x=windows), backend=backend),
        run(replace(case, x=windows.contiguous()), backend=backend),
    )


INCOMING: dict[str, Callable[[Tensor], Tensor]] = {
    "sum": lambda y: y.sum(),
    "mean over places": lambda y: y.mean((2, 3)).pow(2).sum(),
    "flipped": lambda y: (y.flip(2, 3) * torch.arange(y.numel()).view_as(y)).sum(),
    "transposed": lambda y: (y.transpose(2, 3) * torch.arange(y.numel()).view(y.transpose(2, 3).shape)).sum(),
    "sliced": lambda y: y[:, 1:, ::2, ::3].square().sum(),
    "permuted to tokens": lambda y: y.flatten(2).transpose(1, 2).softmax(1).square().sum(),
    "one element": lambda y: y[0, 0, 2, 3],
}


@pytest.mark.parametrize("loss", INCOMING.values(), ids=INCOMING)
def test_incoming_gradients_of_any_strides(loss: Callable[[Tensor], Tensor], backend: str) -> None:
    case = make_case(2, 4, 5, 6, groups=2, chunk=3)

    def gradients(detour: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        leaves = {name: tensor.detach().requires_grad_() for name, tensor in case.tensors().items()}
        loss(detour(gspn2.propagate(**leaves, chunk=3, backend=backend))).backward()
        return {name: leaf.grad for name, leaf in leaves.items()}

    def through_contiguous(y: Tensor) -> Tensor:
        y.register_hook(lambda dy: dy.contiguous())
        return y

    assert_close(gradients(lambda y: y), gradients(through_contiguous))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_nothing_that_came_in_is_changed(dtype: torch.dtype, layout: str, backend: str) -> None:
    """Inputs, the saved output and the incoming gradient keep their bits through forward and backward."""
    case = LAYOUTS[layout](make_case(2, 4, 5, 6, groups=2, dtype=dtype))
    inputs = {name: tensor.detach().requires_grad_() for name, tensor in case.tensors().items()}
    before = case.map(torch.clone)
    y = gspn2.propagate(**inputs, backend=backend)
    y_before = y.detach().clone()
    torch.autograd.grad(y, tuple(inputs.values()), case.dy)
    assert torch.equal(y, y_before)
    assert torch.equal(case.dy, before.dy)
    for name, tensor in case.tensors().items():
        assert torch.equal(tensor, before.tensors()[name]), name


@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_output_keeps_the_memory_format_of_x(format: torch.memory_format, backend: str) -> None:
    case = make_case(2, 4, 5, 6)
    case = replace(case, x=case.x.contiguous(memory_format=format))
    results = run(case, backend=backend)
    assert results["y"].is_contiguous(memory_format=format)
    assert results["dx"].is_contiguous(memory_format=format)


def test_output_does_not_share_memory_with_the_input(backend: str) -> None:
    """Not even where the scan does nothing: one pixel, one line a chunk."""
    x = torch.randn(1, 1, 1, 1)
    logits = torch.randn(1, 1, 1, 3, 1, 1)
    for chunk in (None, 1):
        y = gspn2.propagate(x, logits, directions=("down",), chunk=chunk, backend=backend)
        assert torch.equal(y, x)
        assert y.data_ptr() != x.data_ptr()


def test_storage_off_any_vector_alignment(backend: str) -> None:
    """Memory that starts 4 bytes after an aligned address, as a slice of a packed buffer does."""

    def shifted(tensor: Tensor) -> Tensor:
        memory = torch.empty(tensor.numel() + 1, dtype=tensor.dtype)[1:]
        return memory.view(tensor.shape).copy_(tensor)

    case = make_case(2, 4, 9, 17, dtype=torch.float32)
    assert_close(run(case.map(shifted), backend=backend), run(case, backend=backend), 1e-6)
