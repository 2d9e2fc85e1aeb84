"""On a GPU: the operator among PyTorch's streams, graphs, compiler, autocast, threads and devices."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import gspn2
from gspn2 import backends
from gspn2.backends import cuda
from gspn2.backends.cuda import disk, driver, launch, toolchain

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
needs_two = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device")

INPUTS = ("x", "logits", "lam", "gate")
LONG = 200_000_000
"""Clock cycles: some 0.1 s, longer than any call on the host."""


def operands(
    size: tuple[int, int, int, int] = (2, 8, 48, 40),
    dtype: torch.dtype = torch.bfloat16,
    device: str = "cuda",
    seed: int = 0,
) -> dict[str, Tensor]:
    """Random operands, in planes, the same on every device."""
    batch, channels, height, width = size
    generator = torch.Generator().manual_seed(seed)
    shapes = ((channels,), (4, 1, 3), (4, channels), (4, channels))
    return {
        name: torch.randn(batch, *shape, height, width, generator=generator).to(device, dtype)
        for name, shape in zip(INPUTS, shapes, strict=True)
    }


def gradients(
    tensors: dict[str, Tensor], dy: Tensor, run: Callable[..., Tensor] = gspn2.propagate
) -> list[Tensor]:
    """y and the gradients of every operand."""
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in tensors.items()}
    y = run(**leaves)
    return [y.detach(), *torch.autograd.grad(y, list(leaves.values()), dy)]


def assert_same(found: list[Tensor], expected: list[Tensor]) -> None:
    for name, one, other in zip(("y", *INPUTS), found, expected, strict=True):
        assert torch.equal(one, other), name


def assert_close(found: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    for name, one, other in zip(("y", *INPUTS), found, expected, strict=True):
        worst = (one.double() - other.double()).abs().max() / other.double().abs().max()
        assert worst < tolerance, f"{name}: {worst}"


@pytest.fixture
def first_call(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nothing is planned, loaded or compiled."""
    monkeypatch.setattr(launch, "_ready", {})
    monkeypatch.setattr(driver, "_libraries", {})
    monkeypatch.setattr(driver, "_allowed", {})
    monkeypatch.setenv("GSPN2_CACHE_DIR", str(tmp_path))


def test_the_cuda_backend_is_chosen() -> None:
    tensors = operands()
    problem = backends.Problem.of(tensors["x"], tensors["logits"], backends.DIRECTIONS, None, normalize=True)
    assert backends.select(problem) is cuda
    assert toolchain.why_not() is None


@pytest.mark.usefixtures("first_call")
def test_a_second_process_would_find_the_kernels_on_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = operands()
    expected = gspn2.propagate(**tensors)
    assert list(disk.folder().iterdir())
    monkeypatch.setattr(launch, "_ready", {})
    monkeypatch.setattr(driver, "_libraries", {})

    def compile_kernel(*_: object) -> None:
        raise AssertionError("compiled again")

    monkeypatch.setattr(toolchain, "compile_kernel", compile_kernel)
    assert torch.equal(gspn2.propagate(**tensors), expected)


# Streams and threads


def test_work_waits_for_its_own_stream() -> None:
    """An operand that is written late on the current stream is read after that."""
    late, expected = operands(seed=1), gspn2.propagate(**operands(seed=1))
    tensors = operands(seed=0)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(LONG)
        for name, tensor in tensors.items():
            tensor.copy_(late[name])
        y = gspn2.propagate(**tensors)
    assert not stream.query(), "the host did not wait"
    stream.synchronize()
    assert torch.equal(y, expected)


def test_two_streams_at_once() -> None:
    """Calls under way at the same time, of one plan: neither sees arguments or scratch of the other."""
    cases = [operands((1, 8, 300, 260), seed=seed) for seed in range(2)]
    dys = [torch.randn_like(case["x"]) for case in cases]
    expected = [gradients(case, dy) for case, dy in zip(cases, dys, strict=True)]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in cases]
    found: list[list[list[Tensor]]] = [[], []]
    for stream in streams:
        with torch.cuda.stream(stream):
            torch.cuda._sleep(LONG)
    for _ in range(10):
        for number, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                found[number].append(gradients(cases[number], dys[number]))
    torch.cuda.synchronize()
    for number, results in enumerate(found):
        for result in results:
            assert_same(result, expected[number])


