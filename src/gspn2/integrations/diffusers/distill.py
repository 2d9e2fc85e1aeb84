"""The run of `gspn2 distill`: checks, encodings, steps, files to go on from.

What a step draws depends on (seed, step, place in the batch) alone, so a run that was killed and resumed
takes the same steps as one that was not, and several processes see the same noise as one.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from gspn2.training.checkpoint import part, write_safetensors
from gspn2.training.errors import CheckpointError, DataError, Interrupted, TrainingFailed, UserError
from gspn2.training.failure import write_faults
from gspn2.training.rng import derive_seed, seeded
from gspn2.training.schedule import learning_rate
from gspn2.training.state import load_optimizer, load_weights, prefixed
from gspn2.training.stopping import StopRequest

from .distillation import LOSSES, Average, Batch, Distiller, schedule_of
from .folder import TEXT, PipelineFolder, check_seed, check_steps
from .mounting import mount
from .output import check_writable
from .pairs import Cache, Pair, buckets, fitted
from .sampling import Sampler
from .sources import Options, Source, find_source, list_pictures

LAST, LOG, MIXERS = "last.safetensors", "log.jsonl", "mixers"
_FREE_ON_RESUME = {
    *("out", "cache", "device", "checkpointing", "accumulate", "save_every", "sample_every", "samples")
}

Report = Callable[[str, int, int, dict[str, float]], None]
"""Called with what is being done, how much of it is done, how much there is, and the losses of a step."""


@dataclass(frozen=True)
class DistillConfig:
    """What to distil, and how.

    Args:
        pipeline: folder of a Stable Diffusion or SDXL pipeline, the teacher.
        data: pictures with captions: a folder, tar shards, "hf:NAME" or "hf-stream:NAME" (`sources`).
        out: folder of the run.
        cache: folder of latents and prompt embeddings; None for one in `out`.
        resolution: side of a square picture; other aspect ratios get as many pixels. None: what the UNet was
            trained at.
        steps, batch_size: of the run, and of a step, of all processes together.
        accumulate: passes that each process takes its share of a step in.
        lr, warmup, clip: AdamW's peak rate, steps to it, largest norm of the gradient.
        noise, teacher, features: weights of the losses.
        drop: share of captions left out, for classifier-free guidance.
        ema: decay of the moving average.
        proxy_ratio: channels over propagated ones.
        bf16: autocast and frozen weights in bfloat16, else float32.
        checkpointing: recompute activations in the backward pass.
        save_every, sample_every: steps between checkpoints and between grids; 0 for no grids.
        samples, sample_steps, guidance: pictures in a grid, and how they are made.
        device: "cpu", or anything else for what Accelerate finds.
        image_column, caption_column, pictures: what to take of the data (`sources.Options`).

    Raises:
        UserError: something cannot be.
    """

    pipeline: Path
    data: Path | str
    out: Path
    cache: Path | None = None
    resolution: int | None = None
    steps: int = 10000
    batch_size: int = 16
    lr: float = 1e-4
    warmup: int = 500
    clip: float = 1.0
    noise: float = 1.0
    teacher: float = 0.5
    features: float = 0.5
    drop: float = 0.1
    ema: float = 0.999
    proxy_ratio: int = 8
    bf16: bool = False
    checkpointing: bool = False
    save_every: int = 500
    sample_every: int = 1000
    samples: int = 4
    sample_steps: int = 25
    guidance: float = 5.0
    seed: int = 0
    device: str = "auto"
    accumulate: int = 1
    image_column: str | None = None
    caption_column: str | None = None
    pictures: int | None = None

    def __post_init__(self) -> None:
        counts = ("steps", "batch_size", "accumulate", "proxy_ratio", "save_every", "samples", "sample_steps")
        for name in (*counts, "pictures"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name}: expected at least 1, got {value}")
        for name in ("warmup", "noise", "teacher", "features", "sample_every"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UserError(f"{name}: expected a number of at least 0, got {getattr(self, name)}")
        for name in ("lr", "clip"):
            if not 0 < getattr(self, name) < math.inf:
                raise UserError(f"{name}: expected a number of more than 0, got {getattr(self, name)}")
        for name in ("drop", "ema"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"{name}: expected at least 0 and less than 1, got {getattr(self, name)}")
        if not self.noise + self.teacher + self.features > 0:
            raise UserError("noise, teacher, features: expected one loss with a weight of more than 0")
        if not 1 <= self.guidance < math.inf:
            raise UserError(f"guidance: expected a number of at least 1, got {self.guidance}")
        check_seed(self.seed)

    def sizes(self) -> list[tuple[int, int]]:
        """Heights and widths in pixels; also finds out whether the pipeline can be distilled at all."""
        folder = PipelineFolder(self.pipeline)
        folder.kind()
        scheduler = folder.scheduler()
        try:
            schedule_of(scheduler)
        except ValueError as error:
            raise UserError(str(error)) from error
        check_steps("sample_steps", scheduler, self.sample_steps)
        folder.check()
        folder.variant()
        unet, vae = folder.without_data()
        try:
            with torch.device("meta"):
                mount(unet, proxy_ratio=self.proxy_ratio)
            factor = 2 ** (len(vae.config.block_out_channels) - 1)
            halvings = len(unet.config.block_out_channels) - 1
            return buckets(self.resolution or factor * unet.config.sample_size, factor * 2**halvings)
        except (ValueError, TypeError) as error:
            raise UserError(str(error)) from error

    def settings(self) -> dict[str, Any]:
        """What a resumed run must share."""
        fields = {name: value for name, value in asdict(self).items() if name not in _FREE_ON_RESUME}
        return {name: str(value) if isinstance(value, Path) else value for name, value in fields.items()}


def _silent(what: str, done: int, total: int, losses: dict[str, float]) -> None:
    """A report to nobody."""


def distill(config: DistillConfig, report: Report = _silent, *, resume: bool = False) -> Path:
    """Train mixers to stand in for a pipeline's self-attentions.

    Args:
        config: what and how.
        report: told of every encoding and step.
        resume: go on from the last checkpoint in `config.out`.

    Returns:
        The folder of the trained mixers (the moving average), for `UNetMixers.from_pretrained`.

    Raises:
        UserError: something cannot be; no weights have been loaded yet.
        TrainingFailed: the loss is no longer finite.
        Interrupted: SIGINT or SIGTERM came; the state has been saved.
    """
    sizes = config.sizes()
    if resume and not (config.out / LAST).is_file():
        raise CheckpointError(f"out: no {LAST} to resume from in {config.out}")
    if not resume and any((config.out / name).exists() for name in (LAST, MIXERS)):
        raise UserError(f"out: {config.out} holds a run; --resume goes on with it, or take another folder")
    check_writable(config.out)
    if config.cache is not None:
        check_writable(config.cache)
    accelerator = Accelerator(
        mixed_precision="bf16" if config.bf16 else "no",
        cpu=config.device == "cpu",
        step_scheduler_with_optimizer=False,
    )
    parts = accelerator.num_processes * config.accumulate
    if config.batch_size % parts:
        raise UserError(
            f"batch_size: expected a multiple of {parts} ({accelerator.num_processes} processes x"
            f" {config.accumulate} passes), got {config.batch_size}"
        )
    if not accelerator.is_main_process:
        report = _silent
    data = _Data.found(config, sizes, accelerator, report)
    about = {"settings": config.settings(), "data": data.digest()}
    saved = _read_checkpoint(config.out / LAST, about) if resume else None
    # Encoding, which may take hours, can be left at any time: what is done is on disk, and is found again.
    run = _Run(config, accelerator, data, about, report, resume)
    with StopRequest() as stop:
        run.train(saved, stop)
    return config.out / MIXERS


@dataclass(frozen=True)
class _Data:
    """Pictures, as they were listed, and where they come from."""

    source: Source
    pairs: list[Pair]
    faults: list[str]

    @classmethod
    def found(
        cls, config: DistillConfig, sizes: list[tuple[int, int]], accelerator: Accelerator, report: Report
    ) -> _Data:
        options = Options(config.image_column, config.caption_column, config.pictures)
        source = find_source(str(config.data), options)
        # The others find the list of the first process, where it is one that is kept.
        with accelerator.main_process_first():
            listing = list_pictures(
                source,
                str(config.data),
                options,
                config.cache or config.out / "cache",
                lambda count: report("pictures", count, 0, {}),
            )
        return cls(source, [fitted(picture, sizes) for picture in listing.pictures], listing.faults)

    def digest(self) -> str:
        """What the examples are, wherever they are."""
        named = [(pair.picture.label, pair.caption, pair.size) for pair in self.pairs]
        return hashlib.sha256(json.dumps(named).encode()).hexdigest()


class _Run:
    """Models, optimizer and files of a run."""

    def __init__(
        self,
        config: DistillConfig,
        accelerator: Accelerator,
        data: _Data,
        about: dict[str, Any],
        report: Report,
        resumed: bool,
    ) -> None:
        self.config, self.accelerator, self.about, self.report = config, accelerator, about, report
        dtype = torch.bfloat16 if config.bf16 else torch.float32
        self.cache = Cache(config.cache or config.out / "cache", config.pipeline, dtype)
        pipe = self._encoded_pipeline(data, dtype, resumed)
        self.pairs, unread = self.cache.split(data.pairs)
        self.faults = [*data.faults, *unread]
        if not self.pairs:
            raise DataError(f"data: not one picture can be read: {self.faults[0]}")
        pipe.unet.to(accelerator.device)
        try:
            # The same fresh mixers in all processes.
            with seeded(config.seed):
                distiller = Distiller(
                    pipe.unet,
                    pipe.scheduler,
                    {name: getattr(config, name) for name in LOSSES},
                    checkpointing=config.checkpointing,
                    proxy_ratio=config.proxy_ratio,
                )
        except ValueError as error:
            raise UserError(str(error)) from error
        self.mixers = distiller.mixers
        self.sampler = Sampler(pipe, distiller.student, config.guidance, config.sample_steps, config.seed)
        self.average = Average(self.mixers, config.ema)
        self._order = 0, batches_of(self.pairs, config.batch_size, config.seed, 0)
        self._levels = int(distiller.schedule.config.num_train_timesteps)
        self.parameters = list(self.mixers.parameters())
        self.optimizer = torch.optim.AdamW(self.parameters, lr=config.lr, weight_decay=0.0)
        self.distiller = accelerator.prepare_model(distiller)

    def _encoded_pipeline(self, data: _Data, dtype: torch.dtype, resumed: bool) -> Any:
        """The pipeline without its text encoders, once all latents and embeddings are on disk."""
        config, accelerator = self.config, self.accelerator
        pairs, captions = self.cache.missing(data.pairs, known_faults=resumed)
        share = slice(accelerator.process_index, None, accelerator.num_processes)
        # Everybody has looked before anybody writes: the shares must be of the same list.
        accelerator.wait_for_everyone()
        # The VAE of SDXL is not safe in less than float32, and pictures are encoded once only.
        pipe: Any = PipelineFolder(config.pipeline).load({"vae": torch.float32, "default": dtype})
        pipe.set_progress_bar_config(disable=True)
        encoders = [name for name in TEXT if getattr(pipe, name, None) is not None]
        pipe.vae.to(accelerator.device)
        if captions:
            for name in encoders:
                getattr(pipe, name).to(accelerator.device)
        self.cache.build(
            pipe,
            pairs[share],
            data.source.open([pair.picture for pair in pairs[share]]),
            captions[share],
            accelerator.device,
            lambda what, done, total: self.report(what, done, total, {}),
        )
        for name in encoders:
            setattr(pipe, name, None)
        accelerator.wait_for_everyone()
        return pipe

    def train(self, saved: dict[str, Tensor] | None, stop: StopRequest) -> None:
        """All steps that are left."""
        config = self.config
        config.out.mkdir(parents=True, exist_ok=True)
        if self.faults and self.accelerator.is_main_process:
            write_faults(config.out, self.faults)
        first = self._restore(saved) if saved is not None else 0
        with _Log(config.out / LOG, first, self.accelerator.is_main_process) as log:
            for step in range(first, config.steps):
                log.write({"step": step, **self._step(step)})
                done = step + 1
                if config.sample_every and (done % config.sample_every == 0 or done == config.steps):
                    self._sample(done)
                stopped = self._agree(stop.signum)
                if stopped or done % config.save_every == 0 or done == config.steps:
                    log.sync()
                    self._save(done)
                if stopped and done < config.steps:
                    raise Interrupted(stopped, config.out / LAST, f"step {done}")
        if self.accelerator.is_main_process:
            with self.average.applied(self.mixers):
                _write_folder(config.out / MIXERS, self.mixers.save_pretrained)
        self.accelerator.wait_for_everyone()

    def _step(self, step: int) -> dict[str, float]:
        config, accelerator = self.config, self.accelerator
        rate = learning_rate(step, config.steps, config.warmup, config.lr, 0.0)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        values = torch.zeros(len(LOSSES) + 1, device=accelerator.device)
        examples = self._places(step)
        size = len(examples) // config.accumulate
        for start in range(0, len(examples), size):
            batch = collate([self._example(step, *example) for example in examples[start : start + size]])
            # Processes add up their gradients once, in the last pass.
            last = start + size == len(examples)
            with nullcontext() if last else accelerator.no_sync(self.distiller):
                losses = self.distiller(batch.to(accelerator.device))
                accelerator.backward(losses["loss"] / config.accumulate)
            shown = torch.stack([losses[name].detach().float() for name in (*LOSSES, "loss")])
            values += shown / config.accumulate
        accelerator.clip_grad_norm_(self.parameters, config.clip)
        found = dict(zip((*LOSSES, "loss"), accelerator.reduce(values, "mean").tolist(), strict=True))
        if not all(abs(value) < float("inf") for value in found.values()):
            raise TrainingFailed(f"the loss at step {step} is {found['loss']}; a smaller --lr may help")
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.average.update(self.mixers, step)
        self.report("steps", step + 1, config.steps, found)
        return found

    def _places(self, step: int) -> list[tuple[int, Pair]]:
        """This process's share of a step: places in the batch, and pictures, all of one size."""
        config, count = self.config, self.accelerator.num_processes
        # An epoch has as many batches as any other: its buckets are as full.
        epoch, place = divmod(step, len(self._order[1]))
        if epoch != self._order[0]:
            self._order = epoch, batches_of(self.pairs, config.batch_size, config.seed, epoch)
        indices = self._order[1][place]
        places = range(self.accelerator.process_index, config.batch_size, count)
        return [(place, self.pairs[indices[place]]) for place in places]

    def _example(
        self, step: int, place: int, pair: Pair
    ) -> tuple[Pair, Tensor, Tensor, Tensor, dict[str, Tensor]]:
        generator = torch.Generator().manual_seed(derive_seed(self.config.seed, "step", step, place))
        latents = self.cache.latents(pair).float()
        timestep = torch.randint(0, self._levels, (1,), generator=generator)
        dropped = torch.rand((), generator=generator).item() < self.config.drop
        noise = torch.randn(latents.shape, generator=generator)
        return pair, latents, noise, timestep, self.cache.prompt(None if dropped else pair.caption)

    def _agree(self, signum: int | None) -> int:
        """A signal that came to any of the processes."""
        if self.accelerator.num_processes == 1:
            return signum or 0
        came = torch.tensor([signum or 0], device=self.accelerator.device)
        return int(self.accelerator.gather(came).max())

    def _sample(self, done: int) -> None:
        if self.accelerator.is_main_process:
            chosen = self.pairs[: self.config.samples]
            with self.average.applied(self.mixers), self.accelerator.autocast():
                self.sampler.grid(self.config.out / "samples" / f"step-{done:07}.png", chosen, self.cache)

    def _save(self, done: int) -> None:
        if not self.accelerator.is_main_process:
            return
        tensors = prefixed("mixers", dict(self.mixers.state_dict())) | prefixed("ema", self.average.tensors)
        for index, values in self.optimizer.state_dict()["state"].items():
            tensors |= prefixed(f"optimizer/{index}", values)
        described = json.dumps({**self.about, "step": done})
        write_safetensors(self.config.out / LAST, tensors, {"gspn2_distill": described})

    def _restore(self, saved: dict[str, Tensor]) -> int:
        source = self.config.out / LAST
        load_weights(self.mixers, part(saved, "mixers"), source)
        for name, tensor in part(saved, "ema").items():
            self.average.tensors[name].copy_(tensor)
        load_optimizer(self.optimizer, part(saved, "optimizer"))
        return int(saved["step"])


