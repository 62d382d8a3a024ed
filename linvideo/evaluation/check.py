"""Checks that a pipeline with its real weights converts, fits, trains and generates on this device.

It runs each part of a training run once, in a few minutes, so that problems show up now and not after hours.
"""

import math
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import WanTransformer3DModel
from PIL import Image

from linvideo.models import convert, default_fps, wan_transformer
from linvideo.models.branches import feature_weights, gates
from linvideo.models.generate import generate_video
from linvideo.models.video_file import check_output, save_video
from linvideo.progress import bar
from linvideo.run.forward_times import remember
from linvideo.trajectories.collect import TrajectoryConfig, collect, open_store
from linvideo.trajectories.flow import predict_velocity, sampler_grid
from linvideo.trajectories.images import add_images, check_images, takes_images
from linvideo.trajectories.prompts import encode_prompts
from linvideo.trajectories.store import StateBatch
from linvideo.transfer.gradient_step import GradientStep
from linvideo.transfer.objectives import ObjectiveConfig
from linvideo.transfer.train_config import TrainConfig
from linvideo.transfer.warmup import attention_output_errors, fit_feature_maps

STEPS = 4  # sampling steps
PROMPT = "A red kite rises over a grey sea, the camera follows it slowly."


class Finding(NamedTuple):
    name: str
    passed: bool
    detail: str
    seconds: float


def check_pipeline(
    pipeline: Any,
    output: str | Path,
    height: int = 256,
    width: int = 256,
    num_frames: int = 17,
    num_inference_steps: int = STEPS,
    warmup_steps: int = 10,
    seed: int = 0,
    progress: bool = True,
) -> Iterator[Finding]:
    """Yield a finding after each part. A part that fails does not stop the next ones.

    Only the feature maps and r of the linear branches are trained, so that the check works for models that could not be
    trained in full on one device. The parameters of the pipeline's transformer stop requiring gradients; otherwise it
    is not changed.

    Args:
        pipeline: Stock WanPipeline or WanImageToVideoPipeline on the device to check. The latter gets an image that
            goes from black to white.
        output: The .mp4 file for the short video.
        height, width, num_frames: Size of all videos here, in pixels and frames.
        num_inference_steps: Number of sampling steps.
        warmup_steps: Number of steps that fit the feature maps.
        seed: Seed of all random draws.
        progress: Whether to show progress bars.

    Raises:
        ValueError: The pipeline is converted already or of another kind, or the sizes do not fit it.
        OSError: The video cannot be written.
    """
    base = wan_transformer(pipeline)
    if type(base) is not WanTransformer3DModel:
        raise ValueError(f"expected a stock Wan pipeline, which the check converts, got a {type(base).__name__}")
    check_images(pipeline, [])
    check_output(output)
    base.requires_grad_(False)
    size = {"height": height, "width": width, "num_frames": num_frames}
    parts = (_trajectory, _equality, _warmup, _adm, _video)
    with tempfile.TemporaryDirectory() as folder:
        run = _Run(pipeline, folder, Path(output), size, num_inference_steps, warmup_steps, seed, progress)
        steps = bar(parts, progress, desc="check", unit="part", leave=False)
        for part in steps:
            steps.set_description(part.__doc__)
            started = time.perf_counter()
            try:
                passed, detail = part(run)
            except Exception as error:  # out of memory, a compiler, a kernel: a finding like any other
                passed, detail = False, f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
            yield Finding(part.__doc__, passed, detail, time.perf_counter() - started)


class _Run:
    """The state that the parts share. Their docstrings are the names of the findings."""

    def __init__(self, pipeline, folder, output, size, num_inference_steps, warmup_steps, seed, progress):
        self.pipeline, self.base, self.output, self.size = pipeline, wan_transformer(pipeline), output, size
        self.warmup_steps, self.progress = warmup_steps, progress
        trajectories = TrajectoryConfig(
            num_trajectories=1, num_inference_steps=num_inference_steps, shard_size=1, **size
        )
        self.config = TrainConfig(output_dir=folder, train_batch_size=1, seed=seed, trajectories=trajectories)
        self.grid = sampler_grid(pipeline.scheduler, num_inference_steps)
        self.prompts = encode_prompts(pipeline, [PROMPT])
        self.image = Image.linear_gradient("L").resize((size["width"], size["height"])).convert("RGB")
        add_images(self.prompts, pipeline, [self.image], trajectories)
        self.store = open_store(f"{folder}/trajectories", pipeline, self.prompts, trajectories, seed)
        self.mixed = convert(self.base, "all", mode="mixed", r_init=1.0, copy=False)

    def draw(self, number: int) -> StateBatch:
        return self.store.draw([0], self.config.seed, "check", number, prompts=self.prompts, device=self.base.device)


