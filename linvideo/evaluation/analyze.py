"""Finds out, without training the model, which layers can become linear or window layers and how much time that saves.

The feature maps of all layers are fitted to their softmax attention, for each kind of layer. Then the velocity error of
the whole model is measured with each layer converted by itself, and with sets of layers converted together, because
errors of layers do not add. Each of these sets is timed in a forward of the whole model on this device.
"""

import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import WanTransformer3DModel

from linvideo.evaluation.latency import Timing, time_call
from linvideo.evaluation.work_folder import WorkFolder
from linvideo.models import attention_types, convert, wan_transformer
from linvideo.models.attention import window_backend
from linvideo.models.branches import feature_weights
from linvideo.nn import Window
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
from linvideo.transfer.sensitivity import SensitivityConfig, velocity_error
from linvideo.transfer.warmup import (
    WarmupConfig,
    attention_output_errors,
    fit_feature_maps,
    load_feature_maps,
    start_gains,
)
from linvideo.workspace import locked

SUITE = "analyze"  # in request.json
MAPS = {"linear": FEATURE_MAPS, "window": "window_maps.safetensors"}  # kind of layer -> file of its fitted maps
FILES = ("rows.json", "checksums.json", "analysis.json", "report.html", *MAPS.values(), PROMPT_CACHE, IMAGE_CACHE)
ALL_SETS = 12  # every set of the path is measured if there are no more than this
TIMED_SECONDS = 1.0  # for which a forward is repeated


