"""One packed argument for the operator: the same as its views."""

from __future__ import annotations

import pytest
import torch

from gspn2.nn import Mixer
from gspn2.ops.packed import propagate_packed


@pytest.mark.parametrize("lam", [True, False])
def test_same_as_the_views(lam: bool) -> None:
    torch.manual_seed(0)
    mixer = Mixer(12, 2, operands_from="input", lam=lam, chunk=3, directions=("down", "left"))
    x = torch.randn(2, 12, 5, 7).to(memory_format=torch.channels_last)
    right = mixer(x)
    dy = torch.randn_like(right)
    expected = torch.autograd.grad(right, list(mixer.parameters()), dy)
    rows = mixer._operand_rows(mixer._merge(5, 7))
    y = propagate_packed(mixer._packed(x, *rows), 2, 1, ("down", "left"), 3, lam, None)
    assert y.is_contiguous(memory_format=torch.channels_last)
    found = mixer.from_proxy(y)
    torch.testing.assert_close(found, right)
    torch.testing.assert_close(mixer._sums(y), right)
    torch.testing.assert_close(mixer._packed(x, *rows, aligned=True), mixer._packed(x, *rows))
    for a, b in zip(torch.autograd.grad(found, list(mixer.parameters()), dy), expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(("lam", "size"), [(True, 11), (False, 9)])
def test_registration(lam: bool, size: int) -> None:
    packed, dy = torch.randn(1, 4, 3, size), torch.randn(1, 1, 4, 3)
    options = (1, 1, [0, 3], 0, lam, None)
    torch.library.opcheck(torch.ops.gspn2.propagate_packed.default, (packed.requires_grad_(), *options))
    torch.library.opcheck(
        torch.ops.gspn2.propagate_packed_backward.default,
        (dy, packed.detach(), *options),
        test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
    )


def test_parts_of_the_gradient_are_dense() -> None:
    packed, dy = torch.randn(2, 8, 3, 2 + 4 + 4 + 6), torch.randn(2, 2, 4, 3)
    parts = torch.ops.gspn2.propagate_packed_backward(dy, packed[:, ::2], 2, 1, [1, 2], 0, True, None)
    assert [part.shape[3] for part in parts] == [2, 4, 4, 6]
    assert all(part.is_contiguous() for part in parts)


def test_a_second_derivative_is_refused() -> None:
    packed = torch.randn(1, 4, 3, 11, requires_grad=True)
    y = propagate_packed(packed, 1, 1, ("down", "left"), None, True, None)
    (gradient,) = torch.autograd.grad(y, packed, torch.ones_like(y).requires_grad_(), create_graph=True)
    with pytest.raises(NotImplementedError, match="cannot be differentiated a second time"):
        gradient.sum().backward()


def test_compiled_mixers_use_it() -> None:
    mixer = Mixer(8, 2, operands_from="input")
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, _: list[torch.Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    x = torch.randn(1, 8, 4, 5).to(memory_format=torch.channels_last)
    found = torch.compile(mixer, backend=keep, fullgraph=True)(x)
    assert "propagate_packed" in graphs[0].code
    torch.testing.assert_close(found, mixer(x))
