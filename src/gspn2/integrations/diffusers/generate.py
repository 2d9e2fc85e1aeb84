"""Pictures of any size from a text-to-image pipeline: stages, memory, files to go on from.

Everything that can be wrong is looked for before weights are loaded (`Job`); then the stages run one after
the other (`run`), each from the finished latents of the one before, which are kept in a file until the
picture is written.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from gspn2.training.checkpoint import write_safetensors
from gspn2.training.errors import UserError

from ..images import LARGEST_SIDE, ImageFile
from .execution import frugal, fused, graphed
from .folder import TEXT, PipelineFolder, check_seed, check_steps, check_weights
from .memory import available, bytes_of, peak_of
from .mixers import UNetMixers
from .mounting import mount
from .output import stages_folder
from .stages import Stage, direct, progressive
from .vae import TiledVae

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# What counting tensors does not see: work space of convolutions, fragmentation, and the CUDA context.
_ALLOWANCE, _CONTEXT = 1.15, 1 << 30
# In float32: what schedulers and guidance keep of the latents beside the networks.
_COPIES = 16
_FILES = ("*.safetensors", "*.bin", "*.json")
"""Of a pipeline or of mixers: what a picture depends on."""

GRAPHED_AREA = 2048 * 2048
"""Pixels up to which a UNet waits for its launches, so that it is run as a CUDA graph."""

Progress = Callable[[str, int, int], None]
"""Called with the name of what is being done, how much of it is done, and how much there is."""


@dataclass(frozen=True)
class Job:
    """What to generate, and how.

    Args:
        pipeline: folder of a Stable Diffusion or SDXL pipeline.
        height, width: in pixels, multiples of the VAE's factor (8).
        mixers: folder of trained mixers; None leaves self-attention in place; "untrained" for mixers as they
            start, which is of use for measuring only.
        steps: of the scheduler in each stage.
        guidance: scale of classifier-free guidance; 1 for none.
        negative: what the picture should not show.
        seed: of all noise.
        scheduler: name of a scheduler class of diffusers; None for the pipeline's.
        single: generate at the full size at once instead of progressively.
        strengths: of the progressive passes after the first.
        device, dtype: to run on and in.
        memory: bytes that may be used; None for what is free.

    Raises:
        UserError: something cannot be; nothing has been loaded yet.
    """

    pipeline: Path
    height: int
    width: int
    mixers: str | None = None
    steps: int = 30
    guidance: float = 5.0
    negative: str = ""
    seed: int = 0
    scheduler: str | None = None
    single: bool = False
    strengths: tuple[float, ...] | None = None
    device: str = "cpu"
    dtype: str = "float32"
    memory: int | None = None

    def __post_init__(self) -> None:
        self.kind()
        if self.steps < 1:
            raise UserError(f"steps: expected at least 1, got {self.steps}")
        if self.dtype not in DTYPES:
            raise UserError(f"dtype: expected one of {', '.join(DTYPES)}, got {self.dtype!r}")
        if not 1 <= self.guidance < math.inf:  # NaN, too
            raise UserError(f"guidance: expected a number of at least 1, got {self.guidance}")
        if self.memory is not None and self.memory < 1:
            raise UserError(f"memory: expected more than 0, got {self.memory / 1e9:g} GB")
        check_seed(self.seed)
        check_steps("steps", self.folder.scheduler(self.scheduler), self.steps)
        if self.mixers not in (None, "untrained") and not Path(self.mixers, "config.json").is_file():
            raise UserError(f"mixers: no config.json in {self.mixers}")
        self.stages()

    @property
    def folder(self) -> PipelineFolder:
        """Where the pipeline is."""
        return PipelineFolder(self.pipeline)

    def kind(self) -> tuple[Any, Any]:
        """The pipeline's class, and that of its image-to-image passes."""
        return self.folder.kind()

    def check_files(self) -> None:
        """Is everything there that will be loaded?

        Raises:
            UserError: no.
        """
        self.folder.check()
        self.folder.variant()
        if self.mixers not in (None, "untrained"):
            check_weights("mixers", Path(str(self.mixers)))

    def stages(self) -> list[Stage]:
        """The passes."""
        factor = self.folder.factor()
        for name, side in (("height", self.height), ("width", self.width)):
            if side < factor or side % factor:
                raise UserError(f"{name}: expected a multiple of {factor}, got {side}")
            if side > LARGEST_SIDE:
                raise UserError(f"{name}: expected at most {LARGEST_SIDE}, got {side}")
        if self.single:
            if self.strengths:
                raise UserError("strengths: a single pass takes none")
            return direct(self.height, self.width, self.steps)
        base = factor * int(self.folder.read("unet/config.json").get("sample_size") or 128)
        try:
            return progressive(
                self.height, self.width, self.steps, base=base, strengths=self.strengths, multiple=factor
            )
        except ValueError as error:
            raise UserError(str(error)) from None

    def fingerprint(self, prompt: str, stage: int) -> str:
        """What the latents of a stage depend on, as a digest."""
        files = []
        folders = [self.pipeline]
        mixers = self.mixers
        if mixers not in (None, "untrained"):
            folders.append(Path(str(mixers)).resolve())
            mixers = str(folders[-1])
        for folder in folders:
            for file in sorted(it for kind in _FILES for it in folder.rglob(kind)):
                about = file.stat()
                files.append((str(file.resolve()), about.st_size, about.st_mtime_ns))
        places = {"pipeline": str(self.pipeline.resolve()), "mixers": mixers}
        fields = asdict(self) | places | {"memory": None, "device": None}
        # A picture of another size may begin with the same stages.
        for name in ("height", "width", "strengths", "single"):
            del fields[name]
        passes = [asdict(each) for each in self.stages()[: stage + 1]]
        return hashlib.sha256(json.dumps([prompt, fields, passes, files]).encode()).hexdigest()


