"""Whole pictures, as `gspn2 generate` makes them: a direct pass with attention, progressive ones with mixers.

Where every evaluation of the UNet would take too long some are left out of the run, and counted with the
measured time of those in it; such a time is marked as composed.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .case import Contender, Pass
from .check import Wrong
from .measure import Work
from .results import Row
from .t2i_sdxl import SCHEDULER, embeddings, latents, make_vae
from .t2i_step import ATTENTION, CUT, Step, composed, measured_peak, with_layers

if TYPE_CHECKING:
    from ..integrations.diffusers.generate import Job
    from ..integrations.diffusers.stages import Stage

IMAGE, SHORTENED, DECODE = "image", "image, shortened", "decode"
DIRECT, PROGRESSIVE = "attention, direct", "GSPN-2, progressive"
DIRECT_STEPS, PROGRESSIVE_STEPS, GUIDANCE = 50, 30, 5.0
"""The baseline's steps are those of the papers, ours the default of `gspn2 generate`."""
PROMPT = "a lighthouse at dusk"


@dataclass(frozen=True)
class Setting:
    """How a picture is measured.

    Args:
        side: pixels.
        direct_evaluations: steps of the direct pass that are run; None for all, 0 to compose them from
            single layers.
        evaluations: steps that are run of each progressive stage from `from_side` on; None for all.
        from_side: see there.
    """

    side: int
    direct_evaluations: int | None = None
    evaluations: int | None = None
    from_side: int = 4096


class Picture:
    """The runs of a case: direct and progressive.

    Args:
        setting: what is left out.
        step: the UNet, with and without mixers.
    """

    def __init__(self, setting: Setting, step: Step) -> None:
        self.setting, self.step = setting, step
        self.runs: dict[str, Run] = {}

    def contenders(self) -> list[Contender]:
        """The direct pass, or what it is composed of, and the progressive ones."""
        found = [Contender(PROGRESSIVE, lambda: self._run(PROGRESSIVE))]
        if self.setting.direct_evaluations == 0:
            cut = Contender(CUT, lambda: self.step.passes(self.step.cut))
            parts = [Contender(ATTENTION, self.step.layer_passes), cut, Contender("VAE", self._decode)]
            return parts + found
        return [Contender(DIRECT, lambda: self._run(DIRECT)), *found]

    def _run(self, name: str) -> dict[str, Pass]:
        run = self.runs[name] = Run(self.setting, self.step, name == PROGRESSIVE)
        return run.passes()

    def _decode(self) -> dict[str, Pass]:
        from ..integrations.diffusers.vae import TiledVae

        step = self.step
        tiled = TiledVae(make_vae(step.shape, step.device))
        noise = latents(step.weights, step.height, step.width)

        def call(_: int) -> None:
            for strip in tiled.decode(noise):
                if not strip.isfinite().all():
                    raise Wrong("the picture is not finite")

        call(0)
        return {DECODE: Pass(Work(call, graph=False, warm=False), dict, 0, 0)}

    def derive(self, rows: Sequence[Row]) -> list[Row]:
        """Whole pictures, composed where evaluations were left out."""
        found = [row for run in self.runs.values() for row in run.derive(rows)]
        self.runs.clear()
        steps = with_layers(rows, self.step.shape.self_attentions)
        decode = next((it["ms"] for it in rows if it.get("pass") == DECODE and "ms" in it), None)
        if steps and decode is not None:
            ms = 2 * DIRECT_STEPS * steps[0]["ms"] + decode
            told = f"{2 * DIRECT_STEPS} x {steps[0]['ms'] / 1e3:.2f} s a step, {decode / 1e3:.1f} s to decode"
            found.append(composed(DIRECT, IMAGE, ms, told, images=1))
        return steps + found


