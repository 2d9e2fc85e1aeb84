"""The CUDA driver: devices, loaded kernels, and launches that cost as little host time as Python allows.

A kernel is loaded once in a process, as a library that belongs to no context, and made ready for a device
when the first plan there needs it. Everything under `launch.py` that touches a GPU is here.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from threading import Lock
from typing import Any

import torch

from . import toolchain
from .geometry import Device, Kernel, Launch

LARGEST_GRID = 2**31 - 1
PORTABLE_CLUSTER = 8

_lock = Lock()
_libraries: dict[tuple[Kernel, toolchain.Target], Any] = {}
_allowed: dict[tuple[Kernel, toolchain.Target, int], tuple[int, bool]] = {}


@cache
def device(index: int) -> Device:
    """What the planner needs to know of the device with this index."""
    properties = torch.cuda.get_device_properties(index)
    return Device(
        capability=(properties.major, properties.minor),
        multiprocessors=properties.multi_processor_count,
        shared_memory=properties.shared_memory_per_block_optin,  # type: ignore[attr-defined]
        cache=properties.L2_cache_size,
    )


def current_device() -> int:
    """Index of the device that is PyTorch's current one in this thread."""
    return torch.cuda.current_device()


def stream(index: int) -> int:
    """Handle of PyTorch's current stream on a device."""
    # As Triton's and Inductor's launchers do: torch.cuda.current_stream builds an object, ten times as slow.
    return torch._C._cuda_getCurrentRawStream(index)


