"""GSPN-2: linear-cost 2D propagation for vision.

`propagate` and `line_scan` are the operator; `gspn2.nn` has the layers, `gspn2.models` the backbones
(importing it registers them with timm).
"""

from .functional import line_scan, propagate

__version__ = "0.1.0"

__all__ = ["__version__", "line_scan", "propagate"]
