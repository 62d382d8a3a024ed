"""Training data without a data set: noise is drawn, the teacher's own sampler runs, and its states and velocities are
stored (LinVideo, section on data: 50K pairs).

States come from the guided sampler, as at inference. The stored velocity is the teacher's under one condition, which is
drawn for each state: the prompt, or with `negative_probability` the negative prompt, because guidance needs the student
under both. Without guidance it is always the prompt. The guided velocity itself is not stored: a student that is
trained towards it, and sampled with guidance again, would be guided twice.

Trajectory i depends only on (seed, i): noise, prompt, kept steps and conditions are drawn by hash.
"""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from linvideo.progress import bar
from linvideo.trajectories.experts import Expert, low_noise_sampler, stored_expert, stored_guidance
from linvideo.trajectories.fingerprint import fingerprint
from linvideo.trajectories.flow import SamplerStep, sample_steps, sampler_grid
from linvideo.trajectories.prompts import PromptEmbeddings
from linvideo.trajectories.seeding import draw_noise, generator, stable_hash
from linvideo.trajectories.store import TrajectoryStore

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}

LARGEST = 100_000  # pixels, frames or steps: more than any model makes, and little enough for PyTorch's integers
SHIFTS = ("flow_shift", "shift")  # the names of the shift in the configs of schedulers


@dataclass
class TrajectoryConfig:
    """How the teacher is sampled. The sampler settings should be those with which the model is used later.

    The store takes num_trajectories * (2 * (num_inference_steps // stride) + 1) tensors of C*F*H*W values. With Wan
    1.3B the defaults take about 81 GB: 192 trajectories * 101 * 2.1 M values of 2 bytes. A larger stride or fewer
    trajectories reduce this in proportion; the paper's 50K states would take 419 GB. For a pipeline with two experts,
    only the steps in the range of the trained expert are stored, and count in place of num_inference_steps.

    Args:
        path: Folder of the trajectory store, which several runs may share. None means output_dir/trajectories.
        num_trajectories: Number of sampled videos. The default takes about 81 GB of disk space with Wan 1.3B.
        num_inference_steps: Number of sampling steps, as in WanPipeline.
        guidance_scale: Guidance scale, as in WanPipeline; 1 or less means no guidance.
        guidance_scale_2: Guidance scale of the low-noise expert, as in WanPipeline. None means guidance_scale.
        flow_shift: Flow shift of the scheduler. None means the pipeline's own. Wan's authors use 3 for 480p and 5 for
            720p.
        height: Height of the video in pixels. The default size is Wan's: 480 x 832, 81 frames.
        width: Width of the video in pixels.
        num_frames: Number of frames of the video, before the VAE compresses them.
        stride: Number of sampling steps between two stored states; the first one is drawn for each trajectory. The size
            on disk is proportional to 1 / stride.
        negative_probability: Share of the states that have the negative prompt as their condition. Without guidance it
            is 0, because the sampler never uses the negative prompt then.
        batch_size: Number of videos sampled at once.
        shard_size: Number of videos per file.
        dtype: Dtype of the stored states: "float16", "bfloat16" or "float32".
    """

    path: str | None = None
    num_trajectories: int = 192
    num_inference_steps: int = 50
    guidance_scale: float = 5.0
    guidance_scale_2: float | None = None
    flow_shift: float | None = None
    height: int = 480
    width: int = 832
    num_frames: int = 81
    stride: int = 1
    negative_probability: float = 0.2
    batch_size: int = 1
    shard_size: int = 16
    dtype: str = "float16"

    def __post_init__(self):
        sizes = ("height", "width", "num_frames", "batch_size", "shard_size")
        for name in ("num_trajectories", "num_inference_steps", "stride", *sizes):
            if getattr(self, name) < 1:
                raise ValueError(f"trajectories.{name} must be at least 1, got {getattr(self, name)}")
        for name in ("height", "width", "num_frames", "num_inference_steps"):
            if getattr(self, name) > LARGEST:
                raise ValueError(f"trajectories.{name} must be at most {LARGEST}, got {getattr(self, name)}")
        if self.stride > self.num_inference_steps:
            raise ValueError(
                f"trajectories.stride must be at most num_inference_steps {self.num_inference_steps}, got {self.stride}"
            )
        if not 0.0 <= self.negative_probability <= 1.0:
            raise ValueError(f"trajectories.negative_probability must lie in [0, 1], got {self.negative_probability}")
        for name in ("guidance_scale", "guidance_scale_2"):
            if not 0 <= (getattr(self, name) or 0) < math.inf:
                raise ValueError(f"trajectories.{name} must be finite and not negative, got {getattr(self, name)}")
        if self.flow_shift is not None and not 0 < self.flow_shift < math.inf:
            raise ValueError(f"trajectories.flow_shift must be positive and finite, got {self.flow_shift}")
        if self.dtype not in DTYPES:
            raise ValueError(f"trajectories.dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}")

    @property
    def states_per_trajectory(self) -> int:
        """Number of states per trajectory, for a pipeline with one transformer; see kept_steps."""
        return self.num_inference_steps // self.stride


