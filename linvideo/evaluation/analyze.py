"""Finds out, without training the model, which layers can become linear and how much time that saves.

The feature maps of all layers are fitted to their softmax attention. Then the velocity error of the whole model is
measured with each layer linear by itself, and with the n least sensitive layers linear together, because errors of
layers do not add. Each of these sets is timed in a forward of the whole model on this device.
"""

import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import WanTransformer3DModel

from linvideo.evaluation.latency import Timing, time_call
from linvideo.evaluation.work_folder import WorkFolder
from linvideo.models import attention_types, convert, wan_transformer
from linvideo.models.branches import feature_weights
from linvideo.progress import bar
from linvideo.run.forward_times import remember
from linvideo.run.run_folder import FEATURE_MAPS, IMAGE_CACHE, PROMPT_CACHE
from linvideo.trajectories.atomic_files import read_cached, read_json, write_cached, write_json
from linvideo.trajectories.collect import TrajectoryConfig, collect, latent_shape, open_store, with_flow_shift
from linvideo.trajectories.devices import device_name
from linvideo.trajectories.fingerprint import fingerprint
from linvideo.trajectories.flow import predict_velocity
from linvideo.trajectories.images import add_images, check_images, digest, takes_images
from linvideo.trajectories.prompts import PromptConfig, choose_prompts, encode_prompts
from linvideo.trajectories.store import StateBatch
from linvideo.transfer.selection import lowest
from linvideo.transfer.sensitivity import SensitivityConfig, velocity_error
from linvideo.transfer.warmup import WarmupConfig, attention_output_errors, fit_feature_maps, load_feature_maps
from linvideo.workspace import locked

SUITE = "analyze"  # in request.json
FILES = ("rows.json", "checksums.json", "analysis.json", "report.html", FEATURE_MAPS, PROMPT_CACHE, IMAGE_CACHE)
ALL_SETS = 12  # every n is measured if the model has no more layers than this
TIMED_SECONDS = 1.0  # for which a forward is repeated


@dataclass(frozen=True)
class LayerSet:
    """The model with `layers` linear and the others softmax.

    Args:
        layers: 0-based numbers of the linear layers.
        velocity_error: Mean |u - u_teacher|^2 per element on the teacher's states.
        milliseconds: Time of one forward: median, 20th and 80th percentile.
        speedup: Speedup of the median over that of the stock model.
    """

    layers: list[int]
    velocity_error: float
    milliseconds: Timing
    speedup: float


@dataclass(frozen=True)
class Analysis:
    """The measurements, and the proposal that follows from them.

    Args:
        model: Folder or Hub id of the pipeline; "MODEL" for a pipeline made in memory.
        environment: Device, dtype and versions for which the times hold.
        size: Height, width and num_frames of the timed video, with batch 1.
        tokens: Number of tokens of the timed video.
        states: Number of teacher states over which the errors are averaged.
        velocity_square: Mean |u_teacher|^2 per element on these states, for comparison with the velocity errors.
        floor: Velocity error without linear layers, which comes from the rounding of stored states.
        attention_output_errors: Error |linear - softmax|^2 / |softmax|^2 of the attention output after the fit, per
            layer.
        sensitivity: Velocity error with only this layer linear, per layer.
        milliseconds: Time of one forward of the stock model.
        sets: Sets of the n least sensitive layers for increasing n, up to all layers.
        wanted_speedup: Speedup that the user requested; None means no proposal.
        proposal: Set with the smallest velocity error among those with the wanted speedup; None if there is no such
            set, or no speedup was requested.
    """

    model: str
    environment: dict[str, str]
    size: list[int]
    tokens: int
    states: int
    velocity_square: float
    floor: float
    attention_output_errors: dict[int, float]
    sensitivity: dict[int, float]
    milliseconds: Timing
    sets: list[LayerSet]
    wanted_speedup: float | None
    proposal: LayerSet | None

    @property
    def milliseconds_saved(self) -> float:
        """Milliseconds that each linear layer saves, negative if linear attention is slower.

        All blocks have the same shape, so one figure holds for all.
        """
        return (self.milliseconds.median - self.sets[-1].milliseconds.median) / len(self.sensitivity)