class Run:
    """One way to a picture.

    Args:
        setting: what is left out.
        step: the UNet.
        progressive: with mixers from the base size on; otherwise with attention at the full size.
    """

    def __init__(self, setting: Setting, step: Step, progressive: bool) -> None:
        self.step, self.name = step, PROGRESSIVE if progressive else DIRECT
        self._folder = tempfile.TemporaryDirectory(prefix="gspn2-bench-")
        self.folder = Path(self._folder.name)
        step.shape.write(self.folder)
        self.whole = self._job(setting, progressive)
        self.job = self._shortened(setting, progressive)
        self.seconds: dict[int, list[float]] = {}
        """When the steps of each stage of the last run were done."""

    def _job(self, setting: Setting, progressive: bool) -> Job:
        from ..integrations.diffusers.generate import Job

        return Job(
            pipeline=self.folder,
            height=self.step.height,
            width=self.step.width,
            mixers="untrained" if progressive else None,
            steps=PROGRESSIVE_STEPS if progressive else DIRECT_STEPS,
            guidance=GUIDANCE,
            single=not progressive,
            device=str(self.step.device),
            dtype=str(self.step.weights.dtype).removeprefix("torch."),
        )

    def _shortened(self, setting: Setting, progressive: bool) -> Job:
        if not progressive:
            count = setting.direct_evaluations
            return self.whole if count is None else replace(self.whole, steps=count)
        if setting.evaluations is None:
            return self.whole
        short = (setting.evaluations + 0.5) / self.whole.steps
        stages = self.whole.stages()[1:]
        strengths = (it.strength if it.height < setting.from_side else short for it in stages)
        return replace(self.whole, strengths=tuple(strengths))

    def passes(self) -> dict[str, Pass]:
        """The run, checked after it: it is too long to be made twice."""
        from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline

        from ..integrations.diffusers.generate import Generator, plan

        step = self.step
        if step.device.type == "meta":
            return self._without_memory()
        unet = step.with_mixers() if self.whole.mixers else step.twin()
        vae = make_vae(step.shape, step.device)
        parts = dict.fromkeys(("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"))
        scheduler = EulerDiscreteScheduler(**SCHEDULER)
        pipe = StableDiffusionXLPipeline(vae=vae, unet=unet, scheduler=scheduler, **parts)
        planned = plan(self.whole)
        facts: dict[str, Any] = {"images": 1, "planned_bytes": planned.peak}
        own = sum(it.nbytes for module in (unet, vae) for it in module.parameters())

        def make(job: Job) -> None:
            generator = Generator(job, planned, self._note, pipe)
            generator.take({PROMPT: embeddings(unet)})
            out = self.folder / "picture.tif"
            with step.chosen():
                generator.run(PROMPT, out, keep=True)
            self._check(job, out)

        def call(_: int) -> None:
            self.seconds.clear()
            _, measured = measured_peak(lambda: make(self.job), own, step.device)
            facts.update(measured)

        def small() -> dict[str, float]:
            # Kernels are loaded and the way through all parts is tried before anything long begins.
            errors = step.check_mixers() if self.whole.mixers else {}
            height, width = (min(size, 2 * step.shape.base) for size in (self.job.height, self.job.width))
            make(replace(self.job, height=height, width=width, steps=4, strengths=None))
            return errors

        which = IMAGE if self.job is self.whole else SHORTENED
        return {which: Pass(Work(call, graph=False, warm=False), small, 0, 0, facts)}

    def _without_memory(self) -> dict[str, Pass]:
        """A step of each stage, for the kernels that it needs."""

        def call(_: int) -> None:
            for stage in self.whole.stages():
                step = Step(self.step.shape, stage.height, stage.width, self.step.device)
                step.runner(self.step.with_mixers())()

        return {IMAGE: Pass(Work(call), dict, 0, 0)} if self.whole.mixers else {}

    def _note(self, what: str, done: int, total: int) -> None:
        if what.startswith("stage") and what.endswith(")"):
            if self.step.device.type == "cuda":
                torch.cuda.synchronize()
            index = int(what.split()[1].split("/")[0]) - 1
            self.seconds.setdefault(index, []).append(time.perf_counter())

    def _check(self, job: Job, out: Path) -> None:
        from safetensors.torch import load_file

        from ..integrations.diffusers.generate import stages_folder

        stages = stages_folder(out)
        for index in range(len(job.stages())):
            if not load_file(stages / f"stage{index}.safetensors")["latents"].isfinite().all():
                raise Wrong(f"the latents of stage {index + 1} are not finite")
        if out.stat().st_size < 1000:
            raise Wrong("the picture is empty")
        out.unlink()

    def derive(self, rows: Sequence[Row]) -> list[Row]:
        """The whole picture, where some evaluations were left out."""
        run = next((it for it in rows if (it["name"], it.get("pass")) == (self.name, SHORTENED)), None)
        if run is None or "ms" not in run:
            return []
        ms, told = run["ms"], [f"{run['ms'] / 1e3:.1f} s"]
        pairs = zip(self.whole.stages(), self.job.stages(), strict=True)
        for index, (stage, shortened) in enumerate(pairs):
            missing = stage.evaluations - shortened.evaluations
            if missing:
                seconds = self._evaluation(index)
                ms += 1e3 * missing * seconds
                told.append(f"{missing} x {seconds:.2f} s at {_size(stage)}")
        facts = {key: run[key] for key in ("images", "planned_bytes", "peak_bytes") if key in run}
        return [composed(self.name, IMAGE, ms, " + ".join(told), **facts)]

    def _evaluation(self, index: int) -> float:
        """Seconds of a step with guidance in a stage: mean of all after the first, which may begin late."""
        done = self.seconds[index]
        return (done[-1] - done[0]) / (len(done) - 1)


def _size(stage: Stage) -> str:
    return f"{stage.height} x {stage.width}"