def with_flow_shift(pipeline, flow_shift: float | None):
    """Return the pipeline, or for a given flow_shift a shallow copy of it whose scheduler has that shift.

    Raises:
        ValueError: The scheduler has no shift.
    """
    if flow_shift is None:
        return pipeline
    names = [name for name in SHIFTS if name in pipeline.scheduler.config]
    if not names:
        kind = type(pipeline.scheduler).__name__
        raise ValueError(f"trajectories.flow_shift needs a scheduler with a shift, got {kind}")
    pipeline = copy.copy(pipeline)
    pipeline.scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config, **{names[0]: flow_shift})
    return pipeline


def stored_flow_shift(scheduler: Any) -> float:
    """Return the shift of a scheduler; 1 if it has none."""
    return next((scheduler.config[name] for name in SHIFTS if name in scheduler.config), 1.0)


def latent_shape(pipeline, config: TrajectoryConfig) -> tuple[int, int, int, int]:
    """Return the shape (C, F, H, W) of the latents of one video.

    Raises:
        ValueError: The VAE and the transformer's patches cannot represent a video of this size.
    """
    time, space = pipeline.vae_scale_factor_temporal, pipeline.vae_scale_factor_spatial
    patch = pipeline.transformer.config.patch_size
    if (config.num_frames - 1) % time:
        raise ValueError(f"trajectories.num_frames must be 1 more than a multiple of {time}, got {config.num_frames}")
    for name, value, step in (("height", config.height, patch[1]), ("width", config.width, patch[2])):
        if value % (space * step):
            raise ValueError(f"trajectories.{name} must be a multiple of {space * step}, got {value}")
    frames = (config.num_frames - 1) // time + 1
    if frames % patch[0]:
        raise ValueError(f"trajectories.num_frames gives {frames} latent frames, expected a multiple of {patch[0]}")
    return pipeline.transformer.config.out_channels, frames, config.height // space, config.width // space


def kept_steps(timesteps: torch.Tensor, config: TrajectoryConfig, expert: Expert) -> range:
    """Return the sampler steps from which every stride-th state is stored; the first one is drawn per trajectory.

    Raises:
        ValueError: There are fewer steps than the stride.
    """
    steps = expert.steps(timesteps)
    if len(steps) < config.stride:
        raise ValueError(
            f"trajectories.stride {config.stride} needs at least as many sampling steps in the range of the expert"
            f" {expert.name}, got {len(steps)} of {config.num_inference_steps} steps there"
        )
    return steps


def open_store(
    path: str | Path,
    pipeline,
    prompts: PromptEmbeddings,
    config: TrajectoryConfig,
    seed: int,
    expert: Expert = Expert(),  # noqa: B008 (frozen)
) -> TrajectoryStore:
    """Open the store at `path` for these trajectories, complete or not; see TrajectoryStore for what it refuses."""
    return TrajectoryStore(path, store_request(pipeline, prompts, config, seed, expert))


def store_request(
    pipeline,
    prompts: PromptEmbeddings,
    config: TrajectoryConfig,
    seed: int,
    expert: Expert = Expert(),  # noqa: B008 (frozen)
) -> dict[str, Any]:
    """Return everything on which the trajectories depend, as plain values."""
    timesteps, sigmas = sampler_grid(pipeline.scheduler, config.num_inference_steps)
    steps = kept_steps(timesteps, config, expert)
    request = {
        "model": fingerprint(getattr(pipeline, expert.component)),
        "scheduler": type(pipeline.scheduler).__name__,
        "sigmas": [round(float(sigma), 6) for sigma in sigmas],
        "prompts": prompts.digest(),
        "latent_shape": list(latent_shape(pipeline, config)),
        "seed": seed,
        **{name: getattr(config, name) for name in ("num_trajectories", "num_inference_steps", "guidance_scale")},
        **{name: getattr(config, name) for name in ("stride", "negative_probability", "shard_size", "dtype")},
        "batch_size": config.batch_size,
        "states_per_trajectory": len(steps) // config.stride,
    }
    if expert.name is not None:
        scale = config.guidance_scale if config.guidance_scale_2 is None else config.guidance_scale_2
        request |= {"expert": expert.name, "boundary_timestep": expert.boundary_timestep, "guidance_scale_2": scale}
    # the low-noise expert's states depend on the high-noise expert, which led to them, but not the other way round
    if expert.name == "low_noise":
        request["model_high_noise"] = fingerprint(pipeline.transformer)
    if stored_guidance(request) == 1:  # the sampler never uses the negative prompt
        request["negative_probability"] = 0.0
    return request