def analyze(
    pipeline: Any,
    captions: list[str],
    output_dir: str | Path,
    trajectories: TrajectoryConfig,
    warmup: WarmupConfig | None = None,
    sensitivity: SensitivityConfig | None = None,
    negative_prompt: str = "",
    timed_size: tuple[int, int, int] | None = None,
    speedup: float | None = 1.3,
    seed: int = 0,
    overwrite: bool = False,
    progress: bool = True,
    images: Sequence[Any] | None = None,
) -> Analysis:
    """Measure everything on the pipeline's device. After an interruption, the same call continues.

    With the settings, captions and images of a training run, the errors are those of that run. After a finished
    analysis, the same call with another `speedup` measures only what is new.

    Args:
        pipeline: Stock WanPipeline or WanImageToVideoPipeline with one transformer. Its weights are shared, not
            changed; its encoders are in CPU memory afterwards. A backend chosen with set_attention_backend is used for
            the softmax layers.
        captions: Captions of the sampled videos.
        output_dir: Folder for analysis.json, for feature_maps.safetensors with the fitted maps of all layers, and for
            everything needed to continue: request.json, rows.json, checksums.json, prompt embeddings, image conditions
            and trajectories/.
        trajectories: Settings with which the teacher is sampled.
        warmup: Settings of the fit; None means the defaults.
        sensitivity: Number and batch size of the states on which errors are measured; None means the defaults.
        negative_prompt: Negative prompt of the sampler.
        timed_size: Height, width and num_frames of the timed video; None means the size of the trajectories.
        speedup: Speedup of one forward that the proposal has to reach; None means no proposal.
        seed: Seed of all random draws.
        overwrite: Whether to delete what an earlier analysis left in output_dir, and start again.
        progress: Whether to show progress bars.
        images: PIL images or image files of an image-to-video pipeline, one for each caption.

    Raises:
        ValueError: The pipeline is of another kind, images do not suit it or cannot be read, sizes do not fit it, the
            speedup is not above 1, output_dir holds something else or is in use, or an error is not finite, which can
            happen in float16.
    """
    warmup, sensitivity = warmup or WarmupConfig(), sensitivity or SensitivityConfig()
    captions, images = choose_prompts(None, captions, images)
    base, size = _check(pipeline, images, trajectories, sensitivity, timed_size, speedup)
    pipeline = with_flow_shift(pipeline, trajectories.flow_shift)
    # mixed layers can run as softmax or as linear; their r is not used here
    student = convert(base, "all", mode="mixed", copy=False)
    environment = {
        "device": device_name(base.device),
        "dtype": str(base.dtype).removeprefix("torch."),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
    }
    request = {"suite": SUITE, "model": fingerprint(base), "captions": captions, "negative_prompt": negative_prompt}
    request |= {"trajectories": asdict(trajectories), "warmup": asdict(warmup), "sensitivity": asdict(sensitivity)}
    request |= {"seed": seed, "timed_size": list(size), **environment}
    if takes_images(pipeline):
        request["images"] = [digest(image) for image in images]
    with locked(output_dir):
        if overwrite:
            _start_again(Path(output_dir), request)
        work = WorkFolder(output_dir, request)

        texts = PromptConfig(negative_prompt=negative_prompt)
        prompts = encode_prompts(pipeline, captions, texts, work.path / PROMPT_CACHE, base.device)
        add_images(prompts, pipeline, images, trajectories, work.path / IMAGE_CACHE, base.device)
        for part in (pipeline.text_encoder, getattr(pipeline, "image_encoder", None)):
            if part is not None:
                part.to("cpu")  # Wan's text encoder is 11 GB
        store = open_store(trajectories.path or work.path / "trajectories", pipeline, prompts, trajectories, seed)
        store.verify()
        collect(store, pipeline, prompts, progress)

        def draw(positions: range, *name: int | str) -> StateBatch:
            return store.draw(positions, seed, *name, prompts=prompts, device=base.device)

        def states() -> Iterator[StateBatch]:
            count, size = sensitivity.num_states, sensitivity.batch_size
            return (draw(range(start, min(start + size, count)), "held") for start in range(0, count, size))

        maps = work.path / FEATURE_MAPS
        if read_cached(maps, "maps") is not None:
            load_feature_maps(student, maps)
        else:
            steps = bar(range(warmup.max_train_steps), progress, desc="warm-up")
            batches = (draw(range(warmup.batch_size), "warmup", step) for step in steps)
            fit_feature_maps(student, batches, warmup.learning_rate)
            write_cached(maps, feature_weights(student), "maps")

        shape = latent_shape(pipeline, _sized(trajectories, size))
        measured = _Measurements(work, base, student, states, _forward_inputs(base, prompts, shape))
        layers = measured.layers
        output_errors = measured.attention_output_errors()
        floor = measured.error([])
        alone = {layer: measured.error([layer]) for layer in bar(layers, progress, desc="sensitivity")}
        stock = measured.timing([])
        tokens = math.prod(shape[1:]) // math.prod(base.config.patch_size)
        remember(base.config, tokens, base.dtype, base.device, stock.median / 1000, "linvideo analyze")

        def speedup_of(number: int) -> float:
            return stock.median / measured.timing(lowest(alone, number)).median

        def measured_set(number: int) -> LayerSet:
            chosen = lowest(alone, number)
            return LayerSet(chosen, measured.error(chosen), measured.timing(chosen), speedup_of(number))

        enough = [] if speedup is None else smallest_number(speedup_of, speedup, len(layers))
        numbers = sorted({*set_sizes(len(layers)), *enough})
        sets = [measured_set(number) for number in bar(numbers, progress, desc="sets")]
        analysis = Analysis(
            model=pipeline.config.get("_name_or_path") or "MODEL",
            environment=environment,
            size=list(size),
            tokens=tokens,
            states=sensitivity.num_states,
            velocity_square=measured.velocity_square(),
            floor=floor,
            attention_output_errors=dict(zip(layers, output_errors, strict=True)),
            sensitivity=alone,
            milliseconds=stock,
            sets=sets,
            wanted_speedup=speedup,
            proposal=propose(sets, speedup),
        )
        write_json(work.path / "analysis.json", to_dict(analysis))
        return analysis


