"""From tensors to driver calls, with a driver that only writes down what it is asked."""

from __future__ import annotations

import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import gspn2
from gspn2.backends import BACKENDS, DIRECTIONS, Problem, cuda
from gspn2.backends.cuda import driver, launch, params, toolchain
from gspn2.backends.cuda.geometry import Case, Device, Kernel, Launch, Plan
from helpers import make_case

KERNEL = Kernel("some.cu", "some", (("STORAGE", 1),))
NEEDS_ALL = (True, True, True, True)


def problem_of(tensors: dict[str, Any], chunk: int | None = None) -> Problem:
    return Problem.of(tensors["x"], tensors["taps"], DIRECTIONS, chunk, normalize=True)


def aligned(*shape: int, offset: int = 0) -> Tensor:
    """A float32 tensor whose address is `offset` elements past a multiple of 128 bytes."""
    size = torch.Size(shape).numel()
    memory = torch.zeros(size + 64 + offset)
    start = -memory.data_ptr() % 128 // 4 + offset
    return memory[start : start + size].view(shape)


def operands(**offsets: int) -> dict[str, Any]:
    shapes = {"x": (2, 4, 5, 6), "taps": (2, 4, 1, 3, 5, 6), "lam": (2, 4, 4, 5, 6), "gate": (2, 4, 4, 5, 6)}
    return {name: aligned(*shape, offset=offsets.get(name, 0)) for name, shape in shapes.items()}


class Recorder:
    """Stands for `driver.Loaded`: keeps what was loaded and run."""

    def __init__(self) -> None:
        self.loaded: list[tuple[Launch, bytes, int]] = []
        self.runs: list[tuple[Launch, dict[int, int], int]] = []

    def load(self, launch: Launch, arguments: bytes, places: list[int], index: int) -> SimpleNamespace:
        def run(addresses: list[int], stream: int) -> None:
            self.runs.append((launch, dict(zip(places, addresses, strict=True)), stream))

        self.loaded.append((launch, arguments, index))
        return SimpleNamespace(run=run)


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    """`launch` on CPU tensors: a plan of two launches with three scratch buffers, nothing run."""
    made = Recorder()
    monkeypatch.setattr(driver, "Loaded", made.load)
    monkeypatch.setattr(driver, "device", lambda index: Device())
    monkeypatch.setattr(driver, "current_device", lambda: -1)
    monkeypatch.setattr(driver, "stream", lambda index: 77)
    monkeypatch.setattr(launch, "_ready", {})
    # Outputs at addresses as CUDA's allocator gives them.
    monkeypatch.setattr(torch, "empty_like", lambda tensor: aligned(*tensor.shape))

    def choose(case: Case) -> Plan:
        steps = tuple(Launch(KERNEL, 8, 64, 1024, knobs=(number,)) for number in (5, 6))
        return Plan("some", steps, scratch=(100, 0, 700), reasons=())

    monkeypatch.setattr(launch, "choose", choose)
    return made


def places(tensors: dict[str, Any]) -> dict[int, int]:
    return {params.place(name): t.data_ptr() for name, t in tensors.items() if t is not None}


def test_forward_gives_each_launch_its_addresses_and_scratch(recorder: Recorder) -> None:
    tensors = operands()
    y = launch.propagate(*tensors.values(), problem_of(tensors))
    assert [(plan.knobs, index) for plan, _, index in recorder.loaded] == [((5,), -1), ((6,), -1)]
    first, second = (dict(run[1]) for run in recorder.runs)
    assert first == second
    scratch = [first.pop(params.scratch_place(number)) for number in (0, 2)]
    assert first == places(tensors | {"y": y})
    assert scratch[1] - scratch[0] == 512, "100 bytes, up to where the next buffer may start"
    assert {stream for _, _, stream in recorder.runs} == {77}


def test_backward_without_some_gradients(recorder: Recorder) -> None:
    tensors = operands() | {"gate": None}
    dy = aligned(2, 4, 5, 6)
    needs = (True, False, True, True)
    dx, dtaps, dlam, dgate = launch.propagate_backward(dy, *tensors.values(), problem_of(tensors), needs)
    assert dtaps is None
    assert dgate is None
    found = {place: address for place, address in recorder.runs[0][1].items() if place < 70}
    assert found == places(tensors | {"dy": dy, "dx": dx, "dlam": dlam})