def collect(
    store: TrajectoryStore,
    pipeline,
    prompts: PromptEmbeddings,
    progress: bool = True,
    shards: Sequence[int] | None = None,
) -> TrajectoryStore:
    """Fill the missing shards, on the transformer's device, and return the store.

    shards: Numbers of the shards to fill, for one of several workers; those that another worker has filled in the
        meantime are skipped. None means all missing shards.
    """
    request = store.request
    shape = tuple(request["latent_shape"])
    missing = store.missing_shards() if shards is None else shards
    # trajectories for a high-noise expert end with its range
    timesteps, _ = sampler_grid(pipeline.scheduler, request["num_inference_steps"])
    steps = stored_expert(request).steps(timesteps).stop
    total = steps * sum(len(store.shard_trajectories(number)) for number in missing)
    with bar(None, progress and bool(missing), total=total, desc="trajectories", unit="step") as done:
        for number in missing:
            if store.has_shard(number):
                continue
            trajectories = list(store.shard_trajectories(number))
            batches = []
            for start in range(0, len(trajectories), request["batch_size"]):
                chosen = trajectories[start : start + request["batch_size"]]
                batches.append(_collect_batch(request, pipeline, prompts, shape, chosen, done))
            store.write_shard(number, {key: torch.cat([batch[key] for batch in batches]) for key in batches[0]})
    return store


def _collect_batch(
    request: dict, pipeline, prompts: PromptEmbeddings, shape: tuple[int, ...], trajectories: list[int], done: tqdm
) -> dict[str, torch.Tensor]:
    expert, seed, stride = stored_expert(request), request["seed"], request["stride"]
    steps, kept = request["num_inference_steps"], request["states_per_trajectory"]
    in_range = expert.steps(sampler_grid(pipeline.scheduler, steps)[0])
    model = getattr(pipeline, expert.component)
    device, dtype = model.device, DTYPES[request["dtype"]]

    noise = torch.stack([draw_noise(shape, seed, "noise", i) for i in trajectories]).to(device)
    # consecutive prompts from a random start, so that every prompt is used about equally often
    prompt = torch.tensor([(stable_hash(seed, "prompt") + i) % len(prompts) for i in trajectories])
    chance = torch.stack([torch.rand(steps, generator=generator(seed, "negative", i)) for i in trajectories])
    negative = chance < request["negative_probability"]
    offset = [stable_hash(seed, "offset", i) % (len(in_range) - (kept - 1) * stride) for i in trajectories]
    keep = torch.tensor([[in_range[first + stride * j] for j in range(kept)] for first in offset])

    conditions = prompts.conditions(prompt, device=device)
    conditions_negative = prompts.conditions(prompt, torch.ones_like(prompt, dtype=torch.bool), device)
    x, u = (torch.empty(len(trajectories), kept, *shape, dtype=dtype) for _ in range(2))
    timestep = torch.empty(len(trajectories), kept)
    sampler = (pipeline.transformer, pipeline.scheduler, steps, noise, conditions, conditions_negative)
    for step in sample_steps(*sampler, request["guidance_scale"], low_noise_sampler(pipeline, request)):
        rows, columns = (keep == step.index).nonzero(as_tuple=True)
        flagged = rows[negative[rows, step.index]]
        u_step = step.u.clone()
        if len(flagged):  # only with guidance
            u_step[flagged] = step.u_negative[flagged]
        _check_finite(step, u_step, prompt, steps)
        x, u = _put(x, rows, columns, step.x), _put(u, rows, columns, u_step)
        timestep[rows, columns] = float(step.timestep)
        done.update(len(trajectories))
        if step.index == in_range[-1]:  # the high-noise expert has no use for the steps below its range
            break
    sample = _fitting(step.x_next, dtype).cpu()
    states = {"x": x, "u": u, "timestep": timestep, "negative": negative.gather(1, keep)}
    return states | {"prompt": prompt, "sample": sample}


def _check_finite(step: SamplerStep, u: torch.Tensor, prompt: torch.Tensor, steps: int) -> None:
    """Raise ValueError if a state or its velocity is not finite, before hours of training depend on it."""
    finite = torch.stack([x.isfinite().flatten(1).all(1) for x in (step.x, u, step.x_next)]).all(0).cpu()
    if not finite.all():
        numbers = ", ".join(str(1 + number) for number in prompt[~finite].unique().tolist())
        raise ValueError(
            f"the teacher's velocity is not finite at sampling step {step.index + 1} of {steps}, prompt number"
            f" {numbers}: look for NaN in its weights, or use a dtype with a larger range"
        )


def _fitting(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return x in this dtype, or in fp32 if it would overflow."""
    return x.to(dtype) if x.abs().max() <= torch.finfo(dtype).max else x.float()


def _put(kept: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Return `kept` with values[rows] put at [rows, columns], and in fp32 if they would overflow its dtype."""
    if len(rows):
        chosen = _fitting(values[rows], kept.dtype).cpu()
        kept = kept.to(chosen.dtype)
        kept[rows, columns] = chosen
    return kept
