"""Tensors as kernels see them: in memory where a stray access shows."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Mapping

import torch
from torch import Tensor

PAGE = mmap.PAGESIZE
GUARD = 16 * PAGE
# MAP_NORESERVE, which the module of Python 3.11 does not name on Linux.
PRIVATE = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000
READ, WRITE = 1, 2
# Of a range: not written, written, scratch memory (`Range` of device.h).
INPUT, OUTPUT, SCRATCH = 0, 1, 2
# Above this size the bytes of a storage are not told apart one by one.
LARGE = 1 << 26


class _Range(ctypes.Structure):
    """`Range` of device.h."""

    _fields_ = (
        ("first", ctypes.c_uint64),
        ("last", ctypes.c_uint64),
        ("access", ctypes.c_uint64),
        ("written", ctypes.c_uint64),
        ("name", ctypes.c_char * 40),
    )


def _guarded(size: int) -> Tensor:
    """`size` bytes of 0xFF (NaN in every dtype) whose end is as near to forbidden pages as it can be."""
    rounded = -(-size // 128) * 128
    pages = -(-max(rounded, 1) // PAGE) * PAGE
    memory = mmap.mmap(-1, pages + 2 * GUARD, flags=PRIVATE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    libc = ctypes.CDLL(None, use_errno=True)
    for guard in (address, address + GUARD + pages):
        if libc.mprotect(ctypes.c_void_p(guard), GUARD, 0):
            raise OSError(ctypes.get_errno(), "mprotect")
    whole = torch.frombuffer(memory, dtype=torch.uint8, count=pages, offset=GUARD)
    if size <= LARGE:
        whole.fill_(255)
    return whole[pages - rounded :]


class _Storage:
    """The copy of one storage: all tensors that share the storage share the copy."""

    def __init__(self, tensors: dict[str, Tensor], outputs: set[str]) -> None:
        some = next(iter(tensors.values()))
        self.name = ", ".join(tensors)
        self.size = some.untyped_storage().nbytes()
        self.written = bool(outputs & tensors.keys())
        self.guarded = _guarded(self.size)
        self.data = self.guarded[: self.size]
        source = torch.empty(0, dtype=torch.uint8).set_(some.untyped_storage())
        self.access = None
        if self.size <= LARGE:
            self.data.copy_(source)
            self.access = torch.zeros(self.guarded.numel(), dtype=torch.uint8)
            for writes in (False, True):
                for name, tensor in tensors.items():
                    if tensor.numel() and (name in outputs) == writes:
                        self._bytes_of(tensor, self.access).fill_(READ | WRITE if writes else READ)
            self.before = self.guarded.clone()
        else:
            for tensor in tensors.values():
                self.of(tensor).copy_(tensor)

    @staticmethod
    def _bytes_of(tensor: Tensor, data: Tensor) -> Tensor:
        """The bytes of the elements of `tensor` in `data`, a copy of its storage, with an axis more."""
        strides = (*(stride * tensor.itemsize for stride in tensor.stride()), 1)
        return data.as_strided(
            (*tensor.shape, tensor.itemsize), strides, tensor.storage_offset() * tensor.itemsize
        )

    def of(self, tensor: Tensor) -> Tensor:
        """The copy of a tensor of this storage."""
        typed = self.data[: self.size // tensor.itemsize * tensor.itemsize].view(tensor.dtype)
        # as_strided counts from the start of the storage, not of the view.
        offset = typed.storage_offset() + tensor.storage_offset()
        return typed.as_strided(tensor.shape, tensor.stride(), offset)

    def wrongly_written(self) -> str | None:
        if self.access is None:
            return None
        wrong = (self.guarded != self.before) & (self.access & WRITE == 0)
        if not wrong.any():
            return None
        first = int(wrong.nonzero()[0])
        where = "behind the end" if first >= self.size else f"of {self.size}, which is no output's element"
        count = int(wrong.sum())
        return (
            f"{count} stray bytes written to the memory of [{self.name}]; the first is byte {first} {where}"
        )

    def range(self) -> _Range:
        access = 0 if self.access is None else self.access.data_ptr()
        first = self.guarded.data_ptr()
        last = first + self.guarded.numel()
        kind = OUTPUT if self.written else INPUT
        return _Range(first, last, access, kind, self.name.encode()[:39])


class Memory:
    """Copies of tensors with guards, and scratch memory.

    Args:
        tensors: by name.
        outputs: names of those that may be written.
    """

    def __init__(self, tensors: Mapping[str, Tensor], outputs: set[str]) -> None:
        self.originals = dict(tensors)
        self.outputs = outputs
        shared: dict[int, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            shared.setdefault(tensor.untyped_storage().data_ptr(), {})[name] = tensor
        self.tensors: dict[str, Tensor] = {}
        self.storages = []
        for members in shared.values():
            storage = _Storage(members, outputs)
            self.storages.append(storage)
            self.tensors |= {name: storage.of(tensor) for name, tensor in members.items()}
        self._scratch: list[tuple[str, Tensor, Tensor]] = []

    def scratch(self, size: int, name: str) -> int:
        """Address of a buffer of `size` bytes, all 0xFF, readable where written; 0 if there are none."""
        if size == 0:
            return 0
        memory = _guarded(size)
        # Nobody may write what was not asked for, even where pieces lie further apart on a device.
        access = torch.zeros(memory.numel(), dtype=torch.uint8)
        access[:size] = WRITE
        self._scratch.append((name, memory, access))
        return memory.data_ptr()

    def ranges(self) -> ctypes.Array[_Range]:
        """What a kernel may touch, for the runtime."""
        found = [storage.range() for storage in self.storages]
        for name, memory, access in self._scratch:
            first, last = memory.data_ptr(), memory.data_ptr() + memory.numel()
            found.append(_Range(first, last, access.data_ptr(), SCRATCH, name.encode()))
        return (_Range * len(found))(*found)

    def wrongly_written(self) -> str | None:
        """A sentence on the first byte that changed and is no element of an output, or None."""
        return next((text for s in self.storages if (text := s.wrongly_written())), None)

    def copy_back(self) -> None:
        for name in self.outputs & self.tensors.keys():
            if self.originals[name].numel():
                self.originals[name].copy_(self.tensors[name])


def sparse(tensor: Tensor, stride: int) -> Tensor:
    """A copy of a contiguous tensor whose first axis steps by `stride` elements; no memory lies between."""
    strides = (stride, *tensor.contiguous().stride()[1:])
    length = (tensor.shape[0] - 1) * stride + tensor[0].numel()
    memory = mmap.mmap(-1, length * tensor.itemsize, flags=PRIVATE)
    return torch.frombuffer(memory, dtype=tensor.dtype).as_strided(tensor.shape, strides).copy_(tensor)
