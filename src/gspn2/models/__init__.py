"""Backbones. Importing this package registers them with timm: `timm.create_model("gspn2_tiny")`."""

try:
    import timm  # noqa: F401
except ModuleNotFoundError as error:
    # The name stays that of what is missing: for those who ask, the command among them.
    hint = f'gspn2.models needs {error.name}: pip install "gspn2[models]"'
    raise ModuleNotFoundError(hint, name=error.name) from error

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
