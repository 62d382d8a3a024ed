"""The demo's distillation: the converted model learns to sample in two steps, and is compared with its former self."""

import os
from pathlib import Path

import torch

from linvideo.demo import judge
from linvideo.demo.evaluate import sample_videos, start_noise, with_transformer
from linvideo.demo.world import World
from linvideo.distillation import DistillConfig, distill
from linvideo.run import load_config


def distill_and_compare(
    folder: Path, pipeline, converted: torch.nn.Module, reference: torch.Tensor, seed: int, world: World
) -> tuple[dict, dict[str, torch.Tensor]]:
    """Distil `converted` in folder/distillation, on the trajectories of folder/training, into folder/distilled.

    reference: The teacher's videos with its full number of steps, from `evaluate`; the same number is judged here.

    Return the contents for metrics.json, and the videos by name, all with the student's number of sampling steps.
    """
    config = distill_config(folder / "distillation", folder / "training" / "trajectories", seed)
    result = distill(config, pipeline, converted, world.training_captions())
    os.rename(result.pipeline_path, folder / "distilled")

    captions, noise = world.evaluation_captions(len(reference)), start_noise(world, len(reference)).to(pipeline.device)
    steps = len(result.timesteps)
    films = {
        "teacher": sample_videos(pipeline, captions, noise, world, steps),
        "converted": sample_videos(with_transformer(pipeline, converted), captions, noise, world, steps),
        "distilled": sample_videos(result.pipeline, captions, noise, world, steps, guidance_scale=1.0),
    }
    outcome = {"timesteps": result.timesteps, "seconds": result.seconds, "models": {}}
    for name, film in films.items():
        found = judge.judge(film, captions, world) | {"psnr_to_teacher": judge.psnr(film, reference)}
        outcome["models"][name] = found
        print(f"{name}, {steps} steps: all words right {found['all_right']:.0%}, good {found['good']:.0%}")
    return outcome, films


def distill_config(output_dir: Path, trajectories: Path, seed: int) -> DistillConfig:
    """Return the recipe "distill-demo" with existing trajectories."""
    options = {"output_dir": output_dir, "seed": seed, "checkpoints_total_limit": 1, "trajectories.path": trajectories}
    words = (word for name, value in options.items() for word in (f"--{name}", str(value)))
    return load_config(["--config", "distill-demo", *words], DistillConfig)