@dataclass(frozen=True)
class Plan:
    """How a job fits into memory: bytes at the worst moment, and the sizes of the parts that do it."""

    peak: int
    tile: int
    tokens: int


def plan(job: Job) -> Plan:
    """Find the peak memory of a job from its configuration alone, and parts small enough for the device.

    Raises:
        UserError: it does not fit with the smallest parts.
    """
    limit = job.memory or available(torch.device(job.device))
    size, there = f"{job.height} x {job.width}", f"there are {limit / 1e9:.1f} GB"
    least = _latent_bytes(job) + _CONTEXT
    if least > limit:
        # Far beyond what fits, walking through the networks takes longer than one would wait.
        raise UserError(f"memory: {size} needs more than {least / 1e9:.1f} GB, {there}; take a smaller size")
    found = None
    for tile, tokens in ((256, 65536), (128, 65536), (64, 16384), (32, 4096)):
        found = Plan(_foresee(job, tile, tokens), tile, tokens)
        if found.peak <= limit:
            return found
    assert found is not None
    raise UserError(
        f"memory: {size} needs about {found.peak / 1e9:.1f} GB, {there};"
        " take a smaller size, or mixers where self-attention is the largest part"
    )


def _latent_bytes(job: Job) -> int:
    """Of all that is kept of the latents at the full size."""
    factor, channels = job.folder.factor(), int(job.folder.read("unet/config.json").get("in_channels") or 4)
    return job.height // factor * (job.width // factor) * channels * _COPIES * 4


