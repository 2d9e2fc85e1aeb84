"""Whole pictures: a direct pass with attention, and progressive ones as `gspn2 generate` makes them.

The direct pass is its steps times a measured one, and decoding. The other is run; where every evaluation of
the UNet would take too long some are left out of the run, and counted with the measured time of those in it.
What was put together is marked as composed.
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
from .t2i_sdxl import SCHEDULER, dtype_on, embeddings
from .t2i_step import ATTENTION, GRAPH, STEP, Step, composed, measured_peak

if TYPE_CHECKING:
    from ..integrations.diffusers.generate import Job
    from ..integrations.diffusers.stages import Stage

IMAGE, SHORTENED = "image", "image, shortened"
DIRECT, PROGRESSIVE = "attention, direct", "GSPN-2, progressive"
DIRECT_STEPS, PROGRESSIVE_STEPS, GUIDANCE = 50, 30, 5.0
"""The baseline's steps are those of the papers, ours the default of `gspn2 generate`."""
PROMPT = "a lighthouse at dusk"


@dataclass(frozen=True)
class Setting:
    """How a picture is measured.

    Args:
        side: pixels.
        evaluations: steps that are run of each progressive stage from `from_side` on; None for all.
        from_side: see there.
        steps: of the scheduler in each progressive stage.
    """

    side: int
    evaluations: int | None = None
    from_side: int = 4096
    steps: int = PROGRESSIVE_STEPS


class Picture:
    """What a picture takes, beside the passes of its step.

    Args:
        setting: what is left out.
        step: the UNet, with and without mixers.
    """

    def __init__(self, setting: Setting, step: Step) -> None:
        self.setting, self.step = setting, step
        self.run: Run | None = None

    def contender(self) -> Contender:
        """The progressive passes."""
        return Contender(PROGRESSIVE, self._passes)

    def _passes(self) -> dict[str, Pass]:
        self.run = Run(self.setting, self.step)
        return self.run.passes()

    def derive(self, rows: Sequence[Row]) -> list[Row]:
        """Whole pictures, as far as they are composed."""
        if self.run is None or not any(it["name"] == PROGRESSIVE and "ms" in it for it in rows):
            return []
        found = []
        steps = [it["ms"] for it in rows if it["name"] == ATTENTION and it.get("pass") in (STEP, GRAPH)]
        if steps:
            # As a CUDA graph where that is faster: ours are, too. Both end alike.
            step = min(steps)
            count, decode = 2 * DIRECT_STEPS, 1e3 * self.run.decoding
            told = f"{count} x {step / 1e3:.3f} s a step, {decode / 1e3:.2f} s to decode and write"
            found.append(composed(DIRECT, IMAGE, count * step + decode, told, images=1))
        return [*found, *self.run.derive(rows)]


class Run:
    """Progressive passes with mixers.

    Args:
        setting: what is left out.
        step: the UNet.
    """

    def __init__(self, setting: Setting, step: Step) -> None:
        self.step = step
        self._folder = tempfile.TemporaryDirectory(prefix="gspn2-bench-")
        self.folder = Path(self._folder.name)
        step.shape.write(self.folder)
        self.whole = self._job(setting.steps)
        self.job = self._shortened(setting)
        self.seconds: dict[int, list[float]] = {}
        """When the steps of each stage of the last run were done."""
        self.decoding = 0.0
        """Seconds after the last step."""

    def _job(self, steps: int) -> Job:
        from ..integrations.diffusers.generate import Job

        return Job(
            pipeline=self.folder,
            height=self.step.height,
            width=self.step.width,
            mixers="untrained",
            steps=steps,
            guidance=GUIDANCE,
            device=str(self.step.device),
            dtype=str(dtype_on(self.step.device)).removeprefix("torch."),
        )

    def _shortened(self, setting: Setting) -> Job:
        if setting.evaluations is None:
            return self.whole
        short = (setting.evaluations + 0.5) / self.whole.steps
        stages = self.whole.stages()[1:]
        strengths = (it.strength if it.height < setting.from_side else short for it in stages)
        return replace(self.whole, strengths=tuple(strengths))

    def passes(self) -> dict[str, Pass]:
        """The run, checked after it: it is too long to be made twice."""
        from ..integrations.diffusers.generate import Generator, plan
        from ..integrations.diffusers.untrained import make_pipeline, make_vae

        step = self.step
        if step.device.type == "meta":
            return self._without_memory()
        # `gspn2 generate` changes the layout of its weights, which the steps beside it must not notice.
        unet = step.nets.with_mixers(shared=False)
        vae = make_vae(step.shape.vae, step.device, dtype_on(step.device))
        pipe = make_pipeline(unet, vae, SCHEDULER)
        planned = plan(self.whole)
        facts: dict[str, Any] = {"images": 1, "planned_bytes": planned.peak}
        own = sum(it.nbytes for module in (unet, vae) for it in module.parameters())

        def make(job: Job) -> None:
            generator = Generator(job, planned, self._note, pipe)
            generator.take({PROMPT: embeddings(unet)})
            out = self.folder / "picture.tif"
            with step.chosen():
                generator.run(PROMPT, out, keep=True)
            self.decoding = time.perf_counter() - max(self.seconds[len(job.stages()) - 1])
            self._check(job, out)

        def call(_: int) -> None:
            self.seconds.clear()
            _, measured = measured_peak(lambda: make(self.job), own, step.device)
            facts.update(measured)

        def small() -> dict[str, float]:
            # Kernels are loaded and the way through all parts is tried before anything long begins.
            errors = step.check_mixers()
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
                step.runner(self.step.nets.with_mixers())()

        return {IMAGE: Pass(Work(call), dict, 0, 0)}

    def _note(self, what: str, done: int, total: int) -> None:
        if what.startswith("stage") and what.endswith(")"):
            if self.step.device.type == "cuda":
                torch.cuda.synchronize()
            index = int(what.split()[1].split("/")[0]) - 1
            self.seconds.setdefault(index, []).append(time.perf_counter())

    def _check(self, job: Job, out: Path) -> None:
        from safetensors.torch import load_file

        from ..integrations.diffusers.output import stages_folder

        stages = stages_folder(out)
        for index in range(len(job.stages())):
            if not load_file(stages / f"stage{index}.safetensors")["latents"].isfinite().all():
                raise Wrong(f"the latents of stage {index + 1} are not finite")
        if out.stat().st_size < 1000:
            raise Wrong("the picture is empty")
        out.unlink()

    def derive(self, rows: Sequence[Row]) -> list[Row]:
        """The whole picture, where some evaluations were left out."""
        run = next((it for it in rows if (it["name"], it.get("pass")) == (PROGRESSIVE, SHORTENED)), None)
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
        return [composed(PROGRESSIVE, IMAGE, ms, " + ".join(told), **facts)]

    def _evaluation(self, index: int) -> float:
        """Seconds of a step with guidance in a stage: mean of all after the first, which may begin late."""
        done = self.seconds[index]
        return (done[-1] - done[0]) / (len(done) - 1)


def _size(stage: Stage) -> str:
    return f"{stage.height} x {stage.width}"