def test_a_state_that_was_kept_is_handed_on_as_y(recorder: Recorder) -> None:
    tensors = operands() | {"gate": None}
    dy, hidden = aligned(2, 4, 5, 6), aligned(2, 4, 5, 6)
    launch.propagate_backward(dy, *tensors.values(), problem_of(tensors), NEEDS_ALL, hidden)
    assert recorder.runs[0][1][params.place("y")] == hidden.data_ptr()


def test_nothing_to_do_launches_nothing(recorder: Recorder) -> None:
    tensors = operands()
    empty = {name: tensor[:0] for name, tensor in tensors.items()}
    assert launch.propagate(*empty.values(), problem_of(empty)).shape == (0, 4, 5, 6)
    gradients = launch.propagate_backward(empty["x"], *empty.values(), problem_of(empty), NEEDS_ALL)
    assert [gradient.shape for gradient in gradients] == [tensor.shape for tensor in empty.values()]
    none = (False,) * 4
    assert (
        launch.propagate_backward(tensors["x"], *tensors.values(), problem_of(tensors), none) == (None,) * 4
    )
    assert recorder.loaded == recorder.runs == []


def test_plans_are_made_once_for_calls_that_look_alike(recorder: Recorder) -> None:
    tensors = operands()
    problem = problem_of(tensors)

    def calls(problem: Problem, tensors: dict[str, Any]) -> int:
        before = len(recorder.loaded)
        launch.propagate(*tensors.values(), problem)
        return (len(recorder.loaded) - before) // 2

    assert calls(problem, tensors) == 1
    assert calls(problem, tensors) == 0
    assert calls(problem, operands()) == 0, "other addresses"
    assert calls(problem_of(tensors, chunk=2), tensors) == 1
    assert calls(problem, tensors | {"gate": None}) == 1
    assert calls(problem, tensors | {"lam": None}) == 1
    assert calls(problem, tensors | {"x": aligned(2, 5, 6, 4).movedim(3, 1)}) == 1, "strides"
    assert calls(problem, operands(x=1)) == 1, "alignment"
    assert calls(problem, operands(x=1)) == 0
    assert calls(problem, operands(x=4)) == 1
    assert calls(problem, operands(x=3)) == 0, "as little aligned as by one element"
    assert calls(problem, operands(lam=1)) == 1
    launch.propagate_backward(tensors["x"], *tensors.values(), problem, NEEDS_ALL)
    assert len(recorder.loaded) == 2 * 9


def test_the_number_of_calls_kept_ready_is_bounded(
    recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "CAPACITY", 3)
    tensors = operands()
    for chunk in range(1, 10):
        launch.propagate(*tensors.values(), problem_of(tensors, chunk))
        assert len(launch._ready) <= 3


