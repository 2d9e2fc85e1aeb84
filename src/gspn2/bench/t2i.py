"""Text to image: a step of SDXL's UNet, and whole pictures, with attention and with GSPN-2."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any

import torch

from .case import Absent, Case, Contender, Part, Pass
from .results import Row
from .t2i_image import DIRECT_STEPS, PROGRESSIVE_STEPS, Picture, Setting
from .t2i_sdxl import SDXL, TINY, Shape
from .t2i_step import ATTENTION, CUT, MIXERS, Step, with_layers

STEPS = {512: 10.0, 1024: 10.0, 2048: 10.0, 4096: 15.0, 8192: 50.0, 16384: 60.0}
"""Sides of pictures in pixels, and about the seconds that their steps take to measure."""
COMPOSED = 16384
"""From here on the step with attention takes minutes: a layer of each level stands for all of that level."""
EXTRA = 8192
IMAGES = {
    Setting(1024): 20.0,
    Setting(2048): 40.0,
    Setting(4096): 40.0,
    Setting(8192, layers=True, evaluations=2): 50.0,
    Setting(16384, layers=True, evaluations=2): 120.0,
}
"""And about the seconds that they take."""
EVERY_STEP = {Setting(8192, layers=True): 70.0, Setting(16384, layers=True): 200.0}
"""The progressive picture at a large size end to end, with nothing left out."""
SMALL_STEPS = (128,)
SMALL_IMAGES = (Setting(256, layers=True, evaluations=2, from_side=256, steps=8),)


def cases(device: torch.device) -> Iterator[Case]:
    """Steps by size, then whole pictures."""
    if device.type == "cpu":
        for side in SMALL_STEPS:
            yield _step_case(TINY, side, 3.0, extra=False)
        for setting in SMALL_IMAGES:
            yield _image_case(TINY, setting, 5.0)
        return
    for side, seconds in STEPS.items():
        yield _step_case(SDXL, side, seconds, extra=side >= EXTRA)
    for setting, seconds in IMAGES.items():
        yield _image_case(SDXL, setting, seconds)
    for setting, seconds in EVERY_STEP.items():
        yield _image_case(SDXL, setting, seconds, ", every step")


def _step_case(shape: Shape, side: int, seconds: float, extra: bool) -> Case:
    def contenders(device: torch.device) -> list[Contender]:
        step = Step(shape, side, side, device)

        def attention() -> dict[str, Pass]:
            if device.type == "meta":
                raise Absent("nothing to compile")
            return step.layer_passes() if side >= COMPOSED else step.passes(step.attention)

        def cut() -> dict[str, Pass]:
            if device.type == "meta":
                raise Absent("nothing to compile")
            return step.passes(step.cut)

        made: dict[str, Callable[[], dict[str, Pass]]] = {
            ATTENTION: attention,
            MIXERS: lambda: step.passes(step.mounted, step.check_mixers),
            CUT: cut,
        }
        return [Contender(name, _with_diffusers(make)) for name, make in made.items()]

    def derive(rows: list[Row]) -> list[Row]:
        return with_layers(rows, shape.self_attentions)

    rounds = 1 if side >= EXTRA else 5
    return Case(
        "t2i",
        f"step, {side} pixels",
        _facts(shape, side),
        contenders,
        extra=extra,
        rounds=rounds,
        seconds=seconds,
        derive=derive,
    )


def _image_case(shape: Shape, setting: Setting, seconds: float, more: str = "") -> Case:
    made: list[Picture] = []

    def contenders(device: torch.device) -> list[Contender]:
        made.append(Picture(setting, Step(shape, setting.side, setting.side, device)))
        return [Contender(it.name, _with_diffusers(it.make)) for it in made[-1].contenders()]

    def derive(rows: list[Row]) -> list[Row]:
        return made.pop().derive(rows)

    facts = _facts(shape, setting.side)
    facts |= {"direct_steps": DIRECT_STEPS, "progressive_steps": setting.steps, "guidance": True}
    name = f"image, {setting.side} pixels{more}"
    return Case("t2i", name, facts, contenders, extra=True, rounds=1, seconds=seconds, derive=derive)


def _facts(shape: Shape, side: int) -> dict[str, Any]:
    return {"model": shape.name, "pixels": side, "batch": 1}


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
