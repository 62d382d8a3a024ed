"""The two experts of Wan 2.2: the pipeline's `transformer` at and above a boundary timestep (high noise), and
`transformer_2` below it (low noise).

A run trains one of them, on states from its range only; two runs, one after the other, convert both. A pipeline with
one transformer is the case without a boundary.
"""

from dataclasses import dataclass
from typing import Any

import torch

from linvideo.trajectories.flow import NUM_TRAIN_TIMESTEPS, LowNoise

EXPERTS = ("high_noise", "low_noise")


@dataclass(frozen=True)
class Expert:
    """The transformer that a run trains.

    Args:
        name: Name "high_noise" or "low_noise"; None for a pipeline's only transformer.
        boundary_timestep: Timestep (1000 t) below which the low-noise expert takes over; None without experts.
    """

    name: str | None = None
    boundary_timestep: float | None = None

    @property
    def component(self) -> str:
        """The name of this transformer in the pipeline."""
        return "transformer_2" if self.name == "low_noise" else "transformer"

    @property
    def t_min(self) -> float:
        """The lowest t in its range. Sampling decreases t, so that nothing ever leaves a range at its upper end."""
        return self.boundary_timestep / NUM_TRAIN_TIMESTEPS if self.name == "high_noise" else 0.0

    def steps(self, timesteps: torch.Tensor) -> range:
        """Return its steps, possibly none, in a sampler with these decreasing `timesteps` [n]."""
        if self.name is None:
            return range(len(timesteps))
        switch = int((timesteps >= self.boundary_timestep).sum())
        return range(switch) if self.name == "high_noise" else range(switch, len(timesteps))


def choose_expert(pipeline: Any, name: str | None, guidance_scale_2: float | None = None) -> Expert:
    """Return the expert `name` of a pipeline in memory.

    Raises:
        ValueError: The pipeline has two experts and no name is given, or it has one transformer and a name or a
            guidance_scale_2 is given, or it has two experts without a boundary_ratio between them.
    """
    if getattr(pipeline, "transformer_2", None) is None:
        for option, value in (("expert", name), ("trajectories.guidance_scale_2", guidance_scale_2)):
            if value is not None:
                raise ValueError(f"{option} must be None for a pipeline with one transformer, got {value!r}")
        return Expert()
    if name is None:
        raise ValueError(f"expert must be {' or '.join(EXPERTS)} for a pipeline with two experts, got None")
    if pipeline.config.boundary_ratio is None:
        raise ValueError("expected a pipeline with two experts to have a boundary_ratio, got None")
    return Expert(name, pipeline.config.boundary_ratio * pipeline.scheduler.config.num_train_timesteps)


# The request of a trajectory store holds all of this; without experts it has none of these keys.


def stored_expert(request: dict[str, Any]) -> Expert:
    """Return the expert whose states a store holds."""
    return Expert(request.get("expert"), request.get("boundary_timestep"))


def stored_guidance(request: dict[str, Any]) -> float:
    """Return the guidance scale in the range of the store's expert; 1 if WanPipeline does not guide."""
    if request["guidance_scale"] <= 1:  # the first scale decides for both experts
        return 1.0
    return request["guidance_scale_2" if stored_expert(request).name == "low_noise" else "guidance_scale"]


def low_noise_sampler(pipeline: Any, request: dict[str, Any]) -> LowNoise | None:
    """Return the model and guidance that sampling for this store uses below the boundary; None without experts."""
    if stored_expert(request).name is None:
        return None
    return LowNoise(pipeline.transformer_2, request["boundary_timestep"], request["guidance_scale_2"])
