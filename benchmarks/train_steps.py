"""The train suite: one training step of selective transfer and one of ADM, with the fused kernels and with linear
attention in PyTorch operations. The code is the trainer's own; weights, states and prompts are random."""

import itertools
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from unittest import mock

import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from benchmarks import wan as models
from benchmarks.measure import attempt, dtype_name, timed
from benchmarks.shapes import WanModel
from linvideo.models import convert, finalize
from linvideo.models.branches import gates
from linvideo.ops.reference import linear_attn_reference
from linvideo.planning.known import KNOWN
from linvideo.planning.memory import Layout, stage_memory
from linvideo.planning.sizes import read_sizes
from linvideo.run.optimizer import StudentOptimizer
from linvideo.trajectories.collect import TrajectoryConfig
from linvideo.trajectories.flow import sampler_grid
from linvideo.trajectories.prompts import PromptEmbeddings
from linvideo.trajectories.store import TrajectoryStore
from linvideo.transfer.gradient_step import GradientStep
from linvideo.transfer.selection import add_penalties
from linvideo.transfer.train_config import TrainConfig

STEPS = {"selective transfer": "mse", "ADM": "adm"}
ATTENTION = ("fused", "eager")
NUM_INFERENCE_STEPS = 50


def rows_of(name: str, device: str, dtype: torch.dtype, wan: WanModel, attempt: Callable = attempt) -> Iterator[dict]:
    """Yield a row for each step, with fused and with eager linear attention, under autocast to `dtype`."""
    with tempfile.TemporaryDirectory() as folder:
        config = TrainConfig(
            output_dir=folder,
            pretrained_model_name_or_path=name,
            train_batch_size=1,
            gradient_checkpointing=True,
            mixed_precision="bf16" if dtype == torch.bfloat16 else "no",
        )
        for attention, step in itertools.product(ATTENTION, STEPS):
            row = {"suite": "train", "model": name, "dtype": dtype_name(dtype), "step": step}
            row |= {"attention": attention, "tokens": wan.tokens, "layers": wan.layers}
            row |= planned_mib(step, wan, config) if device == "cuda" else {}
            yield attempt(row, lambda s=step, a=attention: _time_step(s, a, wan, config, device, dtype))


def _time_step(step: str, attention: str, wan: WanModel, config: TrainConfig, device: str, dtype: torch.dtype) -> dict:
    with eager_attention() if attention == "eager" else nullcontext():
        return timed(training_step(step, wan, config, device, dtype), device)


def planned_mib(step: str, wan: WanModel, config: TrainConfig) -> dict[str, float]:
    """Return the total memory that `linvideo plan` predicts for the step; {} for a model that it doesn't know."""
    name = next((name for name, known in KNOWN.items() if known == wan.config), None)
    if name is None:
        return {}
    video = TrajectoryConfig(height=8 * wan.latents[2], width=8 * wan.latents[3], num_frames=4 * wan.latents[1] - 3)
    selection = replace(config.selection, objective="mse", num_linear_layers=wan.linear_layers[1])
    objective = replace(config.objective, name=STEPS[step])
    states = replace(config.sensitivity, num_states=0)  # only the step, without the evaluation at the end of the stage
    config = replace(config, selection=selection, objective=objective, sensitivity=states)
    layout = Layout(gradient_checkpointing=True, autocast=config.mixed_precision == "bf16")
    stage = "mixed stage" if step == "selective transfer" else "fine-tuning"
    parts = stage_memory(read_sizes(name, video), config, layout, stage)
    return {"planned_mib": round(sum(parts.values()) / 2**20, 1)}


def training_step(
    step: str, wan: WanModel, config: TrainConfig, device: str, dtype: torch.dtype
) -> Callable[[], float]:
    """Return a call that makes one optimizer step and returns the norm of the gradient.

    All layers are mixed for the transfer; for ADM, as many layers as in the paper are linear.
    """
    teacher = models.build(wan, device, dtype, "softmax")
    student = convert(teacher, "all", mode="mixed", r_init=config.selection.r_init)
    if step == "ADM":
        finalize(student, range(wan.linear_layers[1]))
    student.float().requires_grad_(True).train().enable_gradient_checkpointing()
    text = torch.randn(2, wan.text_tokens, wan.text_dim)
    prompts = PromptEmbeddings(text, torch.randn_like(text[:1]))
    grid = sampler_grid(FlowMatchEulerDiscreteScheduler(shift=3.0), NUM_INFERENCE_STEPS)
    objective = replace(config.objective, name=STEPS[step])
    data = (_store(f"{config.output_dir}/{step}", wan, grid[0], config), prompts, grid)
    gradient = GradientStep(student, teacher, *data, config, step, objective)
    optimizer = StudentOptimizer(student, config.optimizer, 1000, config.selection.r_learning_rate)
    named_r, count = list(gates(student).values()), iter(range(10**9))

    def run():
        number = next(count)
        gradient(number)
        if named_r:
            add_penalties(named_r, wan.linear_layers[1], config.selection, number)
        norm = optimizer.step()
        if norm is None:  # such a step skips the optimizer and would look faster
            raise ArithmeticError("a gradient is not finite")
        return norm

    return run


@contextmanager
def eager_attention():
    """Make linear branches compute in plain PyTorch operations inside the block."""
    from linvideo.nn import linear_attention

    def eager(q, k, v, mix=None, **options):
        if torch.is_autocast_enabled(q.device.type):
            dtype = torch.get_autocast_dtype(q.device.type)
            q, k, v = (x.to(dtype) for x in (q, k, v))
            mix = None if mix is None else (mix[0].to(dtype), mix[1])
        return linear_attn_reference(q, k, v, mix=mix, **options)

    with mock.patch.object(linear_attention, "linear_attn", eager):
        yield


def _store(path: str, wan: WanModel, timesteps: torch.Tensor, config: TrainConfig) -> TrajectoryStore:
    """Make a store of two trajectories with two random states each."""
    request = {"num_trajectories": 2, "shard_size": 2, "states_per_trajectory": 2}
    request |= {name: getattr(config.trajectories, name) for name in ("guidance_scale", "negative_probability")}
    store = TrajectoryStore(path, request)
    for number in store.missing_shards():
        shard = {name: torch.randn(2, 2, *wan.latents) for name in ("x", "u")}
        shard |= {"timestep": timesteps[:2].expand(2, 2).clone(), "negative": torch.zeros(2, 2, dtype=torch.bool)}
        store.write_shard(number, shard | {"prompt": torch.tensor([0, 1]), "sample": torch.randn(2, *wan.latents)})
    return store
