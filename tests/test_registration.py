"""The operator inside PyTorch: opcheck, compile, export, vmap, torch.func, checkpointing, autocast, fakes."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.export import Dim
from torch.utils.checkpoint import checkpoint

import gspn2
from gspn2.backends import DIRECTIONS
from helpers import INPUTS, Case, assert_close, assert_same_bits, make_case, max_error, run

ALL = [DIRECTIONS.index(name) for name in DIRECTIONS]


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    torch._dynamo.reset()


# opcheck: schema, fake, autograd registration, AOT dispatch with dynamic shapes


@pytest.mark.parametrize("optional", [True, False])
@pytest.mark.parametrize("chunk", [0, 2])
@pytest.mark.parametrize("normalize", [True, False])
def test_opcheck_forward(normalize: bool, chunk: int, optional: bool, backend: str) -> None:
    case = make_case(2, 2, 3, 4, groups=2, lam=optional, gate=optional)
    inputs = [None if t is None else t.requires_grad_() for t in (case.x, case.logits, case.lam, case.gate)]
    torch.library.opcheck(torch.ops.gspn2.propagate, (*inputs, ALL, chunk, normalize, backend))


@pytest.mark.parametrize("needs", [[True] * 4, [True, False, False, True], [False, True, True, False]])
@pytest.mark.parametrize("optional", [True, False])
def test_opcheck_backward(optional: bool, needs: list[bool], backend: str) -> None:
    case = make_case(2, 2, 3, 4, lam=optional, gate=optional)
    tensors = (case.dy, case.x, case.logits, case.lam, case.gate)
    torch.library.opcheck(torch.ops.gspn2.propagate_backward, (*tensors, ALL, 0, True, backend, needs))


@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_fakes_predict_shapes_strides_and_dtypes(format: torch.memory_format, backend: str) -> None:
    """What the compiler plans memory by is what the operator returns."""
    case = make_case(2, 4, 5, 6, groups=2, dtype=torch.bfloat16)
    x = case.x.contiguous(memory_format=format)
    inputs = (x, case.logits, case.lam, case.gate)
    options = (ALL, 2, True, backend)
    real = [torch.ops.gspn2.propagate(*inputs, *options)]
    real += torch.ops.gspn2.propagate_backward(case.dy, *inputs, *options, [True, True, False, True])
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        dy, *fakes = (mode.from_tensor(tensor) for tensor in (case.dy, *inputs))
        fake = [torch.ops.gspn2.propagate(*fakes, *options)]
        fake += torch.ops.gspn2.propagate_backward(dy, *fakes, *options, [True, True, False, True])
    for mine, predicted in zip(real, fake, strict=True):
        assert mine.shape == predicted.shape
        assert mine.stride() == predicted.stride()
        assert mine.dtype == predicted.dtype


def test_meta_tensors_run_forward_and_backward() -> None:
    """Shapes without memory, as models are measured before they are built: 2^40 elements here."""
    x = torch.empty(2**6, 2**10, 2**12, 2**12, device="meta", dtype=torch.bfloat16, requires_grad=True)
    logits = torch.empty(2**6, 1, 1, 3, 2**12, 2**12, device="meta", dtype=torch.bfloat16, requires_grad=True)
    y = gspn2.propagate(x, logits, directions=("down",))
    assert (y.shape, y.dtype, y.device.type) == (x.shape, x.dtype, "meta")
    y.sum().backward()
    assert x.grad.shape == x.shape
    assert logits.grad.shape == logits.shape


# Compilers


def run_through(function: Callable[..., Tensor], case: Case, backend: str) -> dict[str, Tensor]:
    return run(case, lambda **inputs: function(**inputs, backend=backend))


@pytest.mark.parametrize("optional", [True, False])
def test_compiles_as_one_graph(optional: bool, backend: str) -> None:
    case = make_case(2, 4, 5, 6, groups=2, chunk=3, lam=optional, gate=optional)
    compiled = torch.compile(gspn2.propagate, fullgraph=True, backend="aot_eager")
    assert_same_bits(run_through(compiled, case, backend), run(case, backend=backend))


def test_compiles_line_scan(backend: str) -> None:
    case = make_case(2, 4, 5, 6)
    compiled = torch.compile(gspn2.line_scan, fullgraph=True, backend="aot_eager")
    arguments = (case.x, case.lam[:, 0], case.logits[:, 0])
    options: dict[str, Any] = {"direction": "up", "chunk": 2, "backend": backend}
    assert torch.equal(compiled(*arguments, **options), gspn2.line_scan(*arguments, **options))


@pytest.mark.skipif(
    not any(shutil.which(name) for name in ("c++", "g++", "clang++")), reason="inductor needs a C++ compiler"
)
def test_compiles_with_inductor(backend: str) -> None:
    """Between operations that inductor fuses and lays out as it likes; x is channels_last."""

    def block(x: Tensor, logits: Tensor, lam: Tensor, gate: Tensor) -> Tensor:
        h = gspn2.propagate(x.sin(), logits * 0.5, lam.exp(), gate.tanh(), chunk=4, backend=backend)
        return torch.relu(h) * x

    case = make_case(2, 4, 5, 6, dtype=torch.float32)
    case = replace(case, x=case.x.contiguous(memory_format=torch.channels_last))

    def both(function: Callable[..., Tensor]) -> dict[str, Tensor]:
        return run(case, lambda directions, chunk, **inputs: function(**inputs))

    assert_close(both(torch.compile(block, fullgraph=True)), both(block), 1e-5)


def test_sizes_and_chunks_vary_without_recompiling(backend: str) -> None:
    """H, W, B and a chunk computed from them: one compilation for all of them, forward and backward."""
    counter = CompileCounterWithBackend("aot_eager")

    def half_chunk(
        x: Tensor, logits: Tensor, lam: Tensor, gate: Tensor, directions: tuple[str, ...]
    ) -> Tensor:
        chunk = x.shape[2] // 2
        return gspn2.propagate(x, logits, lam, gate, directions=directions, chunk=chunk, backend=backend)

    compiled = torch.compile(half_chunk, fullgraph=True, dynamic=True, backend=counter)
    # All sizes of the first call differ: the compiler takes equal ones for the same variable.
    for batch, height, width in ((7, 5, 11), (3, 8, 6), (2, 4, 9), (5, 11, 3)):
        case = make_case(batch, 6, height, width, groups=2, chunk=height // 2)
        found = run(case, lambda chunk, **inputs: compiled(**inputs))
        assert_same_bits(found, run(case, backend=backend))
    assert counter.frame_count == 1


def test_marked_dimensions_stay_dynamic(backend: str) -> None:
    """`mark_dynamic` raises if anything in the operator pinned a size."""
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(gspn2.propagate, fullgraph=True, backend=counter)
    for height, width in ((5, 7), (8, 6), (9, 4)):
        case = make_case(2, 4, height, width)
        for tensor in case.tensors().values():
            torch._dynamo.mark_dynamic(tensor, tensor.ndim - 2)
            torch._dynamo.mark_dynamic(tensor, tensor.ndim - 1)
        found = compiled(**case.tensors(), backend=backend)
        assert max_error(found, run(case, backend=backend)["y"]) <= 1e-12
    assert counter.frame_count == 1


def test_errors_survive_compilation() -> None:
    """A wrong shape is refused by name while tracing too."""
    case = make_case(2, 4, 5, 6)
    compiled = torch.compile(gspn2.propagate, backend="aot_eager")
    with pytest.raises(Exception, match=r"lam: expected"):
        compiled(case.x, case.logits, case.lam[:, :2])


class Layer(torch.nn.Module):
    def __init__(self, backend: str) -> None:
        super().__init__()
        self.backend = backend

    def forward(self, x: Tensor, logits: Tensor, lam: Tensor, gate: Tensor) -> Tensor:
        return gspn2.propagate(x, logits, lam, gate, chunk=3, backend=self.backend) + x


def test_exports_with_dynamic_sizes(backend: str) -> None:
    layer = Layer(backend)
    height, width = Dim("height", min=2, max=4096), Dim("width", min=2, max=4096)
    shapes = {name: {t.ndim - 2: height, t.ndim - 1: width} for name, t in make_case().tensors().items()}
    program = torch.export.export(layer, tuple(make_case().tensors().values()), dynamic_shapes=shapes)
    targets = [node.target for node in program.graph.nodes if node.op == "call_function"]
    assert torch.ops.gspn2.propagate.default in targets
    for size in ((5, 6), (11, 3), (2, 40)):
        inputs = make_case(2, 4, *size).tensors()
        assert torch.equal(program.module()(*inputs.values()), layer(**inputs))


def test_exported_program_survives_a_file(backend: str, tmp_path: Any) -> None:
    layer, inputs = Layer(backend), make_case().tensors()
    path = tmp_path / "layer.pt2"
    torch.export.save(torch.export.export(layer, tuple(inputs.values())), path)
    assert torch.equal(torch.export.load(path).module()(*inputs.values()), layer(**inputs))


# vmap and torch.func


def per_sample(case: Case, backend: str) -> Callable[..., Tensor]:
    """propagate for tensors without their batch axis."""

    def propagate(*inputs: Tensor) -> Tensor:
        y = gspn2.propagate(*(tensor.unsqueeze(0) for tensor in inputs), chunk=case.chunk, backend=backend)
        return y.squeeze(0)

    return propagate


@pytest.mark.parametrize("mapped", [(0, 0, 0, 0), (1, 2, 3, -1), (0, None, None, 2), (None, 0, -2, None)])
def test_vmap(mapped: tuple[int | None, ...], backend: str) -> None:
    """Over any axis of any of the inputs, the others shared."""
    cases = [make_case(2, 2, 3, 4, chunk=2, seed=seed) for seed in range(3)]

    def stacked(name: str, axis: int | None) -> Tensor:
        tensors = [case.tensors()[name] for case in cases]
        return tensors[0] if axis is None else torch.stack(tensors, axis)

    inputs = [stacked(name, axis) for name, axis in zip(INPUTS, mapped, strict=True)]

    def propagate(*tensors: Tensor) -> Tensor:
        return gspn2.propagate(*tensors, chunk=2, backend=backend)

    found = torch.func.vmap(propagate, in_dims=mapped)(*inputs)
    for i in range(3):
        alone = [t if axis is None else t.select(axis, i) for t, axis in zip(inputs, mapped, strict=True)]
        assert max_error(found[i], propagate(*alone)) <= 1e-12


@pytest.mark.parametrize(("images", "batch"), [(0, 2), (3, 0)])
def test_vmap_of_nothing(images: int, batch: int, backend: str) -> None:
    x = torch.randn(images, batch, 2, 3, 4, dtype=torch.float64)
    logits = torch.randn(batch, 4, 1, 3, 3, 4, dtype=torch.float64)

    def total(image: Tensor) -> Tensor:
        return gspn2.propagate(image, logits, backend=backend).sum()

    assert torch.func.vmap(torch.func.grad(total))(x).shape == x.shape


def test_vmap_inside_vmap(backend: str) -> None:
    x = torch.randn(2, 3, 1, 2, 3, 4, dtype=torch.float64)
    logits = torch.randn(1, 4, 1, 3, 3, 4, dtype=torch.float64)

    def propagate(image: Tensor) -> Tensor:
        return gspn2.propagate(image, logits, backend=backend)

    found = torch.func.vmap(torch.func.vmap(propagate))(x)
    for i in range(2):
        for j in range(3):
            assert max_error(found[i, j], propagate(x[i, j])) <= 1e-12


def test_gradients_through_vmap(backend: str) -> None:
    """backward() through a vmapped call: shared inputs collect the gradients of all."""
    case = make_case(3, 2, 3, 4, chunk=2)
    leaves = [tensor.detach().requires_grad_() for tensor in case.tensors().values()]
    torch.func.vmap(per_sample(case, backend))(*leaves).backward(case.dy)
    expected = run(case, backend=backend)
    for name, leaf in zip(INPUTS, leaves, strict=True):
        assert max_error(leaf.grad, expected[f"d{name}"]) <= 1e-12


def test_per_sample_gradients(backend: str) -> None:
    """torch.func.grad under vmap, as in differentially private training and influence functions."""
    case = make_case(3, 2, 3, 4, chunk=2)
    propagate = per_sample(case, backend)

    def loss(dy: Tensor, *inputs: Tensor) -> Tensor:
        return (propagate(*inputs) * dy).sum()

    gradients = torch.func.vmap(torch.func.grad(loss, argnums=(1, 2, 3, 4)))(
        case.dy, *case.tensors().values()
    )
    expected = run(case, backend=backend)
    for name, gradient in zip(INPUTS, gradients, strict=True):
        assert max_error(gradient, expected[f"d{name}"]) <= 1e-12


def test_jacobian(backend: str) -> None:
    """jacrev against autograd's own ways over outputs: a loop, and gradients in batches."""
    case = make_case(1, 2, 3, 2)

    def of_x(x: Tensor) -> Tensor:
        return gspn2.propagate(x, case.logits, case.lam, backend=backend)

    found = torch.func.jacrev(of_x)(case.x)
    for vectorize in (False, True):
        expected = torch.autograd.functional.jacobian(of_x, case.x, vectorize=vectorize)
        assert max_error(found, expected) <= 1e-12


