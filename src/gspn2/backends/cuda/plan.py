"""The planner: the variants in order of preference, and the choice between them.

A variant is a module of `variants` with

- `why_not(case) -> str | None`: a sentence for people saying why it declines the case (it cannot run it, or
  another variant is faster), or None;
- `plan(case) -> Plan`: its kernels, launches, scratch and the reasons for these numbers, for a case it takes;
- `representative_kernels() -> list[tuple[Kernel, bool]]`: the kernels that its plans are made of, with the
  sets of macros that matter (a few for each source, not every combination). True marks a kernel whose speed
  is the point of the variant: the test suite compiles all of them for the supported architectures and lets no
  hot one spill registers. A variant that needs a newer device than `OLDEST` names the oldest capability its
  kernels compile for as `CAPABILITY = (9, 0)`.

Planning looks at sizes, strides, alignment and the device only; it needs no GPU.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from types import ModuleType

from .geometry import Case, Plan

VARIANTS = (
    "strips_vertical",
    "strips_column",
    "resident",
    "strips",
    "planes_tiles",
    "lines",
    "planes",
    "tiles",
    "pixels",
    "generic",
)
"""By preference. `generic` takes every case."""

OLDEST = (8, 0)
"""The oldest compute capability that the kernels are made for."""


def too_old(capability: tuple[int, int]) -> str:
    """Why a device of this capability is not used."""
    return "it needs compute capability {}.{} or newer, and the device has {}.{}".format(*OLDEST, *capability)


@cache
def variants() -> dict[str, ModuleType]:
    """The modules of the table, by name, in order."""
    return {name: import_module(f"{__package__}.variants.{name}") for name in VARIANTS}


def choose(case: Case, variant: str | None = None) -> Plan:
    """The plan of the first variant that takes the case, or of the one called `variant`.

    Raises:
        ValueError: no variant has that name.
        RuntimeError: the variant asked for declines the case; the message is its reason.
    """
    table = variants()
    if variant is not None:
        if variant not in table:
            raise ValueError(f"variant: expected one of {', '.join(table)}, got {variant!r}")
        reason = table[variant].why_not(case)
        if reason is not None:
            raise RuntimeError(f"variant {variant!r} cannot run this case: {reason}")
        return table[variant].plan(case)
    return next(module.plan(case) for module in table.values() if module.why_not(case) is None)


def why_not(case: Case) -> dict[str, str | None]:
    """For each variant the reason it declines the case, or None."""
    return {name: module.why_not(case) for name, module in variants().items()}