class _Buffer:
    """What one launch in flight needs of its own: the packed arguments and the launch configuration."""

    def __init__(self, launch: Launch, arguments: bytes) -> None:
        from cuda.bindings import driver

        self.memory = ctypes.create_string_buffer(arguments, len(arguments))
        self.words = memoryview(self.memory).cast("B")[: len(arguments) // 8 * 8].cast("q")
        self.pointers = (ctypes.c_void_p * 1)(ctypes.addressof(self.memory))
        self.pointer = ctypes.addressof(self.pointers)
        config = driver.CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ = launch.grid, 1, 1
        config.blockDimX, config.blockDimY, config.blockDimZ = launch.block, 1, 1
        config.sharedMemBytes = launch.shared
        config.attrs, config.numAttrs = [], 0
        if launch.cluster > 1:
            attribute = driver.CUlaunchAttribute()
            attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
            size = attribute.value.clusterDim
            size.x, size.y, size.z = launch.cluster, 1, 1
            attribute.value.clusterDim = size
            config.attrs, config.numAttrs = [attribute], 1
        self.config = config
        self.stream = -1


class Loaded:
    """One launch of a plan, with its kernel ready on a device, to be repeated with other addresses.

    Several threads may `run` it at once: a call takes a buffer for its arguments that is nobody else's.
    """

    def __init__(self, launch: Launch, arguments: bytes, places: Sequence[int], index: int) -> None:
        """Compile and load what is not there yet.

        Args:
            launch: what the plan says.
            arguments: packed parameters (`params.pack`), in which `run` replaces addresses.
            places: where these addresses lie, in units of 8 bytes.
            index: of the device, which is the current one.

        Raises:
            RuntimeError: the grid is too large, or the kernel cannot be compiled or loaded.
        """
        if not 0 < launch.grid <= LARGEST_GRID or launch.grid % launch.cluster:
            raise RuntimeError(
                f"gspn2: {launch.kernel.function} cannot run {launch.grid} blocks in clusters of "
                f"{launch.cluster}: a grid has between 1 and {LARGEST_GRID} blocks, in whole clusters"
            )
        from cuda.bindings import driver

        with _lock, _loading_allowed(index):
            self._kernel = _kernel(launch, index)
        self._launch_kernel = driver.cuLaunchKernelEx
        self._launch, self._arguments = launch, arguments
        self._places, self._index = tuple(places), index
        self._idle = [_Buffer(launch, arguments)]

    def run(self, addresses: Sequence[int], stream: int) -> None:
        """Launch on a stream of the device, with these addresses at their places."""
        try:
            buffer = self._idle.pop()
        except IndexError:
            buffer = _Buffer(self._launch, self._arguments)
        words = buffer.words
        for place, address in zip(self._places, addresses, strict=True):
            words[place] = address
        if buffer.stream != stream:
            buffer.config.hStream = buffer.stream = stream
        (status,) = self._launch_kernel(buffer.config, self._kernel, buffer.pointer, 0)
        if status:
            self._again(status, buffer)
        self._idle.append(buffer)

    def _again(self, status: Any, buffer: _Buffer) -> None:
        """A thread that has not called CUDA yet has no context: give it the device's, and try once more."""
        if status.name in ("CUDA_ERROR_INVALID_CONTEXT", "CUDA_ERROR_CONTEXT_IS_DESTROYED"):
            _make_current(self._index)
            (status,) = self._launch_kernel(buffer.config, self._kernel, buffer.pointer, 0)
        if status:
            launch, why = self._launch, _described(status)
            raise RuntimeError(
                f"gspn2: launching {launch.kernel.function} failed: {why} (grid {launch.grid}, block "
                f"{launch.block}, cluster {launch.cluster}, {launch.shared} bytes of shared memory)"
            )


def _kernel(launch: Launch, index: int) -> Any:
    """The kernel, loaded on the device and allowed the shared memory and cluster that the launch asks for."""
    from cuda.bindings import driver

    kernel = launch.kernel
    target = toolchain.target(device(index).capability)
    if (kernel, target) not in _libraries:
        code = toolchain.code(kernel, target)
        library = _checked("cuLibraryLoadData", driver.cuLibraryLoadData(code, [], [], 0, [], [], 0))
        _libraries[kernel, target] = library
    library = _libraries[kernel, target]
    handle = _checked("cuLibraryGetKernel", driver.cuLibraryGetKernel(library, kernel.function.encode()))
    shared, large_cluster = _allowed.get((kernel, target, index), (-1, False))
    attributes = driver.CUfunction_attribute
    ordinal = driver.CUdevice(index)
    if launch.shared > shared:
        attribute = attributes.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        status = driver.cuKernelSetAttribute(attribute, launch.shared, handle, ordinal)
        _checked(f"{launch.shared} bytes of shared memory for {kernel.function}", status)
    if launch.cluster > PORTABLE_CLUSTER and not large_cluster:
        attribute = attributes.CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED
        status = driver.cuKernelSetAttribute(attribute, 1, handle, ordinal)
        _checked(f"clusters of {launch.cluster} blocks for {kernel.function}", status)
    _allowed[kernel, target, index] = (
        max(shared, launch.shared),
        large_cluster or launch.cluster > PORTABLE_CLUSTER,
    )
    # Now, not at the first launch, which may be under capture.
    function = _checked("cuKernelGetFunction", driver.cuKernelGetFunction(handle))
    _checked("cuFuncLoad", driver.cuFuncLoad(function))
    return handle


@contextmanager
def _loading_allowed(index: int) -> Iterator[None]:
    """In the device's context, and also while this or another thread captures a CUDA graph.

    Loading is no part of the graph, but the strict capture modes refuse it, as it may allocate memory.
    """
    from cuda.bindings import driver

    _make_current(index)
    relaxed = driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED
    exchange = driver.cuThreadExchangeStreamCaptureMode
    before = _checked("cuThreadExchangeStreamCaptureMode", exchange(relaxed))
    try:
        yield
    finally:
        _checked("cuThreadExchangeStreamCaptureMode", exchange(before))


def _make_current(index: int) -> None:
    """Give this thread the context that PyTorch uses on the device, if it has none."""
    from cuda.bindings import driver

    context = _checked("cuCtxGetCurrent", driver.cuCtxGetCurrent())
    if not int(context):
        _checked("cuCtxSetCurrent", driver.cuCtxSetCurrent(_primary_context(index)))


@cache
def _primary_context(index: int) -> Any:
    from cuda.bindings import driver

    return _checked("cuDevicePrimaryCtxRetain", driver.cuDevicePrimaryCtxRetain(driver.CUdevice(index)))


def _checked(what: str, result: tuple[Any, ...]) -> Any:
    """The value of a driver call, which returns (status, value ...)."""
    status = result[0]
    if status:
        raise RuntimeError(f"gspn2: {what}: {_described(status)}")
    return result[1] if len(result) > 1 else None


def _described(status: Any) -> str:
    from cuda.bindings import driver

    _, text = driver.cuGetErrorString(status)
    return f"{status.name} ({text.decode()})" if text else status.name
