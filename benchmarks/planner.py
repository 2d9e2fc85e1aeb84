"""What the CUDA backend plans for a call, and how to have it plan with one variant: for measurements only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


class Planner:
    """Stands between the backend and its planner: notes every plan, and forces variants.

    On a device without plans it does nothing.
    """

    def __init__(self, device: torch.device) -> None:
        self._plans: list[tuple[bool, Any]] = []
        self._ready: dict[str | None, dict[Any, Any]] = {}
        self._variant: str | None = None
        self._launch: Any = None
        if device.type != "cuda":
            return
        from gspn2.backends.cuda import launch, plan

        def choose(case: Any) -> Any:
            chosen = plan.choose(case, self._variant)
            self._plans.append((case.backward, chosen))
            return chosen

        self._launch = launch
        launch.choose = choose

    def use(self, variant: str | None) -> None:
        """Plan with this variant only from now on, or freely."""
        self._variant = variant
        if self._launch is not None:
            self._launch._ready = self._ready.setdefault(variant, {})

    def bound(self, variant: str | None, call: Callable[[int], Any]) -> Callable[[int], Any]:
        """The call, always with this variant."""

        def with_variant(i: int) -> Any:
            self.use(variant)
            return call(i)

        return with_variant

    def forget(self) -> None:
        """Plan everything anew, and note it."""
        self._plans.clear()
        if self._launch is not None:
            self._launch._ready.clear()

    def chosen(self) -> dict[str, Any]:
        """The plans since `forget`, by pass."""
        return {
            "backward" if backward else "forward": {
                "variant": plan.variant,
                "launches": [
                    f"{it.kernel.function} {it.grid} x {it.block} threads, {it.shared} bytes"
                    + (f", clusters of {it.cluster}" if it.cluster > 1 else "")
                    + (f", knobs {it.knobs}" if it.knobs else "")
                    for it in plan.launches
                ],
                "scratch_bytes": sum(plan.scratch),
                "reasons": list(plan.reasons),
            }
            for backward, plan in self._plans
        }