def test_threads_with_streams_of_their_own() -> None:
    cases = [operands((1, 8, 130, 90), seed=seed) for seed in range(4)]
    expected = [gspn2.propagate(**case) for case in cases]
    wrong: list[str] = []

    def work(number: int) -> None:
        try:
            with torch.cuda.stream(torch.cuda.Stream()):
                results = [gspn2.propagate(**cases[number]) for _ in range(50)]
                torch.cuda.current_stream().synchronize()
            if not all(torch.equal(result, expected[number]) for result in results):
                wrong.append(f"thread {number}")
        except Exception as error:
            wrong.append(f"thread {number}: {error}")

    torch.cuda.synchronize()
    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(cases))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.mark.usefixtures("first_call")
def test_a_thread_that_never_called_cuda() -> None:
    tensors = operands()
    found: list[Tensor | Exception] = []

    def work() -> None:
        try:
            found.append(gspn2.propagate(**tensors))
        except Exception as error:
            found.append(error)

    for _ in range(2):  # loading, then launching only
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    torch.cuda.synchronize()
    assert all(isinstance(result, Tensor) for result in found), found
    assert all(torch.equal(result, gspn2.propagate(**tensors)) for result in found)  # type: ignore[arg-type]


def test_the_host_never_waits() -> None:
    tensors, dy = operands(), operands(seed=1)["x"]
    gradients(tensors, dy)
    torch.cuda.set_sync_debug_mode("error")
    try:
        gradients(tensors, dy)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_scratch_goes_back_to_the_allocator() -> None:
    tensors = operands((2, 8, 200, 100))
    gspn2.propagate(**tensors)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    y = gspn2.propagate(**tensors)
    assert torch.cuda.memory_allocated() - before <= y.numel() * y.element_size() + 512


# CUDA graphs


def test_a_captured_graph_reads_new_operands() -> None:
    tensors, dy = operands(), operands(seed=9)["x"]
    gradients(tensors, dy)
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        found = gradients(tensors, dy)
    for seed in (5, 6):
        fresh = operands(seed=seed)
        for name, tensor in tensors.items():
            tensor.copy_(fresh[name])
        graph.replay()
        assert_same(found, gradients(fresh, dy))


@pytest.mark.usefixtures("first_call")
def test_the_first_call_may_be_under_capture() -> None:
    """Compiling and loading are no part of the graph, and do not break it."""
    tensors, dy = operands(), operands(seed=9)["x"]
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = gradients(tensors, dy)
    graph.replay()
    torch.cuda.synchronize()
    assert_same(found, gradients(tensors, dy))


# The compiler, autocast, the profiler


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled_as_one_graph(mode: str) -> None:
    torch.compiler.reset()

    def block(x: Tensor, logits: Tensor, lam: Tensor, gate: Tensor) -> Tensor:
        return gspn2.propagate(x * 2, logits, lam.sigmoid(), gate, chunk=16).relu()

    tensors = operands(dtype=torch.float32)
    dy = torch.randn_like(tensors["x"])
    expected = gradients(tensors, dy, block)
    compiled = torch.compile(block, fullgraph=True, mode=mode)
    for _ in range(3):  # reduce-overhead: warm up, capture, replay
        torch.compiler.cudagraph_mark_step_begin()
        found = [tensor.clone() for tensor in gradients(tensors, dy, compiled)]
    assert_close(found, expected, 1e-5)