def _trajectory(run: _Run) -> tuple[bool, str]:
    """a trajectory of the teacher"""
    collect(run.store, run.pipeline, run.prompts, run.progress)
    batch, config = run.draw(0), run.base.config
    finite = bool(batch.x.isfinite().all() and batch.u.isfinite().all())
    started = time.perf_counter()
    with torch.no_grad():
        predict_velocity(run.base, batch.x, batch.timestep, batch.conditions).cpu()
    seconds = time.perf_counter() - started
    tokens = math.prod(batch.x.shape[2:]) // math.prod(config.patch_size)
    remember(config, tokens, run.base.dtype, run.base.device, seconds, "linvideo check")
    return finite, f"{len(run.store)} states, {seconds:.2f} s per forward"


@torch.no_grad()
def _equality(run: _Run) -> tuple[bool, str]:
    """the converted model at r = 1 equals the base model"""
    batch = run.draw(0)
    base, mixed = (predict_velocity(m, batch.x, batch.timestep, batch.conditions) for m in (run.base, run.mixed))
    difference = (base - mixed).abs().max().item()
    return difference == 0 and bool(base.isfinite().all()), f"largest difference {difference:g}"


def _warmup(run: _Run) -> tuple[bool, str]:
    """the feature maps learn softmax attention"""
    first = _fit_error(run)
    fit_feature_maps(run.mixed, map(run.draw, range(run.warmup_steps)), run.config.warmup.learning_rate)
    last = _fit_error(run)
    return last < first, f"relative error {first:.3f} -> {last:.3f} in {run.warmup_steps} steps"


def _fit_error(run: _Run) -> float:
    """Return the mean error over all layers and all states of the trajectory."""
    states = (run.store.batch([i], run.prompts, run.base.device) for i in range(len(run.store)))
    errors = [error for batch in states for error in attention_output_errors(run.mixed, batch).values()]
    return torch.stack(errors).mean().item()


def _adm(run: _Run) -> tuple[bool, str]:
    """an ADM step moves r and the feature maps"""
    learned = [*gates(run.mixed).values(), *feature_weights(run.mixed).values()]
    with torch.no_grad():
        for r in gates(run.mixed).values():
            r.fill_(run.config.selection.r_init)
    run.mixed.train().enable_gradient_checkpointing()
    before = [x.detach().clone() for x in learned]
    optimizer = torch.optim.Adam(learned, lr=run.config.selection.r_learning_rate)
    objective = ObjectiveConfig(name="adm")
    step = GradientStep(run.mixed, run.base, run.store, run.prompts, run.grid, run.config, "check", objective)
    _, loss = step(0)
    finite = all(x.grad is not None and bool(x.grad.isfinite().all()) for x in learned)
    optimizer.step()
    optimizer.zero_grad()
    run.mixed.eval()
    moved = all(not torch.equal(x, old) for x, old in zip(learned, before, strict=True))
    return finite and moved, f"loss {loss:.4g}, {sum(x.numel() for x in learned):,} parameters moved"


def _video(run: _Run) -> tuple[bool, str]:
    """a video of the converted model"""
    pipeline, settings = run.pipeline, {"num_inference_steps": run.config.trajectories.num_inference_steps, **run.size}
    if takes_images(pipeline):
        settings["image"] = run.image
    pipeline.transformer = run.mixed
    try:
        video = generate_video(pipeline, PROMPT, **settings)
    finally:
        pipeline.transformer = run.base
    save_video(video, run.output, default_fps(pipeline))
    video = torch.as_tensor(video)
    return bool(video.isfinite().all()) and video.std().item() > 0, f"{len(video)} frames in {run.output}"