def test_another_current_device_is_switched_and_restored(
    recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    entered: list[int] = []

    @contextmanager
    def on_device(index: int) -> Iterator[None]:
        entered.append(index)
        yield
        entered.append(99)

    monkeypatch.setattr(driver, "current_device", lambda: 3)
    monkeypatch.setattr(torch.cuda, "device", on_device)
    tensors = operands()
    launch.propagate(*tensors.values(), problem_of(tensors))
    assert entered == [-1, 99]
    assert len(recorder.runs) == 2


def test_an_old_device_beside_newer_ones(recorder: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "device", lambda index: Device(capability=(7, 5)))
    tensors = operands()
    with pytest.raises(
        RuntimeError, match=r"needs compute capability 8\.0 or newer, and the device has 7\.5"
    ):
        launch.propagate(*tensors.values(), problem_of(tensors))


@pytest.fixture
def on_the_cpu(recorder: Recorder, monkeypatch: pytest.MonkeyPatch) -> Recorder:
    """The CUDA backend takes CPU tensors, and writes down what it would launch."""
    monkeypatch.setattr(cuda, "why_not", lambda problem: None)
    return recorder


def test_the_operator_reaches_the_backend(on_the_cpu: Recorder) -> None:
    case = make_case(2, 4, 5, 6, dtype=torch.float32)
    inputs = {name: t.requires_grad_() for name, t in case.tensors().items() if isinstance(t, Tensor)}
    y = gspn2.propagate(**inputs, backend="cuda")
    torch.autograd.grad(y, list(inputs.values()), torch.ones_like(y))
    assert len(on_the_cpu.runs) == 4


# The driver's side


class FakeDriver:
    """As much of `cuda.bindings.driver` as is used, with the real types."""

    def __init__(self, real: Any) -> None:
        self.real = real
        self.log: list[tuple[Any, ...]] = []
        self.mode = real.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_GLOBAL
        self.context = 0
        self.failing: dict[str, Any] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)

    def _done(self, name: str, *values: Any, note: tuple[Any, ...] = ()) -> tuple[Any, ...]:
        self.log.append((name, *note))
        return (self.failing.get(name, self.real.CUresult.CUDA_SUCCESS), *values)

    def cuLibraryLoadData(self, code: bytes, *rest: Any) -> tuple[Any, ...]:
        return self._done("load", "library", note=(code, self.mode.name.rsplit("_", 1)[1]))

    def cuLibraryGetKernel(self, library: Any, name: bytes) -> tuple[Any, ...]:
        return self._done("kernel", "handle", note=(name,))

    def cuKernelSetAttribute(self, attribute: Any, value: int, kernel: Any, device: Any) -> tuple[Any, ...]:
        short = attribute.name.removeprefix("CU_FUNC_ATTRIBUTE_")
        return self._done("attribute", note=(short, value, int(device)))

    def cuKernelGetFunction(self, kernel: Any) -> tuple[Any, ...]:
        return self._done("function", "function")

    def cuFuncLoad(self, function: Any) -> tuple[Any, ...]:
        return self._done("ready")

    def cuThreadExchangeStreamCaptureMode(self, mode: Any) -> tuple[Any, ...]:
        before, self.mode = self.mode, mode
        return (self.real.CUresult.CUDA_SUCCESS, before)

    def cuCtxGetCurrent(self) -> tuple[Any, ...]:
        return (self.real.CUresult.CUDA_SUCCESS, self.context)

    def cuCtxSetCurrent(self, context: int) -> tuple[Any, ...]:
        self.context = context
        return self._done("context", note=(context,))

    def cuDevicePrimaryCtxRetain(self, device: Any) -> tuple[Any, ...]:
        return (self.real.CUresult.CUDA_SUCCESS, 1000 + int(device))

    def cuGetErrorString(self, status: Any) -> tuple[Any, ...]:
        return (self.real.CUresult.CUDA_SUCCESS, b"what it means")

    def cuLaunchKernelEx(self, config: Any, kernel: Any, arguments: int, extra: int) -> tuple[Any, ...]:
        import ctypes

        if not self.context:
            return (self.real.CUresult.CUDA_ERROR_INVALID_CONTEXT,)
        address = ctypes.cast(arguments, ctypes.POINTER(ctypes.c_void_p))[0]
        packed = ctypes.string_at(address, params._FORMAT.size)
        cluster = [attribute.value.clusterDim.x for attribute in config.attrs[: config.numAttrs]]
        sizes = (config.gridDimX, config.blockDimX, config.sharedMemBytes, cluster, int(config.hStream))
        return self._done("launch", note=(sizes, packed))


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeDriver]:
    bindings = pytest.importorskip("cuda.bindings.driver")
    made = FakeDriver(bindings)
    monkeypatch.setattr("cuda.bindings.driver", made)
    monkeypatch.setattr(driver, "_libraries", {})
    monkeypatch.setattr(driver, "_allowed", {})
    monkeypatch.setattr(driver, "device", lambda index: Device())
    monkeypatch.setattr(toolchain, "target", lambda capability: toolchain.Target("sm_90"))
    monkeypatch.setattr(toolchain, "code", lambda kernel, target: b"code")
    driver._primary_context.cache_clear()
    yield made
    driver._primary_context.cache_clear()