def propose(sets: list[LayerSet], speedup: float | None) -> LayerSet | None:
    """Return the set with the smallest velocity error among those with this speedup, and the first of equal ones."""
    fast = [] if speedup is None else [chosen for chosen in sets if chosen.speedup >= speedup]
    return min(fast, key=lambda chosen: chosen.velocity_error, default=None)


def set_sizes(num_layers: int) -> list[int]:
    """Return the numbers of linear layers to measure: all for a small model, otherwise eight evenly spaced ones."""
    if num_layers <= ALL_SETS:
        return list(range(1, num_layers + 1))
    return [round(num_layers * part / 8) for part in range(1, 9)]


def smallest_number(speedup_of: Callable[[int], float], wanted: float, num_layers: int) -> list[int]:
    """Find the smallest number of linear layers that reaches the wanted speedup, in a list; [] if all layers do not.

    The search is a bisection, because the speedup rises with the number of linear layers.
    """
    if speedup_of(num_layers) < wanted:
        return []
    low, high = 0, num_layers
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if speedup_of(middle) >= wanted else (middle, high)
    return [high]


def to_dict(analysis: Analysis) -> dict[str, Any]:
    """Return the contents of analysis.json: the fields, and milliseconds_saved_per_layer."""
    return asdict(analysis) | {"milliseconds_saved_per_layer": analysis.milliseconds_saved}


