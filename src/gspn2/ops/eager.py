"""Is there anything at work that has to see an operator, besides its own arithmetic?

PyTorch's dispatcher takes some 8 us of a call from Python, and 30 where there are gradients: more than a
small problem takes on a GPU. Where nothing would look at the call on its way, it need not go there.
"""

from __future__ import annotations

import torch
from torch import _C, Tensor
from torch._C import _functorch
from torch.autograd import forward_ad
from torch.nn import Parameter

_PLAIN = (Tensor, Parameter)


def forward_mode() -> bool:
    """May tensors carry tangents?"""
    return forward_ad._current_level >= 0


def refuse_forward_mode(*tensors: Tensor | None) -> None:
    """Raise where forward-mode differentiation would take the operator's derivative for zero.

    Without a formula for tangents, the dispatcher hands on the values and drops the tangents without a word.
    """
    if not forward_mode():
        return
    # A compiler's tensors do not show their tangents.
    if torch.compiler.is_compiling() or any(
        tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors
    ):
        raise NotImplementedError(
            "gspn2: its operators have no forward-mode derivative (jvp, jacfwd, linearize, hessian); "
            "use reverse mode (vjp, jacrev)"
        )


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
        or forward_mode()
        or torch.autograd._profiler_enabled()
    ):
        return False
    return (x.is_cuda or x.is_cpu) and all(
        tensor is None or (type(tensor) in _PLAIN and not tensor.is_neg() and not tensor._is_zerotensor())
        for tensor in (x, *others)
    )


def plain_gradient(dy: Tensor, *others: Tensor | None) -> bool:
    """The same where a derivative is asked for, given the gradient of the output and what was saved.

    No if the derivative is to be differentiated again, or if dy is batched by `is_grads_batched`, which is
    older than torch.func and no transform of it.
    """
    return not torch.is_grad_enabled() and not _functorch.is_legacy_batchedtensor(dy) and plain(dy, *others)


def needs_gradient(*tensors: Tensor | None) -> bool:
    """Is what is made of these tensors going to be differentiated, as far as autograd alone can tell?"""
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)
