"""The operator as PyTorch sees it: `torch.ops.gspn2.propagate` and its backward."""

from .propagate import propagate

__all__ = ["propagate"]
