"""Peak memory of a model, found before anything is loaded: the model runs on tensors without data.

On the device "meta" every operator makes its outputs with their sizes, and nothing else. Counting those that
are alive gives the peak of exactly the code that will run, at any size and in any dtype, without a formula
for each architecture.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary


class PeakMemory(TorchDispatchMode):
    """Counts the bytes of tensors made within the context and still alive; `peak` is the most at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = self.live = 0
        self._known = WeakIdKeyDictionary()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        for leaf in tree_leaves((args, kwargs)):
            # What was there before the context is not ours to count, however often it is viewed.
            if isinstance(leaf, Tensor):
                self._known.setdefault(leaf.untyped_storage(), True)
        output = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(output):
            if isinstance(leaf, Tensor):
                self._count(leaf.untyped_storage())
        return output

    def _count(self, storage: torch.UntypedStorage) -> None:
        if storage in self._known:
            return
        self._known[storage] = True
        size = storage.nbytes()
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._free, size)

    def _free(self, size: int) -> None:
        self.live -= size


class _FusedAttention(TorchFunctionMode):
    """Attention as the fused kernels run it, which never hold the matrix of weights."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is F.scaled_dot_product_attention:
            named = dict(zip(("query", "key", "value"), args, strict=False)) | (kwargs or {})
            query, value = named["query"], named["value"]
            return query.new_empty(*query.shape[:-1], value.shape[-1])
        return func(*args, **(kwargs or {}))


def peak_of(job: Callable[[], Any]) -> int:
    """Bytes of the tensors that a job on "meta" makes, at its worst moment."""
    with torch.no_grad(), _FusedAttention(), PeakMemory() as memory:
        job()
    return memory.peak


def bytes_of(module: nn.Module | None) -> int:
    """Bytes of a module's weights and buffers."""
    if module is None:
        return 0
    return sum(t.numel() * t.element_size() for t in [*module.parameters(), *module.buffers()])


def available(device: torch.device) -> int:
    """Bytes that are free on a device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo") as file:
            fields = dict(line.split(":", 1) for line in file)
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):
        # Elsewhere nothing tells; the operating system will.
        return 1 << 62
