"""Judge converted transformers of an embedded world against their teacher, on the same captions and noise."""

import torch

from linvideo.demo import judge
from linvideo.demo.teacher import SETTINGS, tokens
from linvideo.demo.world import WORLDS, World
from linvideo.evaluation.velocity import velocity_errors
from linvideo.models.generate import generate_video
from linvideo.trajectories import encode_prompts

TOKENS_AT_ONCE = 2**16  # in a batch of videos: 512 videos of the small world, 16 of the large one


def evaluate(
    pipeline, transformers: dict, videos: int, world: World = WORLDS["small"], seed: int = 0
) -> tuple[dict[str, dict], dict[str, torch.Tensor]]:
    """Judge every transformer on the same captions and noise.

    Args:
        pipeline: The teacher's pipeline. Its transformer is the reference of PSNR and of the velocity errors.
        transformers: Name -> transformer; one of the names is "teacher".
        videos: The number of videos of each transformer.
        world: The world that the teacher was trained on.
        seed: The seed of the captions and the noise.

    Returns:
        Name -> metrics (see judge.judge, judge.psnr and velocity_errors), and name -> videos, float
        [videos, 3, frames, size, size] in [-1, 1].
    """
    settings = SETTINGS[world.name]
    captions = world.evaluation_captions(videos, seed)
    noise = start_noise(world, videos, seed).to(pipeline.device)
    # Every caption is encoded once, also where they repeat.
    distinct = {caption: number for number, caption in enumerate(dict.fromkeys(captions))}
    embeddings = encode_prompts(pipeline, list(distinct))
    numbers = torch.tensor([distinct[caption] for caption in captions])
    outcome, films = {}, {}
    for name, transformer in transformers.items():
        pipeline_of = pipeline if transformer is pipeline.transformer else with_transformer(pipeline, transformer)
        films[name] = sample_videos(pipeline_of, captions, noise, world)
        errors = velocity_errors(
            transformer,
            pipeline.transformer,
            noise,
            embeddings.take(numbers, device=noise.device),
            pipeline.scheduler,
            settings.num_inference_steps,
            negative_prompt_embeds=embeddings.take(numbers[:1], torch.tensor([True]), noise.device),
            guidance_scale=settings.guidance_scale,
        )
        outcome[name] = judge.judge(films[name], captions, world) | {
            "psnr_to_teacher": judge.psnr(films[name], films["teacher"]) if name != "teacher" else None,
            "own_state_error": errors["own_state_error"],
            "teacher_state_error": errors["teacher_state_error"],
        }
        print(
            f"{name:22s} all words right {outcome[name]['all_right']:.0%}, good {outcome[name]['good']:.0%}, velocity"
            f" error on own states {outcome[name]['own_state_error']:.4f}"
        )
    return outcome, films


def start_noise(world: World, videos: int, seed: int = 0) -> torch.Tensor:
    """Return the noise that sampling starts from, float [videos, 3, frames, size, size]."""
    shape = (videos, 3, world.frames, world.size, world.size)
    return torch.randn(shape, generator=torch.Generator().manual_seed(1234 + seed))


def sample_videos(
    pipeline,
    captions: list[str],
    noise: torch.Tensor,
    world: World,
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
) -> torch.Tensor:
    """Return a video for each caption, sampled from its noise: float [B, 3, frames, size, size] in [-1, 1] on the CPU.

    Sampler settings that are None are the world's own.
    """
    settings = SETTINGS[world.name]
    batch = max(1, TOKENS_AT_ONCE // tokens(world))
    videos = []
    for first in range(0, len(captions), batch):
        found = generate_video(
            pipeline,
            captions[first : first + batch],
            negative_prompt="",
            height=world.size,
            width=world.size,
            num_frames=world.frames,
            num_inference_steps=num_inference_steps or settings.num_inference_steps,
            guidance_scale=settings.guidance_scale if guidance_scale is None else guidance_scale,
            latents=noise[first : first + batch],
            output_type="pt",
        )
        videos.append(found.transpose(1, 2).float().cpu() * 2 - 1)
    return torch.cat(videos)


def with_transformer(pipeline, transformer):
    """Return the same pipeline around another transformer."""
    components = pipeline.components | {"transformer": transformer}
    other = type(pipeline)(**components)
    other.set_progress_bar_config(disable=True)
    return other