def test_compiled_once_for_all_sizes() -> None:
    torch.compiler.reset()
    compiled = torch.compile(gspn2.propagate, fullgraph=True, dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for size in ((2, 8, 24, 32), (3, 8, 40, 17), (2, 8, 65, 130)):
            tensors = operands(size)
            assert torch.equal(compiled(**tensors), gspn2.propagate(**tensors))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_casts_operands_and_gradients_back(dtype: torch.dtype) -> None:
    tensors = {name: tensor.requires_grad_() for name, tensor in operands(dtype=torch.float32).items()}
    with torch.autocast("cuda", dtype=dtype):
        y = gspn2.propagate(**tensors)
    assert y.dtype == dtype
    assert torch.equal(y, gspn2.propagate(**{name: t.detach().to(dtype) for name, t in tensors.items()}))
    y.sum().backward()
    assert all(tensor.grad is not None and tensor.grad.dtype == torch.float32 for tensor in tensors.values())


def test_profiles_show_the_operator_and_its_kernel() -> None:
    from torch.profiler import ProfilerActivity, profile

    tensors = operands()
    gspn2.propagate(**tensors)
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        gspn2.propagate(**tensors)
    assert "gspn2::propagate" in {event.key for event in seen.key_averages()}


# Devices


def test_several_capabilities_in_one_table() -> None:
    for index in range(torch.cuda.device_count()):
        device = driver.device(index)
        assert device.capability == torch.cuda.get_device_capability(index)
        assert device.shared_memory >= 96 * 1024
        assert device.cache > 2**20


@needs_two
def test_a_device_that_is_not_the_current_one() -> None:
    """Devices one after another and at once, all called while device 0 is current."""
    dy = operands(seed=3)["x"]
    expected = [tensor.cpu() for tensor in gradients(operands(), dy)]
    found = [gradients(operands(device=f"cuda:{i}"), dy.to(f"cuda:{i}")) for i in (1, 0, 1)]
    assert torch.cuda.current_device() == 0
    for result, index in zip(found, (1, 0, 1), strict=True):
        assert all(tensor.device.index == index for tensor in result)
        assert_same([tensor.cpu() for tensor in result], expected)
    with torch.cuda.device(1):
        assert torch.equal(gspn2.propagate(**operands()).cpu(), expected[0])


@needs_two
def test_tensors_of_two_devices_are_refused() -> None:
    tensors = operands() | {"lam": operands(device="cuda:1")["lam"]}
    with pytest.raises(ValueError, match="lam: expected device cuda:0 like x, got cuda:1"):
        gspn2.propagate(**tensors)


# Problems at the edge


def test_an_empty_batch() -> None:
    tensors = operands((0, 8, 20, 30))
    found = gradients(tensors, tensors["x"])
    assert [tensor.shape for tensor in found[1:]] == [tensor.shape for tensor in tensors.values()]
    assert all(tensor.is_cuda for tensor in found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_unusual_operands_and_gradients(dtype: torch.dtype) -> None:
    """Expanded, flipped, transposed and misaligned: as contiguous copies of them give."""
    size = (3, 6, 37, 29)
    tensors = operands(size, dtype)
    shifted = torch.empty(tensors["lam"].numel() + 1, device="cuda", dtype=dtype)[1:].view(
        tensors["lam"].shape
    )
    unusual = {
        "x": tensors["x"][:1].expand(size),
        "logits": tensors["logits"].flip(3).transpose(-1, -2).contiguous().transpose(-1, -2),
        "lam": shifted.copy_(tensors["lam"]),
        "gate": tensors["gate"][:, :, :1, :1].expand(-1, -1, 6, 37, -1),
    }
    dy = operands(size, dtype, seed=1)["x"][..., :1].expand(size)
    found = gradients(unusual, dy)
    plain = {name: tensor.contiguous() for name, tensor in unusual.items()}
    exact = gradients({name: tensor.double() for name, tensor in plain.items()}, dy.double(), reference)
    assert_close(found, exact, 2e-5 if dtype == torch.float32 else 2e-2)
    assert_close(gradients(plain, dy.contiguous()), exact, 2e-5 if dtype == torch.float32 else 2e-2)


def reference(**tensors: Tensor) -> Tensor:
    return gspn2.propagate(**tensors, backend="reference")


def test_float64_runs_in_the_reference_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_warned", set())
    tensors = operands(dtype=torch.float64)
    with pytest.warns(UserWarning, match="slow reference implementation.*float64 runs in the reference"):
        y = gspn2.propagate(**tensors)
    assert torch.equal(y, reference(**tensors))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gspn2.propagate(**tensors)
    with pytest.raises(RuntimeError, match="backend='cuda' cannot run this problem: float64 runs in the ref"):
        gspn2.propagate(**tensors, backend="cuda")


def test_the_other_backends_say_why_they_do_not_run_here() -> None:
    with pytest.raises(RuntimeError, match=r"backend='cpu' cannot run.*the tensors are on cuda"):
        gspn2.propagate(**operands(), backend="cpu")
    with pytest.raises(RuntimeError, match=r"backend='cuda' cannot run.*the tensors are on cpu"):
        gspn2.propagate(**operands(device="cpu"), backend="cuda")
