"""Text to image: a step of SDXL's UNet, and whole pictures, with attention and with GSPN-2."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from typing import Any

import torch

from .case import Absent, Case, Contender, Part, Pass
from .results import Row
from .t2i_image import DIRECT_STEPS, PROGRESSIVE_STEPS, Picture, Setting
from .t2i_sdxl import SDXL, TINY, Shape
from .t2i_step import ATTENTION, CUT, MIXERS, Step, with_layers

STEPS = {512: 8.0, 1024: 10.0, 2048: 10.0, 4096: 12.0}
"""Sides of pictures in pixels, and about the seconds that their steps take to measure."""
FIRST = (1024, 4096)
COMPOSED = 8192
"""From here on a layer of each level stands for all of it: a step with attention takes up to minutes."""
IMAGES = {Setting(1024): 20.0, Setting(2048): 25.0, Setting(4096): 40.0}
WITH_STEP = {8192: 50.0, 16384: 120.0}
"""Pictures that are measured together with their steps, which take long; some evaluations are left out."""
EVERY_STEP = {Setting(8192): 70.0, Setting(16384): 180.0}
"""And progressive pictures of these sizes end to end, with nothing left out."""
SMALL_STEP = 128
SMALL_IMAGE = Setting(256, evaluations=2, from_side=256, steps=8)


def cases(device: torch.device) -> Iterator[Case]:
    """Steps by size, then whole pictures."""
    if device.type == "cpu":
        yield _case(TINY, SMALL_STEP, 3.0, first=True)
        yield _case(TINY, SMALL_IMAGE.side, 10.0, SMALL_IMAGE, extra=True)
        return
    for side, seconds in STEPS.items():
        yield _case(SDXL, side, seconds, first=side in FIRST)
    for setting, seconds in IMAGES.items():
        yield _case(SDXL, setting.side, seconds, setting, steps=(ATTENTION,), extra=True)
    for side, seconds in WITH_STEP.items():
        yield _case(SDXL, side, seconds, Setting(side, evaluations=2), extra=True)
    for setting, seconds in EVERY_STEP.items():
        yield _case(SDXL, setting.side, seconds, setting, steps=(), more=", every step", extra=True)


def _case(
    shape: Shape,
    side: int,
    seconds: float,
    setting: Setting | None = None,
    *,
    steps: Sequence[str] = (ATTENTION, MIXERS, CUT),
    more: str = "",
    first: bool = False,
    extra: bool = False,
) -> Case:
    """A step, a picture, or both.

    Args:
        shape: of the pipeline.
        side: of the picture in pixels.
        seconds: that it takes, about.
        setting: of the picture; None for the step alone.
        steps: contenders whose step is measured.
        more: at the end of the name.
        first, extra: as for `Case`.
    """
    pictures: list[Picture] = []
    composes = side >= COMPOSED or (setting is not None and len(steps) > 1)

    def contenders(device: torch.device) -> list[Contender]:
        step = Step(shape, side, side, device)
        made: dict[str, Callable[[], dict[str, Pass]]] = {
            ATTENTION: lambda: (
                step.layer_passes() if composes else _runnable(step).passes(step.nets.attention)
            ),
            MIXERS: lambda: step.passes(step.nets.mounted, step.check_mixers),
            CUT: lambda: _runnable(step).passes(step.nets.cut),
        }
        found = [Contender(name, _with_diffusers(made[name])) for name in steps]
        if setting is not None:
            pictures.append(Picture(setting, step))
            last = pictures[-1].contender()
            found.append(Contender(last.name, _with_diffusers(last.make)))
        return found

    def derive(rows: list[Row]) -> list[Row]:
        found = with_layers(rows, shape.self_attentions)
        return found + (pictures.pop().derive([*rows, *found]) if pictures else [])

    facts: dict[str, Any] = {"model": shape.name, "pixels": side, "batch": 1}
    if setting is not None:
        facts |= {"direct_steps": DIRECT_STEPS, "progressive_steps": setting.steps, "guidance": True}
    what = "step" if setting is None else "step and image" if len(steps) > 1 else "image"
    rounds = 1 if side >= COMPOSED or setting is not None else 5
    return Case(
        "t2i",
        f"{what}, {side} pixels{more}",
        facts,
        contenders,
        first=first,
        extra=extra,
        rounds=rounds,
        seconds=seconds,
        derive=derive,
    )


def _runnable(step: Step) -> Step:
    """A step that needs no kernels of ours has nothing to do on a device without memory."""
    if step.device.type == "meta":
        raise Absent("nothing to compile")
    return step


def _with_diffusers(make: Callable[[], dict[str, Pass]]) -> Callable[[], dict[str, Pass]]:
    def checked() -> dict[str, Pass]:
        if find_spec("diffusers") is None:
            raise Absent('diffusers is not installed: pip install "gspn2[diffusers]"')
        return make()

    return checked


PART = Part(
    "t2i",
    "Text to image",
    "SDXL's configuration with random weights, in bfloat16 (a tiny model of that shape in float32 on a CPU). "
    "A step is one pass of the UNet at batch 1: with its self-attentions (the faster of the flash and cuDNN "
    "backends), with GSPN-2 mixers of an eighth of the channels in their place, and with nothing in their "
    "place, which no mixer can beat. A picture is made as gspn2 generate makes it, guidance and autoencoder "
    f"included: {DIRECT_STEPS} steps with attention at the full size, or progressively with mixers, "
    f"{PROGRESSIVE_STEPS} steps a stage. Where evaluations were left out and counted with the time of "
    "measured ones, or a step was put together from single layers, the time is marked as composed.",
    cases,
)
