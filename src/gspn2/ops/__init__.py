"""The operators as PyTorch sees them: `torch.ops.gspn2.propagate`, `propagate_keeping`, their backward."""

from .keeping import propagate_keeping
from .propagate import propagate

__all__ = ["propagate", "propagate_keeping"]