ARGUMENTS = bytes(range(250)) + bytes(params._FORMAT.size - 250)


def named(fake: FakeDriver, *names: str) -> list[tuple[Any, ...]]:
    return [entry for entry in fake.log if entry[0] in names]


def test_loading_is_allowed_under_capture_and_done_once(fake: FakeDriver) -> None:
    driver.Loaded(Launch(KERNEL, 4, 64, 2000), ARGUMENTS, (), 1)
    driver.Loaded(Launch(KERNEL, 9, 64, 1000), ARGUMENTS, (), 1)
    driver.Loaded(Launch(KERNEL, 9, 64, 1000), ARGUMENTS, (), 0)
    assert named(fake, "load") == [("load", b"code", "RELAXED")]
    assert fake.mode.name.endswith("GLOBAL")
    assert len(named(fake, "ready")) == 3, "loaded before the first launch, not by it"
    limits = [entry[1:] for entry in named(fake, "attribute")]
    limit = "MAX_DYNAMIC_SHARED_SIZE_BYTES"
    assert limits == [(limit, 2000, 1), (limit, 1000, 0)], "raised, never lowered, for each device"


def test_the_capture_mode_is_restored_when_loading_fails(fake: FakeDriver) -> None:
    fake.failing["load"] = fake.CUresult.CUDA_ERROR_OUT_OF_MEMORY
    with pytest.raises(RuntimeError, match=r"cuLibraryLoadData: CUDA_ERROR_OUT_OF_MEMORY \(what it means\)"):
        driver.Loaded(Launch(KERNEL, 4, 64, 0), ARGUMENTS, (), 0)
    assert fake.mode.name.endswith("GLOBAL")
    fake.failing.clear()
    driver.Loaded(Launch(KERNEL, 4, 64, 0), ARGUMENTS, (), 0)


def test_too_much_shared_memory_is_an_error_with_the_number(fake: FakeDriver) -> None:
    fake.failing["attribute"] = fake.CUresult.CUDA_ERROR_INVALID_VALUE
    with pytest.raises(
        RuntimeError, match="300000 bytes of shared memory for some: CUDA_ERROR_INVALID_VALUE"
    ):
        driver.Loaded(Launch(KERNEL, 4, 64, 300000), ARGUMENTS, (), 0)


@pytest.mark.parametrize(("cluster", "attribute"), [(1, 0), (8, 0), (16, 1)])
def test_clusters(cluster: int, attribute: int, fake: FakeDriver) -> None:
    loaded = driver.Loaded(Launch(KERNEL, 32, 128, 0, cluster), ARGUMENTS, (), 0)
    loaded.run([], 5)
    allowed = [entry for entry in named(fake, "attribute") if "NON_PORTABLE" in entry[1]]
    assert len(allowed) == attribute
    (_, sizes, _) = named(fake, "launch")[0]
    assert sizes == (32, 128, 0, [cluster] if cluster > 1 else [], 5)


@pytest.mark.parametrize(("grid", "cluster"), [(0, 1), (2**31, 1), (6, 4)])
def test_impossible_grids(grid: int, cluster: int, fake: FakeDriver) -> None:
    with pytest.raises(RuntimeError, match=f"cannot run {grid} blocks in clusters of {cluster}"):
        driver.Loaded(Launch(KERNEL, grid, 64, 0, cluster), ARGUMENTS, (), 0)
    assert fake.log == []


def test_a_launch_gets_its_addresses_and_stream(fake: FakeDriver) -> None:
    loaded = driver.Loaded(Launch(KERNEL, 4, 64, 100), ARGUMENTS, (3, 73), 0)
    for address, stream in ((0x7FFF_1234_5678, 5), (0x1000, 6), (2**63 - 128, 6)):
        loaded.run([address, address + 1], stream)
        sizes, packed = named(fake, "launch")[-1][1:]
        assert sizes[-1] == stream
        words = struct.unpack_from("<74q", packed)
        assert (words[3], words[73]) == (address, address + 1)
        untouched = {0, 1, 2, *range(4, 31)}
        assert all(words[i] == struct.unpack_from("<q", ARGUMENTS, 8 * i)[0] for i in untouched)


