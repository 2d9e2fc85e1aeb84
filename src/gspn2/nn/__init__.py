"""Layers around the operator: the mixer, its token wrapper and the parts of a GSPN-2 block."""

from .layers import FFN, GRN, LPU, DropPath, LayerNorm2d, Pointwise
from .mixer import Mixer, Operands
from .tokens import TokenMixer

__all__ = ["FFN", "GRN", "LPU", "DropPath", "LayerNorm2d", "Mixer", "Operands", "Pointwise", "TokenMixer"]