def _foresee(job: Job, tile: int, tokens: int) -> int:
    """Peak bytes of a job, by running its largest stage on tensors without data."""
    dtype = DTYPES[job.dtype]
    unet, vae = job.folder.without_data()
    # Past diffusers' own `to`, which warns of every cast.
    nn.Module.to(vae, dtype)
    nn.Module.to(unet, dtype)
    weights = bytes_of(unet) + bytes_of(vae)
    if job.mixers is not None:
        # On a CPU the attentions stay beside the mixers.
        weights += bytes_of(_mounted_without_data(unet, job))
    last = job.stages()[-1]
    vae_scale = 2 ** (len(vae.config.block_out_channels) - 1)
    latents = torch.empty(
        1,
        unet.config.in_channels,
        last.height // vae_scale,
        last.width // vae_scale,
        dtype=dtype,
        device="meta",
    )
    tiled = TiledVae(vae, tile)
    with frugal(unet, tokens=tokens):
        peaks = [peak_of(lambda: unet(latents, **_conditions(unet, dtype)))]
    peaks.append(peak_of(lambda: [None for _ in tiled.decode(latents)]))
    stages = job.stages()
    if len(stages) > 1:
        before = stages[-2]
        small = latents.new_empty(1, latents.shape[1], before.height // vae_scale, before.width // vae_scale)
        peaks.append(peak_of(lambda: _enlarge(tiled, small, last)))
    text = job.folder.text_parameters() * dtype.itemsize
    # On a GPU the text encoders have gone before the rest comes; elsewhere everything is loaded at once.
    encoding = text if torch.device(job.device).type == "cuda" else text + weights
    running = weights + max(peaks) + _latent_bytes(job)
    return int(max(encoding, running) * _ALLOWANCE) + _CONTEXT


def _mounted_without_data(unet: UNet2DConditionModel, job: Job) -> UNetMixers:
    """The job's mixers on a UNet without memory; that they fit is found out on the way."""
    if job.mixers == "untrained":
        return mount(unet)
    try:
        with torch.device("meta"):
            mixers = UNetMixers.from_config(UNetMixers.load_config(job.mixers))
        return mount(unet, mixers)
    except (ValueError, TypeError, KeyError, OSError) as error:
        raise UserError(f"mixers: cannot use {job.mixers}: {error}") from error


def _conditions(unet: UNet2DConditionModel, dtype: torch.dtype) -> dict[str, Any]:
    """Text of the usual length, without data."""
    given: dict[str, Any] = {
        "timestep": torch.empty(1, device="meta"),
        "encoder_hidden_states": torch.empty(
            1, 77, unet.config.cross_attention_dim, dtype=dtype, device="meta"
        ),
    }
    if unet.config.addition_embed_type == "text_time":
        ids = unet.config.projection_class_embeddings_input_dim // unet.config.addition_time_embed_dim
        count = 6 if ids > 6 else 5
        pooled = (
            unet.config.projection_class_embeddings_input_dim - count * unet.config.addition_time_embed_dim
        )
        given["added_cond_kwargs"] = {
            "text_embeds": torch.empty(1, pooled, dtype=dtype, device="meta"),
            "time_ids": torch.empty(1, count, device="meta"),
        }
    return given


class Generator:
    """A loaded pipeline that makes the pictures of a job.

    Args:
        job: what to make.
        how: from `plan(job)`.
        progress: told of every stage's steps and tiles.
        pipe: a pipeline that is loaded already, with its mixers and scheduler; None loads the job's.
    """

    def __init__(
        self,
        job: Job,
        how: Plan,
        progress: Progress = lambda what, done, total: None,
        pipe: DiffusionPipeline | None = None,
    ) -> None:
        self.job, self.how, self.progress = job, how, progress
        self.pipe = self._loaded() if pipe is None else pipe
        self._embeds: dict[str, dict[str, Tensor]] = {}

    def _loaded(self) -> DiffusionPipeline:
        job = self.job
        pipe = job.folder.load(DTYPES[job.dtype])
        if job.scheduler is not None:
            pipe.scheduler = job.folder.scheduler(job.scheduler)
        if job.mixers == "untrained":
            mount(pipe.unet)
        elif job.mixers is not None:
            try:
                mount(pipe.unet, UNetMixers.from_pretrained(job.mixers))
            except (ValueError, OSError) as error:
                raise UserError(f"mixers: {error}") from error
        return pipe

    def encode(self, prompts: Sequence[str]) -> None:
        """Encode all prompts; the text encoders are then given up, their memory is the stages'."""
        job, pipe = self.job, self.pipe
        names: tuple[str, ...] = ("prompt_embeds", "negative_prompt_embeds")
        if isinstance(pipe, StableDiffusionXLPipeline):
            names += ("pooled_prompt_embeds", "negative_pooled_prompt_embeds")
        encoders = [name for name in TEXT if getattr(pipe, name, None) is not None]
        for name in encoders:
            getattr(pipe, name).to(job.device)
        with torch.no_grad():
            for prompt in dict.fromkeys(prompts):
                embeds = pipe.encode_prompt(
                    prompt=prompt,
                    device=job.device,
                    num_images_per_prompt=1,
                    do_classifier_free_guidance=job.guidance > 1,
                    negative_prompt=job.negative,
                )
                self._embeds[prompt] = {
                    name: each for name, each in zip(names, embeds, strict=True) if each is not None
                }
        for name in encoders:
            setattr(pipe, name, None)
        self.take(self._embeds)

    def take(self, embeds: dict[str, dict[str, Tensor]]) -> None:
        """Take prompts that are encoded: for each what `encode_prompt` of the pipeline returns, by name."""
        job, pipe = self.job, self.pipe
        self._embeds = embeds
        # The format that convolutions on a GPU take without turning images around.
        layout = torch.channels_last if self._on_gpu else torch.preserve_format
        for network in (pipe.unet, pipe.vae):
            nn.Module.to(network, job.device).to(memory_format=layout)
        pipe.set_progress_bar_config(disable=True)
        parts = {**pipe.components}
        if not isinstance(pipe, StableDiffusionXLPipeline):
            parts |= {"safety_checker": None, "requires_safety_checker": False}
        self._again = job.kind()[1](**parts)
        self._again.set_progress_bar_config(disable=True)

    def run(self, prompt: str, out: str | Path, *, resume: bool = False, keep: bool = False) -> None:
        """Make one picture.

        Args:
            prompt: one of those that were encoded.
            out: the file to write, .png, .tif or .tiff.
            resume: go on after the finished stages of an interrupted run with the same settings.
            keep: leave the stages' files beside the picture.
        """
        out = Path(out)
        folder = stages_folder(out)
        stages = self.job.stages()
        first, latents = self._finished(folder, prompt) if resume else (0, None)
        tiled = TiledVae(self.pipe.vae, self.how.tile)
        for i in range(first, len(stages)):
            stage = stages[i]
            name = f"stage {i + 1}/{len(stages)} ({stage.height} x {stage.width})"
            if latents is not None:
                latents = _enlarge(tiled, latents, stage, functools.partial(self._tell, name))
            latents = self._stage(stage, i, prompt, latents, name)
            folder.mkdir(parents=True, exist_ok=True)
            about = {"fingerprint": self.job.fingerprint(prompt, i)}
            write_safetensors(folder / f"stage{i}.safetensors", {"latents": latents}, about)
        assert latents is not None
        tiled.progress = functools.partial(self.progress, "writing")
        with ImageFile(out, self.job.width, self.job.height) as file:
            for strip in tiled.decode(latents):
                pixels = ((strip[0].float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
                file.write(pixels.permute(1, 2, 0).cpu().numpy())
        if not keep:
            shutil.rmtree(folder, ignore_errors=True)

    def _tell(self, name: str, what: str, done: int, total: int) -> None:
        self.progress(f"{name}: {what}", done, total)

    @property
    def _on_gpu(self) -> bool:
        return torch.device(self.job.device).type == "cuda"

    def _finished(self, folder: Path, prompt: str) -> tuple[int, Tensor | None]:
        """How many stages a run before has left finished, and the latents of the last of them."""
        for i in reversed(range(len(self.job.stages()))):
            path = folder / f"stage{i}.safetensors"
            with contextlib.suppress(OSError, SafetensorError), safe_open(path, framework="pt") as file:
                if (file.metadata() or {}).get("fingerprint") == self.job.fingerprint(prompt, i):
                    return i + 1, file.get_tensor("latents").to(self.job.device)
        return 0, None

    def _stage(self, stage: Stage, index: int, prompt: str, before: Tensor | None, name: str) -> Tensor:
        """Denoise at one size; latents (1, C, h, w)."""
        job = self.job
        base = job.stages()[0]
        # Each stage has its own noise, so that a resumed run makes the same picture.
        generator = torch.Generator().manual_seed(job.seed * 1000 + index)

        def count(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            # Those of second order go twice over most steps.
            self.progress(name, step + 1, pipe.num_timesteps)
            return tensors

        options: dict[str, Any] = {
            **self._embeds[prompt],
            "num_inference_steps": stage.steps,
            "guidance_scale": job.guidance,
            "generator": generator,
            "output_type": "latent",
            "callback_on_step_end": count,
        }
        if isinstance(self.pipe, StableDiffusionXLPipeline):
            # SDXL is told a size; beyond what it was trained on that would mean nothing to it.
            size = (base.height, base.width)
            options |= {"original_size": size, "target_size": size}
        unet = self.pipe.unet
        with contextlib.ExitStack() as stack:
            stack.enter_context(fused(unet))
            if self._on_gpu and stage.height * stage.width <= GRAPHED_AREA:
                stack.enter_context(graphed(unet))
            stack.enter_context(frugal(unet, tokens=self.how.tokens))
            if before is None:
                return self.pipe(height=stage.height, width=stage.width, **options).images
            return self._again(image=before, strength=stage.strength, **options).images


def _enlarge(
    tiled: TiledVae, latents: Tensor, stage: Stage, tell: Progress = lambda what, done, total: None
) -> Tensor:
    """Latents of the picture, enlarged to the size of a stage. Enlarging latents themselves would blur."""
    with torch.no_grad():
        tiled.progress = functools.partial(tell, "decoding")
        image = torch.cat([strip.float() for strip in tiled.decode(latents)], dim=2)
        image = F.interpolate(
            image, size=(stage.height, stage.width), mode="bicubic", align_corners=False
        ).clamp_(-1, 1)
        tiled.progress = functools.partial(tell, "encoding")
        return tiled.encode(image).to(latents.dtype)
