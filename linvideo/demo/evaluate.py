"""Judge converted transformers of the embedded world against their teacher, on the same captions and noise."""

import torch

from linvideo.demo import metrics, teacher, world
from linvideo.evaluation.generate import generate_video
from linvideo.evaluation.velocity import velocity_errors
from linvideo.training import encode_prompts


def evaluate(pipeline, transformers: dict, videos: int) -> tuple[dict[str, dict], dict[str, torch.Tensor]]:
    """Judge every transformer on the same captions and noise.

    Args:
        pipeline: the teacher's; its transformer is the reference of psnr and of the velocity errors.
        transformers: name -> transformer; one is "teacher".
        videos: how many each.

    Returns name -> metrics (see metrics.judge, metrics.psnr and velocity_errors), and name -> videos, float
    [videos, 3, FRAMES, SIZE, SIZE] in [-1, 1].
    """
    numbers = caption_numbers(videos)
    captions = [world.all_captions()[number] for number in numbers]
    shape = (videos, 3, world.FRAMES, world.SIZE, world.SIZE)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(1234)).to(pipeline.device)
    embeddings = encode_prompts(pipeline, world.all_captions())
    outcome, films = {}, {}
    for name, transformer in transformers.items():
        pipeline_of = pipeline if transformer is pipeline.transformer else with_transformer(pipeline, transformer)
        found = generate_video(
            pipeline_of,
            captions,
            negative_prompt="",
            height=world.SIZE,
            width=world.SIZE,
            num_frames=world.FRAMES,
            num_inference_steps=teacher.NUM_INFERENCE_STEPS,
            guidance_scale=teacher.GUIDANCE_SCALE,
            latents=noise,
            output_type="pt",
        )
        films[name] = found.transpose(1, 2).float().cpu() * 2 - 1
        errors = velocity_errors(
            transformer,
            pipeline.transformer,
            noise,
            embeddings.take(numbers, device=noise.device),
            pipeline.scheduler,
            teacher.NUM_INFERENCE_STEPS,
            negative_prompt_embeds=embeddings.take(numbers[:1], torch.tensor([True]), noise.device),
            guidance_scale=teacher.GUIDANCE_SCALE,
        )
        outcome[name] = metrics.judge(films[name], numbers) | {
            "psnr_to_teacher": metrics.psnr(films[name], films["teacher"]) if name != "teacher" else None,
            "own_state_error": errors["own_state_error"],
            "teacher_state_error": errors["teacher_state_error"],
        }
        print(
            f"{name:22s} all words right {outcome[name]['all_right']:.0%}, good {outcome[name]['good']:.0%}, velocity"
            f" error on own states {outcome[name]['own_state_error']:.4f}"
        )
    return outcome, films


def caption_numbers(videos: int) -> torch.Tensor:
    """The captions in a fixed shuffled order, repeated as needed, int64 [videos]."""
    total = len(world.all_captions())
    order = torch.randperm(total, generator=torch.Generator().manual_seed(99))
    return order.repeat(-(-videos // total))[:videos]


def with_transformer(pipeline, transformer):
    """The same pipeline around another transformer."""
    components = pipeline.components | {"transformer": transformer}
    other = type(pipeline)(**components)
    other.set_progress_bar_config(disable=True)
    return other