@dataclass(frozen=True)
class LayerSet:
    """The model with some linear layers and some window layers. The others are softmax.

    Args:
        layers: 0-based numbers of the linear layers.
        velocity_error: Mean |u - u_teacher|^2 per element on the teacher's states.
        milliseconds: Time of one forward: median, 20th and 80th percentile.
        speedup: Speedup of the median over that of the stock model.
        window_layers: 0-based numbers of the window layers.
    """

    layers: list[int]
    velocity_error: float
    milliseconds: Timing
    speedup: float
    window_layers: list[int] = field(default_factory=list)

    @property
    def by_kind(self) -> dict[str, list[int]]:
        """The converted layers, {kind: numbers}, without kinds that no layer has."""
        return {kind: own for kind, own in (("linear", self.layers), ("window", self.window_layers)) if own}


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
        floor: Velocity error without converted layers, which comes from the rounding of stored states.
        attention_output_errors: Error |linear - softmax|^2 / |softmax|^2 of the attention output after the fit, per
            layer. It is empty if no linear layers were requested.
        sensitivity: Velocity error with only this layer linear, per layer. It may be empty, too.
        milliseconds: Time of one forward of the stock model.
        sets: Sets along the path (see `path`), and those in which all layers are of one kind.
        wanted_speedup: Speedup that the user requested; None means no proposal.
        proposal: Set with the smallest velocity error among those with the wanted speedup; None if there is no such
            set, or no speedup was requested.
        window: Settings of the window layers; None if none were requested.
        softmax_pairs: Share of the pairs of tokens that the softmax of a window layer keeps in the timed video; None if
            no window layers were requested.
        window_attention_output_errors: Counterpart of attention_output_errors for window layers.
        window_sensitivity: Counterpart of sensitivity for window layers.
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
    window: dict[str, Any] | None = None
    softmax_pairs: float | None = None
    window_attention_output_errors: dict[int, float] = field(default_factory=dict)
    window_sensitivity: dict[int, float] = field(default_factory=dict)

    @property
    def kinds(self) -> dict[str, tuple[dict[int, float], dict[int, float]]]:
        """The attention output errors and the sensitivity of each measured kind of layer."""
        own = {"linear": (self.attention_output_errors, self.sensitivity)}
        own["window"] = self.window_attention_output_errors, self.window_sensitivity
        return {kind: errors for kind, errors in own.items() if errors[0]}

    @property
    def num_layers(self) -> int:
        return len(next(iter(self.kinds.values()))[0])

    def whole(self, kind: str) -> LayerSet | None:
        """Return the set in which all layers are of this kind, or None if the kind was not measured."""
        return next((chosen for chosen in self.sets if len(chosen.by_kind.get(kind, [])) == self.num_layers), None)

    def saved(self, kind: str) -> float | None:
        """Return the milliseconds that each layer of a kind saves, negative if the kind is slower than softmax.

        All blocks have the same shape, so one figure holds for all layers. None if the kind was not measured.
        """
        whole = self.whole(kind)
        return None if whole is None else (self.milliseconds.median - whole.milliseconds.median) / self.num_layers


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
    kinds: Sequence[str] = ("linear",),
    window: Mapping[str, Any] | Window | None = None,
) -> Analysis:
    """Measure everything on the pipeline's device. After an interruption, the same call continues.

    With the settings, captions and images of a training run, the errors are those of that run. After a finished
    analysis, the same call with another `speedup` measures only what is new.

    Args:
        pipeline: Stock WanPipeline or WanImageToVideoPipeline with one transformer. Its weights are shared, not
            changed; its encoders are in CPU memory afterwards. A backend chosen with set_attention_backend is used for
            the softmax layers.
        captions: Captions of the sampled videos.
        output_dir: Folder for analysis.json, for feature_maps.safetensors and window_maps.safetensors with the fitted
            maps of all layers as linear and as window layers, and for everything needed to continue: request.json,
            rows.json, checksums.json, prompt embeddings, image conditions and trajectories/.
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
        kinds: Kinds of layers to measure in place of softmax: "linear", "window" or both.
        window: Settings of window layers, as in `linvideo.convert`; None means the defaults.

    Raises:
        ValueError: The pipeline is of another kind, images do not suit it or cannot be read, sizes do not fit it, the
            speedup is not above 1, the kinds or the window settings are unknown, window layers do not have the
            pipeline's attention backend, output_dir holds something else or is in use, or an error is not finite, which
            can happen in float16.
    """
    kinds, window = check_kinds(kinds, window)
    warmup, sensitivity = warmup or WarmupConfig(), sensitivity or SensitivityConfig()
    captions, images = choose_prompts(None, captions, images)
    base, size = _check(pipeline, images, trajectories, sensitivity, timed_size, speedup)
    pipeline = with_flow_shift(pipeline, trajectories.flow_shift)
    students = {kind: _student(base, kind, window) for kind in kinds}
    environment = {
        "device": device_name(base.device),
        "dtype": str(base.dtype).removeprefix("torch."),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
    }
    request = {"suite": SUITE, "model": fingerprint(base), "captions": captions, "negative_prompt": negative_prompt}
    request |= {"trajectories": asdict(trajectories), "warmup": asdict(warmup), "sensitivity": asdict(sensitivity)}
    request |= {"seed": seed, "timed_size": list(size), **environment}
    if kinds != ("linear",):  # so that analyses of earlier versions continue
        request["kinds"] = list(kinds)
    if window is not None:
        request["window"] = window.settings()
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

        for kind, student in students.items():
            maps = work.path / MAPS[kind]
            if read_cached(maps, "maps") is not None:
                load_feature_maps(student, maps)
            else:
                steps = bar(range(warmup.max_train_steps), progress, desc=_titled("warm-up", kind, kinds))
                batches = (draw(range(warmup.batch_size), "warmup", step) for step in steps)
                if kind == "window":
                    start_gains(student, draw(range(warmup.batch_size), "warmup", "gains"))
                fit_feature_maps(student, batches, warmup.learning_rate)
                write_cached(maps, feature_weights(student), "maps")

        shape = latent_shape(pipeline, _sized(trajectories, size))
        measured = _Measurements(work, base, students, states, _forward_inputs(base, prompts, shape))
        layers = measured.layers
        output_errors = {kind: measured.attention_output_errors(kind) for kind in kinds}
        floor = measured.error({})
        alone: dict[str, dict[int, float]] = {}
        for kind in kinds:
            each = bar(layers, progress, desc=_titled("sensitivity", kind, kinds))
            alone[kind] = {layer: measured.error({layer: kind}) for layer in each}
        stock = measured.timing({})
        tokens = math.prod(shape[1:]) // math.prod(base.config.patch_size)
        remember(base.config, tokens, base.dtype, base.device, stock.median / 1000, "linvideo analyze")

        def speedup_of(chosen: dict[int, str]) -> float:
            return stock.median / measured.timing(chosen).median

        def measured_set(chosen: dict[int, str]) -> LayerSet:
            linear, windows = (_layers_of(kind, chosen) for kind in ("linear", "window"))
            return LayerSet(linear, measured.error(chosen), measured.timing(chosen), speedup_of(chosen), windows)

        whole = {kind: dict.fromkeys(layers, kind) for kind in kinds}
        along = path(alone, {kind: stock.median - measured.timing(whole[kind]).median for kind in kinds}, floor)
        enough = []
        if speedup is not None:
            enough = smallest_number(lambda number: speedup_of(along[number - 1]), speedup, len(along))
        chosen = [along[number - 1] for number in sorted({*set_sizes(len(along)), *enough})]
        chosen += [every for every in whole.values() if every not in chosen]
        sets = [measured_set(one) for one in bar(chosen, progress, desc="sets")]
        analysis = Analysis(
            model=pipeline.config.get("_name_or_path") or "MODEL",
            environment=environment,
            size=list(size),
            tokens=tokens,
            states=sensitivity.num_states,
            velocity_square=measured.velocity_square(),
            floor=floor,
            attention_output_errors=output_errors.get("linear", {}),
            sensitivity=alone.get("linear", {}),
            milliseconds=stock,
            sets=sets,
            wanted_speedup=speedup,
            proposal=propose(sets, speedup),
            window=None if window is None else window.settings(),
            softmax_pairs=None if window is None else window.softmax_pairs(shape[1] // base.config.patch_size[0]),
            window_attention_output_errors=output_errors.get("window", {}),
            window_sensitivity=alone.get("window", {}),
        )
        write_json(work.path / "analysis.json", to_dict(analysis))
        return analysis


def check_kinds(
    kinds: Sequence[str], window: Mapping[str, Any] | Window | None
) -> tuple[tuple[str, ...], Window | None]:
    """Return the kinds in the order of MAPS, and the settings of window layers if there are any.

    Raises:
        ValueError: A kind is unknown or named twice, or there is none; or window settings are unknown, or come without
            the kind "window".
    """
    if isinstance(kinds, str) or not kinds or len(set(kinds)) != len(kinds) or not set(kinds) <= MAPS.keys():
        raise ValueError(f"kinds must be a list of {' and '.join(MAPS)}, got {kinds!r}")
    if "window" in kinds:
        window = window if isinstance(window, Window) else Window.of(window or {})
    elif window is not None:
        raise ValueError(f'window settings go with the kind "window" only, got kinds {", ".join(kinds)}')
    return tuple(kind for kind in MAPS if kind in kinds), window


def path(errors: Mapping[str, Mapping[int, float]], saved: Mapping[str, float], floor: float) -> list[dict[int, str]]:
    """Return sets of converted layers, {layer: kind}, from a single layer up to all layers of the fastest kind.

    Each set changes one layer of the set before to a faster kind, the one whose error alone rises least for the time
    saved. With one kind, that is the order of sensitivity. If no kind is faster than softmax, all count as equally
    fast.

    Args:
        errors: Velocity error with only this layer of this kind, {kind: {layer: error}}.
        saved: Time that a forward saves with all layers of this kind, {kind: time}.
        floor: Velocity error with softmax in all layers.
    """
    if max(saved.values()) <= 0:
        saved = dict.fromkeys(saved, 1.0)
    layers = next(iter(errors.values()))
    errors, saved = {"softmax": dict.fromkeys(layers, floor), **errors}, {"softmax": 0.0, **saved}
    now, sets = dict.fromkeys(layers, "softmax"), []
    while True:
        changes = [
            ((errors[new][layer] - errors[old][layer]) / (saved[new] - saved[old]), errors[new][layer], layer, new)
            for layer, old in now.items()
            for new in errors
            if saved[new] > saved[old]
        ]
        if not changes:
            return sets
        *_, layer, new = min(changes)
        now[layer] = new
        sets.append({layer: kind for layer, kind in now.items() if kind != "softmax"})


def propose(sets: list[LayerSet], speedup: float | None) -> LayerSet | None:
    """Return the set with the smallest velocity error among those with this speedup, and the first of equal ones."""
    fast = [] if speedup is None else [chosen for chosen in sets if chosen.speedup >= speedup]
    return min(fast, key=lambda chosen: chosen.velocity_error, default=None)


def set_sizes(num_steps: int) -> list[int]:
    """Return the numbers of steps of the path whose sets are measured: all of a short path, otherwise eight evenly
    spaced ones."""
    if num_steps <= ALL_SETS:
        return list(range(1, num_steps + 1))
    return [round(num_steps * part / 8) for part in range(1, 9)]


def smallest_number(speedup_of: Callable[[int], float], wanted: float, num_steps: int) -> list[int]:
    """Find the smallest number of steps that reaches the wanted speedup, in a list; [] if the whole path does not.

    The search is a bisection, because the speedup rises along the path.
    """
    if speedup_of(num_steps) < wanted:
        return []
    low, high = 0, num_steps
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if speedup_of(middle) >= wanted else (middle, high)
    return [high]


def to_dict(analysis: Analysis) -> dict[str, Any]:
    """Return the contents of analysis.json: the fields, and the milliseconds saved per linear and window layer."""
    names = {"milliseconds_saved_per_layer": "linear", "milliseconds_saved_per_window_layer": "window"}
    return asdict(analysis) | {name: analysis.saved(kind) for name, kind in names.items()}


def _student(base: torch.nn.Module, kind: str, window: Window | None) -> torch.nn.Module:
    """Return the model with a branch of this kind in every layer, sharing the weights of `base`."""
    if kind == "window":
        window_backend(base.blocks[0].attn1.processor._attention_backend, base.device)  # refuses unsuitable ones now
        return convert(base, "all", mode="window", window=window.settings(), copy=False)
    # mixed layers can run as softmax or as linear; their r is not used here
    return convert(base, "all", mode="mixed", copy=False)


def _titled(what: str, kind: str, kinds: Sequence[str]) -> str:
    return what if len(kinds) == 1 else f"{what} ({kind})"


def _layers_of(kind: str, chosen: Mapping[int, str]) -> list[int]:
    return sorted(layer for layer, own in chosen.items() if own == kind)


class _Measurements:
    """Measurements that are each taken once and stored in the work folder."""

    def __init__(self, work: WorkFolder, base, students: dict[str, torch.nn.Module], states: Callable, inputs: tuple):
        self.work, self.base, self.students, self.states, self.inputs = work, base, students, states, inputs
        self.layers = list(range(len(base.blocks)))

    def once(self, what: str, kinds: Mapping[int, str], measure: Callable[[], Any]) -> Any:
        key: dict[str, Any] = {"what": what, "layers": _layers_of("linear", kinds)}
        if windows := _layers_of("window", kinds):
            key["window_layers"] = windows
        for row in self.work.rows:
            if {name: row[name] for name in row if name != "value"} == key:
                return row["value"]
        value = measure()
        if not all(map(math.isfinite, value if isinstance(value, list | tuple) else [value])):
            layers = f"layers {sorted(kinds)}"
            raise ValueError(f"the {what} of {layers} is not finite in {self.base.dtype}; use another dtype")
        self.work.add({**key, "value": value})
        return value

    def error(self, kinds: Mapping[int, str]) -> float:
        """Return the velocity error with these layers converted, {layer: kind}."""

        def measure() -> float:
            with self.converted(kinds) as model:
                return velocity_error(model, self.states())

        return self.once("velocity error", kinds, measure)

    @torch.no_grad()
    def timing(self, kinds: Mapping[int, str]) -> Timing:
        """Return the time of a forward with these layers converted; without any, that of the stock model."""

        def measure() -> Timing:
            with self.converted(kinds) as converted:
                model = converted if kinds else self.base
                return time_call(lambda: predict_velocity(model, *self.inputs), self.base.device, TIMED_SECONDS)

        return Timing(*self.once("milliseconds", kinds, measure))

    def attention_output_errors(self, kind: str) -> dict[int, float]:
        """Return the error of each layer of this kind, averaged over the states."""
        student = self.students[kind]

        def measure() -> list[float]:
            batches = [(attention_output_errors(student, batch), len(batch.x)) for batch in self.states()]
            count = sum(size for _, size in batches)
            return [sum(float(errors[i]) * size for errors, size in batches) / count for i in self.layers]

        values = self.once("attention output error", dict.fromkeys(self.layers, kind), measure)
        return dict(zip(self.layers, values, strict=True))

    def velocity_square(self) -> float:
        def measure() -> float:
            return torch.cat([batch.u.cpu() for batch in self.states()]).square().mean().item()

        return self.once("mean square velocity", {}, measure)

    @contextmanager
    def converted(self, kinds: Mapping[int, str]) -> Iterator[torch.nn.Module]:
        """Context manager for a model in which these layers are converted, {layer: kind}, and all others softmax.

        It is one of the students, into which the attention modules of the other move. All share the base's weights.
        """
        model = next(iter(self.students.values()))
        own = [block.attn1 for block in model.blocks]
        try:
            for layer, kind in kinds.items():
                model.blocks[layer].attn1 = self.students[kind].blocks[layer].attn1
            with attention_types(model, dict.fromkeys(self.layers, "softmax") | dict(kinds)):
                yield model
        finally:
            for block, attention in zip(model.blocks, own, strict=True):
                block.attn1 = attention


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
