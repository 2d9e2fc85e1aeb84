"""Backbones. Importing this package registers them with timm: `timm.create_model("gspn2_tiny")`."""

from .flops import count_macs, count_parameters
from .gspn2 import GSPN2, gspn2_base, gspn2_small, gspn2_tiny, test_gspn2

__all__ = [
    "GSPN2",
    "count_macs",
    "count_parameters",
    "gspn2_base",
    "gspn2_small",
    "gspn2_tiny",
    "test_gspn2",
]