# First order only, and never silently wrong.


@pytest.mark.parametrize("name", INPUTS)
def test_double_backward_is_refused(name: str, backend: str) -> None:
    case = make_case(1, 2, 3, 4)
    leaves = {n: tensor.detach().requires_grad_() for n, tensor in case.tensors().items()}
    y = gspn2.propagate(**leaves, backend=backend)
    (gradient,) = torch.autograd.grad(y.square().sum(), leaves[name], create_graph=True)
    with pytest.raises((RuntimeError, NotImplementedError), match=r"(?i)gspn2.*(twice|double|second)"):
        gradient.square().sum().backward()


def with_dual_numbers(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    with forward_ad.dual_level():
        return function(forward_ad.make_dual(x, x))


FORWARD_MODE: dict[str, Callable[[Callable[[Tensor], Tensor], Tensor], Any]] = {
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (x,)),
    "jacfwd": lambda f, x: torch.func.jacfwd(f)(x),
    "linearize": lambda f, x: torch.func.linearize(f, x),
    "compiled": lambda f, x: torch.compile(lambda v: torch.func.jvp(f, (v,), (v,)), backend="eager")(x),
    "dual numbers": with_dual_numbers,
}


@pytest.mark.parametrize("differentiate", FORWARD_MODE.values(), ids=FORWARD_MODE)
@pytest.mark.parametrize("name", ["x", "gate"])
def test_forward_mode_is_refused(name: str, differentiate: Any) -> None:
    """A tangent of zero would be wrong without a word."""
    inputs = make_case(1, 2, 3, 4).tensors()

    def of_one(tensor: Tensor) -> Tensor:
        return gspn2.propagate(**(inputs | {name: tensor}))

    with pytest.raises(NotImplementedError, match="forward-mode"):
        differentiate(of_one, inputs[name])


