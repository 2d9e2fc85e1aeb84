"""Calls past the dispatcher: only where nobody would see the operator there, and with the same results."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

import gspn2
from gspn2.ops import eager
from gspn2.ops.depthwise import depthwise
from gspn2.ops.packed import propagate_packed
from helpers import Case, make_case


@pytest.fixture
def case() -> Case:
    return make_case(dtype=torch.float32)


@pytest.fixture
def dispatched(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A way to call that always asks the dispatcher."""

    def call(*arguments: Any, **options: Any) -> Tensor:
        with monkeypatch.context() as patch:
            # By its module: the package's attribute of that name is the function.
            patch.setattr(sys.modules["gspn2.ops.propagate"], "plain", lambda *_: False)
            return gspn2.propagate(*arguments, **options)

    return call


def leaves(case: Case) -> dict[str, Tensor]:
    return {name: tensor.detach().clone().requires_grad_() for name, tensor in case.tensors().items()}


def test_results_and_gradients_are_the_dispatchers(case: Case, dispatched: Any) -> None:
    found, expected = [], []
    for call, into in ((gspn2.propagate, found), (dispatched, expected)):
        tensors = leaves(case)
        y = call(**tensors)
        y.backward(case.dy)
        into += [y.detach(), *(tensor.grad for tensor in tensors.values())]
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_who_needs_no_gradient_gets_none(case: Case) -> None:
    tensors = leaves(case)
    assert gspn2.propagate(**tensors).requires_grad
    with torch.no_grad():
        assert not gspn2.propagate(**tensors).requires_grad
    with torch.inference_mode():
        assert gspn2.propagate(**tensors).is_inference()
    assert not gspn2.propagate(**case.tensors()).requires_grad
    only = {name: tensor.requires_grad_(name == "lam") for name, tensor in leaves(case).items()}
    gspn2.propagate(**only).sum().backward()
    assert [name for name, tensor in only.items() if tensor.grad is not None] == ["lam"]


def test_parameters_are_tensors_like_others(case: Case) -> None:
    assert eager.plain(torch.nn.Parameter(case.x), case.logits, None)


class Names(TorchDispatchMode):
    """Writes down the operators that pass."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


class Functions(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


def test_modes_and_profilers_see_the_operator(case: Case) -> None:
    tensors = leaves(case)
    with Names() as names:
        gspn2.propagate(**tensors).sum().backward()
    assert "gspn2.propagate.default" in names.seen
    assert "gspn2.propagate_backward.default" in names.seen
    with Functions() as functions:
        gspn2.propagate(**tensors)
    assert any("gspn2.propagate" in name for name in functions.seen)
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        gspn2.propagate(**tensors).sum().backward()
    assert {"gspn2::propagate", "gspn2::propagate_backward"} <= {event.key for event in seen.key_averages()}


def test_depthwise_convolutions_and_packed_operands_likewise() -> None:
    x, weight = torch.randn(2, 4, 5, 6), torch.randn(4, 1, 3, 3, requires_grad=True)
    direct = depthwise(x, weight)
    direct.square().sum().backward()
    expected, weight.grad = weight.grad, None
    packed = torch.randn(1, 4, 3, 11)
    scanned = propagate_packed(packed, 1, 1, ("down", "left"), None, True, None)
    with Names() as names:
        y = depthwise(x, weight)
        y.square().sum().backward()
        assert torch.equal(propagate_packed(packed, 1, 1, ("down", "left"), None, True, None), scanned)
    operators = ("depthwise", "depthwise_weights", "propagate_packed")
    assert {f"gspn2.{name}.default" for name in operators} <= set(names.seen)
    assert type(direct.grad_fn) is not type(y.grad_fn), "otherwise nothing was compared"
    assert torch.equal(direct, y)
    assert torch.equal(weight.grad, expected)


def test_batched_gradients_go_to_the_dispatcher() -> None:
    """Those of `is_grads_batched`: a batch does not look like one."""
    plain: list[bool] = []

    class Looking(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, dy: Tensor) -> Tensor:
            plain.append(eager.plain_gradient(dy))
            return dy

    x = torch.randn(3, requires_grad=True)
    y = Looking.apply(x)
    torch.autograd.grad(y, x, torch.ones(3), retain_graph=True)
    torch.autograd.grad(y, x, torch.ones(3).requires_grad_(), create_graph=True)
    torch.autograd.grad(y, x, torch.eye(3), is_grads_batched=True)
    assert plain == [True, False, False]


def test_forward_mode_goes_to_the_dispatcher(case: Case) -> None:
    with torch.autograd.forward_ad.dual_level():
        assert not eager.plain(torch.autograd.forward_ad.make_dual(case.x, torch.ones_like(case.x)))


def test_tensors_that_stand_for_others_are_made_real(case: Case) -> None:
    """A lazily negated tensor holds the opposite of its values."""
    z = torch.complex(torch.zeros_like(case.x), -case.x)
    negated = z.conj().imag
    assert negated.is_neg()
    assert not eager.plain(negated)
    found = gspn2.propagate(**(case.tensors() | {"x": negated}))
    assert torch.equal(found, gspn2.propagate(**case.tensors()))
    zero = torch._efficientzerotensor(case.x.shape)
    assert not eager.plain(zero)
    assert not gspn2.propagate(**(case.tensors() | {"x": zero})).any()


def test_subclasses_and_other_devices_go_to_the_dispatcher(case: Case) -> None:
    class Tagged(Tensor):
        pass

    assert not eager.plain(case.x.as_subclass(Tagged))
    assert not eager.plain(case.x, case.logits.as_subclass(Tagged))
    meta = {name: tensor.to("meta") for name, tensor in case.tensors().items()}
    assert not eager.plain(meta["x"])
    assert gspn2.propagate(**meta).is_meta


def test_transforms_and_tracers_go_to_the_dispatcher(case: Case) -> None:
    plain: list[bool] = []

    def looked_at(x: Tensor) -> Tensor:
        plain.append(eager.plain(x))
        return x * 2

    torch.func.vmap(looked_at)(case.x)
    torch.func.grad(lambda x: looked_at(x).sum())(case.x)
    torch.jit.trace(looked_at, case.x, check_trace=False)
    assert plain == [False] * 3


def test_a_second_derivative_is_refused(case: Case) -> None:
    tensors = leaves(case)
    y = gspn2.propagate(**tensors)
    (dx,) = torch.autograd.grad(y, tensors["x"], case.dy.requires_grad_(), create_graph=True)
    with pytest.raises(NotImplementedError, match="cannot be differentiated a second time"):
        dx.sum().backward()
    weight = torch.randn(4, 1, 3, 3, requires_grad=True)
    (dw,) = torch.autograd.grad(
        depthwise(torch.randn(2, 4, 5, 6), weight),
        weight,
        torch.ones(2, 4, 5, 6).requires_grad_(),
        create_graph=True,
    )
    with pytest.raises(NotImplementedError, match="cannot be differentiated a second time"):
        dw.sum().backward()