def batches_of(pairs: list[Pair], size: int, seed: int, epoch: int) -> list[list[int]]:
    """Batches of an epoch, each of one bucket, in random order; the last of a bucket is filled up from it."""
    generator = torch.Generator().manual_seed(derive_seed(seed, "order", epoch))
    of_size: dict[tuple[int, int], list[int]] = {}
    for index in torch.randperm(len(pairs), generator=generator).tolist():
        of_size.setdefault(pairs[index].size, []).append(index)
    batches = [
        [indices[(start + i) % len(indices)] for i in range(size)]
        for indices in of_size.values()
        for start in range(0, len(indices), size)
    ]
    return [batches[place] for place in torch.randperm(len(batches), generator=generator).tolist()]


def collate(examples: list[Any]) -> Batch:
    """Stack examples of one size."""
    pairs, latents, noise, timesteps, prompts = zip(*examples, strict=True)
    return Batch(
        torch.stack(latents),
        torch.stack(noise),
        torch.cat(timesteps),
        {name: torch.stack([prompt[name] for prompt in prompts]) for name in prompts[0]},
        torch.tensor([[*pair.original, *pair.crop, *pair.size] for pair in pairs], dtype=torch.float32),
    )


class _Log:
    """`log.jsonl`, a line a step, cut to the steps that the checkpoint knows."""

    def __init__(self, path: Path, steps: int, writes: bool) -> None:
        self._file = None
        if writes:
            kept = path.read_text(encoding="utf-8").splitlines(keepends=True)[:steps] if path.exists() else []
            self._file = open(path, "r+" if path.exists() else "w", encoding="utf-8", newline="")  # noqa: SIM115
            self._file.truncate(sum(len(line.encode()) for line in kept))
            self._file.seek(0, os.SEEK_END)

    def __enter__(self) -> _Log:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._file is not None:
            self._file.close()

    def write(self, line: dict[str, float]) -> None:
        """Append a step."""
        if self._file is not None:
            self._file.write(json.dumps(line) + "\n")

    def sync(self) -> None:
        """Bring everything to the disk."""
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())


def _read_checkpoint(path: Path, about: dict[str, Any]) -> dict[str, Tensor]:
    """Tensors of a run's last checkpoint, and its `step` as one of them."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            described = json.loads((file.metadata() or {})["gspn2_distill"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise CheckpointError(f"{path}: no checkpoint of a distillation: {error!r}") from error
    changed = [
        f"{name} is {value!r}, was {described['settings'].get(name)!r}"
        for name, value in about["settings"].items()
        if value != described["settings"].get(name)
    ]
    if described["data"] != about["data"]:
        changed.append("the pictures or captions are others")
    if changed:
        raise UserError(f"a resumed run keeps its settings, but {'; '.join(changed)}")
    return {**tensors, "step": torch.tensor(described["step"])}


def _write_folder(path: Path, write: Callable[[Path], Any]) -> None:
    """Fill a folder beside `path` and give it that name when it is whole."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        if path.exists():
            shutil.rmtree(path)
        os.replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