def test_forward_mode_elsewhere_does_not_disturb() -> None:
    """What carries no tangent may be propagated while others do."""
    case = make_case(1, 2, 3, 4)
    with forward_ad.dual_level():
        assert torch.equal(gspn2.propagate(**case.tensors()), run(case)["y"])


# Activation checkpointing


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_activation_checkpointing(use_reentrant: bool, backend: str) -> None:
    case = make_case(2, 4, 5, 6, chunk=3)

    def recomputed(x: Tensor, logits: Tensor, lam: Tensor, gate: Tensor, **_: Any) -> Tensor:
        def propagate(*inputs: Tensor) -> Tensor:
            return gspn2.propagate(*inputs, chunk=3, backend=backend)

        return checkpoint(propagate, x, logits, lam, gate, use_reentrant=use_reentrant)

    if use_reentrant:  # works with backward() only
        leaves = [tensor.detach().requires_grad_() for tensor in case.tensors().values()]
        y = recomputed(*leaves)
        y.backward(case.dy)
        found = {"y": y.detach()} | {f"d{n}": leaf.grad for n, leaf in zip(INPUTS, leaves, strict=True)}
    else:
        found = run(case, recomputed)
    assert_same_bits(found, run(case, backend=backend))


def test_inputs_changed_before_backward_are_noticed(backend: str) -> None:
    case = make_case()
    x = case.x.clone().requires_grad_() * 1
    y = gspn2.propagate(x, case.logits, case.lam, backend=backend)
    x.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


