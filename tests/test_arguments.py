"""Wrong arguments are refused by name, with what was expected and what came; empty batches are not wrong."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import gspn2
from helpers import make_case, run

B, C, H, W, D = 2, 4, 5, 6, 4


def good(**changed: Any) -> dict[str, Any]:
    """Arguments of a legal call to `propagate`, with some of them replaced."""
    case = make_case(B, C, H, W, groups=2, dtype=torch.float32)
    return {**case.tensors(), **changed}


def zeros(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype, device=device)


# What is passed instead, the error, and what its message must contain besides the argument's name.
WRONG: list[tuple[str, Any, type[Exception], list[str]]] = [
    ("x", None, TypeError, ["tensor", "NoneType"]),
    ("x", [[1.0]], TypeError, ["tensor", "list"]),
    ("x", zeros(C, H, W), ValueError, ["4 dimensions", "(B, C, H, W)", "(4, 5, 6)"]),
    ("x", zeros(B, C, H, W, dtype=torch.int64), TypeError, ["float32", "int64"]),
    ("x", zeros(B, C, H, W, dtype=torch.complex64), TypeError, ["float32", "complex64"]),
    ("x", zeros(B, C, H, W, dtype=torch.float8_e4m3fn), TypeError, ["float32", "float8_e4m3fn"]),
    ("x", zeros(B, 0, H, W), ValueError, ["at least one", "0, 5, 6"]),
    ("x", zeros(B, C, 0, W), ValueError, ["at least one", "4, 0, 6"]),
    ("x", zeros(B, C, H, 0), ValueError, ["at least one", "4, 5, 0"]),
    ("logits", None, TypeError, ["tensor", "NoneType"]),
    ("logits", zeros(B, D, 2, H, W), ValueError, ["6 dimensions", "(2, 4, 2, 5, 6)"]),
    ("logits", zeros(B, D, 2, 4, H, W), ValueError, ["(2, 4, 2, 3, 5, 6)", "(2, 4, 2, 4, 5, 6)"]),
    ("logits", zeros(B + 1, D, 2, 3, H, W), ValueError, ["(2, 4, 2, 3, 5, 6)", "(3, 4, 2, 3, 5, 6)"]),
    ("logits", zeros(B, 2, 2, 3, H, W), ValueError, ["(2, 4, 2, 3, 5, 6)", "(2, 2, 2, 3, 5, 6)"]),
    ("logits", zeros(B, D, 2, 3, W, H), ValueError, ["(2, 4, 2, 3, 5, 6)", "(2, 4, 2, 3, 6, 5)"]),
    ("logits", zeros(B, D, 3, 3, H, W), ValueError, ["G", "C = 4", "3"]),
    ("logits", zeros(B, D, 8, 3, H, W), ValueError, ["G", "C = 4", "8"]),
    ("logits", zeros(B, D, 0, 3, H, W), ValueError, ["G", "0"]),
    ("logits", zeros(B, D, 2, 3, H, W, dtype=torch.bfloat16), TypeError, ["float32", "bfloat16"]),
    ("logits", zeros(B, D, 2, 3, H, W, device="meta"), ValueError, ["cpu", "meta"]),
    ("lam", 1.0, TypeError, ["tensor", "float"]),
    ("lam", zeros(B, C, H, W), ValueError, ["5 dimensions", "(2, 4, 5, 6)"]),
    ("lam", zeros(B, D, 1, H, W), ValueError, ["(2, 4, 4, 5, 6)", "(2, 4, 1, 5, 6)"]),
    ("lam", zeros(B, D, C, H, W, dtype=torch.float64), TypeError, ["float32", "float64"]),
    ("lam", zeros(B, D, C, H, W, device="meta"), ValueError, ["cpu", "meta"]),
    ("gate", "sigmoid", TypeError, ["tensor", "str"]),
    ("gate", zeros(B, D, C, H), ValueError, ["5 dimensions", "(2, 4, 4, 5)"]),
    ("gate", zeros(B, D, C, W, H), ValueError, ["(2, 4, 4, 5, 6)", "(2, 4, 4, 6, 5)"]),
    ("gate", zeros(B, D, C, H, W, dtype=torch.float16), TypeError, ["float32", "float16"]),
    ("directions", (), ValueError, ["down, up, right, left", "none"]),
    ("directions", ("down", "north"), ValueError, ["down, up, right, left", "'north'"]),
    ("directions", ("down", "up", "down", "left"), ValueError, ["twice", "'down'"]),
    ("directions", (0, 1, 2, 3), ValueError, ["down, up, right, left", "0"]),
    ("directions", None, TypeError, ["sequence", "None"]),
    ("directions", {"down"}, TypeError, ["sequence", "'down'"]),
    ("directions", "diagonal", ValueError, ["down, up, right, left", "'diagonal'"]),
    ("chunk", 0, ValueError, ["at least 1", "0"]),
    ("chunk", -3, ValueError, ["at least 1", "-3"]),
    ("chunk", 2.0, TypeError, ["int", "float"]),
    ("chunk", True, TypeError, ["int", "bool"]),
    ("chunk", "4", TypeError, ["int", "str"]),
    ("x", zeros(B, C, H, W).to_sparse(), TypeError, ["dense", "(B, C, H, W)", "sparse_coo"]),
    ("logits", zeros(B, D, 2, 3, H, W).to_sparse(), TypeError, ["dense", "sparse_coo"]),
    ("backend", "tpu", ValueError, ["reference", "'tpu'"]),
    ("backend", ["cpu"], TypeError, ["str", "list"]),
]


def shown(value: Any) -> str:
    return (
        f"{tuple(value.shape)}-{value.dtype}-{value.device}-{value.layout}"
        if isinstance(value, torch.Tensor)
        else repr(value)
    )


@pytest.mark.parametrize(
    ("name", "value", "error", "parts"), WRONG, ids=[f"{row[0]}-{shown(row[1])}" for row in WRONG]
)
def test_propagate_refuses(name: str, value: Any, error: type[Exception], parts: list[str]) -> None:
    with pytest.raises(error) as caught:
        gspn2.propagate(**good(**{name: value}))
    assert str(caught.value).startswith(f"{name}: ")
    for part in parts:
        assert part in str(caught.value)


LINE_SCAN_WRONG: list[tuple[str, Any, type[Exception], list[str]]] = [
    ("x", zeros(C, H, W), ValueError, ["4 dimensions", "(4, 5, 6)"]),
    ("lam", zeros(B, D, C, H, W), ValueError, ["4 dimensions", "(2, 4, 4, 5, 6)"]),
    ("lam", zeros(B, C, H, 1), ValueError, ["(2, 4, 5, 6)", "(2, 4, 5, 1)"]),
    ("w", None, TypeError, ["tensor", "NoneType"]),
    ("w", zeros(B, D, 1, 3, H, W), ValueError, ["5 dimensions", "(2, 4, 1, 3, 5, 6)"]),
    ("w", zeros(B, 3, 3, H, W), ValueError, ["G", "C = 4", "3"]),
    ("w", zeros(B, 1, 2, H, W), ValueError, ["(2, 1, 3, 5, 6)", "(2, 1, 2, 5, 6)"]),
    ("w", zeros(B, 1, 3, H, W, dtype=torch.float64), TypeError, ["float32", "float64"]),
    ("direction", "forward", ValueError, ["down, up, right, left", "'forward'"]),
    ("direction", ("down", "up"), TypeError, ["str", "tuple"]),
    ("chunk", 0, ValueError, ["at least 1", "0"]),
    ("backend", "tpu", ValueError, ["reference", "'tpu'"]),
]


@pytest.mark.parametrize(
    ("name", "value", "error", "parts"),
    LINE_SCAN_WRONG,
    ids=[f"{row[0]}-{shown(row[1])}" for row in LINE_SCAN_WRONG],
)
def test_line_scan_refuses(name: str, value: Any, error: type[Exception], parts: list[str]) -> None:
    arguments = {
        "x": zeros(B, C, H, W),
        "lam": zeros(B, C, H, W),
        "w": zeros(B, 1, 3, H, W),
        "direction": "down",
    }
    with pytest.raises(error) as caught:
        gspn2.line_scan(**{**arguments, name: value})
    assert str(caught.value).startswith(f"{name}: ")
    for part in parts:
        assert part in str(caught.value)


def test_one_direction_may_be_a_string(backend: str) -> None:
    case = make_case(directions=("up",))
    inputs = case.tensors()
    alone = gspn2.propagate(**inputs, directions="up", backend=backend)
    assert torch.equal(alone, gspn2.propagate(**inputs, directions=["up"], backend=backend))


def test_options_are_keyword_only() -> None:
    arguments = good()
    with pytest.raises(TypeError):
        gspn2.propagate(*arguments.values(), ("down", "up", "right", "left"))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_empty_batch(dtype: torch.dtype, backend: str) -> None:
    """No images in, no images out; gradients have the shapes of their inputs."""
    case = make_case(0, C, H, W, groups=2, chunk=2, dtype=dtype)
    results = run(case, backend=backend)
    assert results["y"].shape == (0, C, H, W)
    for name, tensor in case.tensors().items():
        assert results[f"d{name}"].shape == tensor.shape
        assert results[f"d{name}"].dtype == dtype
    w = zeros(0, 2, 3, H, W, dtype=dtype)
    assert gspn2.line_scan(case.x, None, w, direction="left", backend=backend).shape == case.x.shape


def test_empty_batch_gives_parameters_a_zero_gradient(backend: str) -> None:
    """A shared parameter expanded to an empty batch, as happens on a rank without samples."""
    gate = torch.ones(1, D, C, 1, 1, requires_grad=True)
    case = make_case(0, C, H, W, dtype=torch.float32)
    gspn2.propagate(case.x, case.logits, None, gate.expand(0, D, C, H, W), backend=backend).sum().backward()
    assert torch.equal(gate.grad, torch.zeros_like(gate))
