"""Is there anything at work that has to see an operator, besides its own arithmetic?

PyTorch's dispatcher takes some 8 us of a call from Python, and 30 where there are gradients: more than a
small problem takes on a GPU. Where nothing would look at the call on its way, it need not go there.
"""

from __future__ import annotations

import torch
from torch import _C, Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

_PLAIN = (Tensor, Parameter)


def under_transforms() -> bool:
    """Is a torch.func transform at work? None sees the formulas registered for an operator."""
    return not torch.compiler.is_compiling() and _C._are_functorch_transforms_active()


def plain(x: Tensor, *others: Tensor | None) -> bool:
    """Would the dispatcher hand these tensors straight to the kernel, apart from autograd?

    No if a compiler, a tracer, a torch.func transform, forward-mode differentiation, a mode or a profiler is
    at work, and for tensors that stand for others: subclasses, lazily negated ones, zeros without memory.
    """
    if (
        torch.compiler.is_compiling()
        or _C._are_functorch_transforms_active()
        or _C._len_torch_dispatch_stack()
        or _C._is_torch_function_mode_enabled()
        or _C._get_tracing_state() is not None
        or forward_ad._current_level >= 0
        or torch.autograd._profiler_enabled()
    ):
        return False
    return (x.is_cuda or x.is_cpu) and all(
        tensor is None or (type(tensor) in _PLAIN and not tensor.is_neg() and not tensor._is_zerotensor())
        for tensor in (x, *others)
    )