# Autocast


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_casts_everything_to_its_dtype(dtype: torch.dtype, backend: str) -> None:
    """Also inputs that come in different dtypes; gradients come back in the dtypes of the inputs."""
    case = make_case(2, 4, 5, 6, dtype=torch.float32)
    leaves = {name: tensor.requires_grad_() for name, tensor in case.tensors().items()}
    mixed = {name: leaf.to(dtype) if name in ("x", "gate") else leaf for name, leaf in leaves.items()}
    with torch.autocast("cpu", dtype=dtype):
        y = gspn2.propagate(**mixed, backend=backend)
    assert y.dtype == dtype
    rounded = run(case.to(dtype), backend=backend)
    assert torch.equal(y, rounded["y"])
    gradients = torch.autograd.grad(y, tuple(leaves.values()), case.dy.to(dtype))
    for name, gradient in zip(leaves, gradients, strict=True):
        assert gradient.dtype == torch.float32
        assert torch.equal(gradient, rounded[f"d{name}"].float()), name


def test_autocast_leaves_float64_alone(backend: str) -> None:
    case = make_case()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = gspn2.propagate(**case.tensors(), backend=backend)
    assert torch.equal(y, run(case, backend=backend)["y"])


def test_autocast_applies_to_line_scan(backend: str) -> None:
    case = make_case(dtype=torch.float32)
    arguments = (case.x, case.lam[:, 0], case.logits[:, 0])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        h = gspn2.line_scan(*arguments, direction="down", backend=backend)
    rounded = (tensor.bfloat16() for tensor in arguments)
    assert torch.equal(h, gspn2.line_scan(*rounded, direction="down", backend=backend))


def test_autocast_does_not_hide_wrong_dtypes() -> None:
    x = torch.zeros(1, 1, 2, 2, dtype=torch.int64)
    logits = torch.zeros(1, 4, 1, 3, 2, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(TypeError, match="x: expected dtype"):
        gspn2.propagate(x, logits)


def test_autocast_under_compile(backend: str) -> None:
    case = make_case(dtype=torch.float32)

    def cast(x: Tensor, logits: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return gspn2.propagate(x, logits, backend=backend)

    compiled = torch.compile(cast, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(case.x, case.logits), cast(case.x, case.logits))


def test_no_graph_without_gradients(backend: str) -> None:
    case = make_case()
    leaves = {name: tensor.requires_grad_() for name, tensor in case.tensors().items()}
    with torch.no_grad():
        assert not gspn2.propagate(**leaves, backend=backend).requires_grad
    with torch.inference_mode():
        assert gspn2.propagate(**leaves, backend=backend).is_inference()
