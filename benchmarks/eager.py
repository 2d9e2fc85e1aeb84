"""The operator in plain PyTorch, the yardstick of the CPU benchmark: `gspn2.bench.eager`."""

from gspn2.bench.eager import propagate, scan

__all__ = ["propagate", "scan"]