def test_a_thread_without_a_context_gets_the_devices(fake: FakeDriver) -> None:
    loaded = driver.Loaded(Launch(KERNEL, 4, 64, 0), ARGUMENTS, (), 2)
    assert named(fake, "context") == [("context", 1002)]
    fake.context = 0  # as in a thread that has not called CUDA
    loaded.run([], 5)
    assert named(fake, "context") == [("context", 1002)] * 2
    assert len(named(fake, "launch")) == 1


def test_a_context_that_is_there_is_left_alone(fake: FakeDriver) -> None:
    fake.context = 4711
    driver.Loaded(Launch(KERNEL, 4, 64, 0), ARGUMENTS, (), 2).run([], 5)
    assert named(fake, "context") == []


def test_a_failed_launch_says_which(fake: FakeDriver) -> None:
    loaded = driver.Loaded(Launch(KERNEL, 4, 64, 100), ARGUMENTS, (), 0)
    fake.failing["launch"] = fake.CUresult.CUDA_ERROR_INVALID_VALUE
    with pytest.raises(
        RuntimeError, match=r"launching some failed: CUDA_ERROR_INVALID_VALUE \(what it means\)"
    ):
        loaded.run([], 5)


def test_threads_do_not_share_arguments(fake: FakeDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two threads inside the driver at once: each finds its own address when it gets there."""
    loaded = driver.Loaded(Launch(KERNEL, 4, 64, 0), ARGUMENTS, (0,), 0)
    both = threading.Barrier(2)
    launched = fake.cuLaunchKernelEx

    def slow(*arguments: Any) -> tuple[Any, ...]:
        both.wait(timeout=30)
        return launched(*arguments)

    monkeypatch.setattr(loaded, "_launch_kernel", slow)
    threads = [threading.Thread(target=lambda n=number: loaded.run([n], n)) for number in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = {(sizes[-1], struct.unpack_from("<q", packed)[0]) for _, sizes, packed in named(fake, "launch")}
    assert found == {(1, 1), (2, 2)}


# What the backend declines


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """A machine with one H200, for the backend's first look at it."""
    cuda._why_not_here.cache_clear()
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    monkeypatch.setattr(toolchain, "why_not", lambda: None)
    yield monkeypatch
    cuda._why_not_here.cache_clear()


def on_cuda(dtype: torch.dtype = torch.bfloat16) -> Problem:
    return Problem(DIRECTIONS, None, True, 1, 8, 1, 64, 64, dtype, "cuda")


def test_a_machine_with_everything(here: pytest.MonkeyPatch) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert cuda.why_not(on_cuda(dtype)) is None
    assert cuda.why_not(on_cuda(torch.float64)) == "float64 runs in the reference"


def test_reasons_of_machines_that_lack_something(here: pytest.MonkeyPatch) -> None:
    def reason() -> str:
        cuda._why_not_here.cache_clear()
        found = cuda.why_not(on_cuda())
        assert found is not None
        return found

    here.setattr(toolchain, "why_not", lambda: "it needs cuda-core")
    assert reason() == "it needs cuda-core"
    here.setattr(torch.cuda, "get_device_capability", lambda index: (7, 5))
    assert reason() == "it needs compute capability 8.0 or newer, and the device has 7.5"
    here.setattr(torch.cuda, "is_available", lambda: False)
    assert reason() == "PyTorch finds no CUDA device"
    here.setattr(torch.version, "cuda", None)
    here.setattr(torch.version, "hip", "7.0")
    assert reason() == "it needs a PyTorch built for CUDA, and this one is built for ROCm"
    here.setattr(torch.version, "hip", None)
    assert reason().endswith("this one is built for the CPU only")


def test_asked_for_on_the_cpu_it_says_where_it_runs() -> None:
    case = make_case(dtype=torch.float32)
    with pytest.raises(RuntimeError, match=r"backend='cuda' cannot run.*runs on CUDA devices.*are on cpu"):
        gspn2.propagate(**case.tensors(), backend="cuda")
    assert next(iter(BACKENDS)) == "cuda"