class _Measurements:
    """Measurements that are each taken once and stored in the work folder."""

    def __init__(self, work: WorkFolder, base, student, states: Callable, inputs: tuple):
        self.work, self.base, self.student, self.states, self.inputs = work, base, student, states, inputs
        self.layers = list(range(len(base.blocks)))

    def once(self, what: str, layers: list[int], measure: Callable[[], Any]) -> Any:
        for row in self.work.rows:
            if (row["what"], row["layers"]) == (what, layers):
                return row["value"]
        value = measure()
        if not all(map(math.isfinite, value if isinstance(value, list | tuple) else [value])):
            raise ValueError(f"the {what} of layers {layers} is not finite in {self.base.dtype}; use another dtype")
        self.work.add({"what": what, "layers": layers, "value": value})
        return value

    def error(self, layers: list[int]) -> float:
        """Return the velocity error with these layers linear."""

        def measure() -> float:
            with self.linear(layers):
                return velocity_error(self.student, self.states())

        return self.once("velocity error", layers, measure)

    @torch.no_grad()
    def timing(self, layers: list[int]) -> Timing:
        """Return the time of a forward with these layers linear; without any, that of the stock model."""

        def measure() -> Timing:
            model = self.student if layers else self.base
            with self.linear(layers):
                return time_call(lambda: predict_velocity(model, *self.inputs), self.base.device, TIMED_SECONDS)

        return Timing(*self.once("milliseconds", layers, measure))

    def attention_output_errors(self) -> list[float]:
        """Return the error of each layer, averaged over the states."""

        def measure() -> list[float]:
            batches = [(attention_output_errors(self.student, batch), len(batch.x)) for batch in self.states()]
            count = sum(size for _, size in batches)
            return [sum(float(errors[i]) * size for errors, size in batches) / count for i in self.layers]

        return self.once("attention output error", self.layers, measure)

    def velocity_square(self) -> float:
        def measure() -> float:
            return torch.cat([batch.u.cpu() for batch in self.states()]).square().mean().item()

        return self.once("mean square velocity", [], measure)

    def linear(self, layers: list[int]):
        return attention_types(self.student, dict.fromkeys(self.layers, "softmax") | dict.fromkeys(layers, "linear"))


def _forward_inputs(base: torch.nn.Module, prompts: Any, shape: tuple[int, ...]) -> tuple:
    """Return x, timestep and conditions for predict_velocity, for one video with latents of this shape."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, *shape, generator=generator).to(base.device)
    conditions = prompts.conditions(torch.tensor([0]), device=base.device)
    # the latents of the image have the sampled size; noise of the timed size takes the same time
    if (latents := conditions.latents) is not None:
        noise = torch.randn(1, latents.shape[1], *shape[1:], generator=generator)
        conditions = replace(conditions, latents=noise.to(latents))
    return x, torch.tensor(500.0, device=base.device), conditions


def _check(
    pipeline: Any,
    images: list[Any],
    trajectories: TrajectoryConfig,
    sensitivity: SensitivityConfig,
    timed_size: tuple[int, int, int] | None,
    speedup: float | None,
) -> tuple[torch.nn.Module, tuple[int, int, int]]:
    """Return the stock transformer and the timed size; see `analyze` for what is refused."""
    base = wan_transformer(pipeline)
    if type(base) is not WanTransformer3DModel:
        raise ValueError(f"expected a stock Wan pipeline with softmax layers, got a {type(base).__name__}")
    if getattr(pipeline, "transformer_2", None) is not None:
        raise ValueError("expected a pipeline with one transformer, got one with two experts")
    check_images(pipeline, images)
    if speedup is not None and not speedup > 1:
        raise ValueError(f"speedup must be more than 1, or None for no proposal, got {speedup}")
    if not sensitivity.num_states:
        raise ValueError("sensitivity.num_states must be at least 1, got 0")
    own = (trajectories.height, trajectories.width, trajectories.num_frames)
    for size in (own, timed_size or own):
        latent_shape(pipeline, _sized(trajectories, size))
    return base, timed_size or own


def _sized(trajectories: TrajectoryConfig, size: tuple[int, int, int]) -> TrajectoryConfig:
    return replace(trajectories, **dict(zip(("height", "width", "num_frames"), size, strict=True)))


def _start_again(folder: Path, request: dict[str, Any]) -> None:
    """Delete what an earlier analysis has written into `folder`, if it is the folder of an analysis."""
    asked = folder / "request.json"
    stored = read_json(asked) if asked.is_file() else None
    if not isinstance(stored, dict) or stored.get("suite") != SUITE:
        return
    for name in FILES:
        (folder / name).unlink(missing_ok=True)
    shutil.rmtree(folder / "trajectories", ignore_errors=True)
    write_json(asked, request)  # replaced last: a kill in between leaves a folder that can be overwritten again
