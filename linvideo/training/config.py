"""The configuration of one training run: a root, and a section for each part that is defined beside that part.

Every value can come from a YAML file and be overridden on the command line by its dotted name:

    linvideo train --config run.yaml --selection.num_linear_layers 16 --optimizer.learning_rate 1e-5

Defaults are what worked in short runs (about 100 steps a stage) of the embedded model. The paper's own form, for runs
of thousands of steps, is selection.count=rounded, selection.rounding=threshold,
selection.lambda_con=selection.lambda_reg=0.01, selection.objective=adm_step, selection.r_learning_rate about 1e-3,
objective.name=adm_step.
"""

import dataclasses
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from linvideo.nn import FEATURE_MAPS
from linvideo.training.adapters import AdapterConfig
from linvideo.training.devices import check_device
from linvideo.training.experts import EXPERTS
from linvideo.training.files import write_text
from linvideo.training.objectives import ObjectiveConfig
from linvideo.training.optimizer import OptimizerConfig
from linvideo.training.parallel import ParallelConfig
from linvideo.training.prompts import PromptConfig
from linvideo.training.selection import SelectionConfig
from linvideo.training.sensitivity import SensitivityConfig
from linvideo.training.trackers import tracker_names
from linvideo.training.trajectories import TrajectoryConfig
from linvideo.training.validation import ValidationConfig
from linvideo.training.warmup import WarmupConfig

MIXED_PRECISION = ("no", "bf16")
RECIPES = resources.files("linvideo") / "recipes"
# may change between a run and its continuation
FREE = (
    "output_dir",
    "overwrite_output_dir",
    "resume_from_checkpoint",
    "checkpointing_steps",
    "checkpoints_total_limit",
)
FREE += ("report_to", "tracker_project_name", "device", "progress", "parallel", "validation")
FREE += ("compile", "attention_backend", "offload_teacher")


@dataclass
class TrainConfig:
    """Selective transfer of one Wan pipeline, from trajectories to the exported pipeline folder.

    Args:
        output_dir: folder of the run: config.yaml, metrics.jsonl, checkpoint-<step>/, selection.json, trajectories/,
            with validation its videos and validation.jsonl, and in the end pipeline/.
        pretrained_model_name_or_path: the teacher, a pipeline folder or Hub id; not needed when the teacher is given in
            memory.
        expert: which transformer of a pipeline with two (Wan 2.2) is trained, "high_noise" or "low_noise"; the other is
            exported as it is. To convert both, give the pipeline of one run to a second.
        overwrite_output_dir: delete what an earlier run left in output_dir.
        resume_from_checkpoint: "latest" or a checkpoint folder in output_dir; continues exactly. "latest" starts from
            the beginning when there is no checkpoint yet, with the trajectories that are there; an older checkpoint
            takes the run back, the newer ones are deleted.
        seed: of every draw.
        device: for a teacher loaded by us; None is CUDA when there is a GPU.
        mixed_precision: "no", or "bf16" (autocast over fp32 weights; a teacher loaded by us is then bf16).
        gradient_checkpointing: recompute activations of the student's blocks.
        compile: torch.compile the student's blocks, for selection and fine-tuning.
        attention_backend: of the softmax layers, a name of diffusers' set_attention_backend, say "flash" or
            "_flash_3_hub"; None is PyTorch's own choice.
        offload_teacher: keep the teacher's weights in CPU memory and bring each block when it is its turn. Of use with
            objectives that ask the teacher in every step, all but "mse"; with lora the teacher costs nothing anyway.
        feature_map: of the linear branch.
        train_batch_size: teacher states, or lanes of student states, per forward on each data rank.
        gradient_accumulation_steps: forwards per optimizer step. The product of both and the number of data ranks is
            the global batch; it may not change when a run is continued, its factors may.
        max_train_steps: of fine-tuning; selection and warm-up have their own.
        use_ema: export an exponential moving average of the fine-tuned weights.
        ema_decay: of that average.
        checkpointing_steps: a checkpoint each so many steps of the whole run, and at the end of each stage.
        checkpoints_total_limit: keep only the newest ones.
        max_nonfinite_steps: steps with a non-finite loss or gradient are skipped; more than these end the run.
        report_to: "none", "tensorboard", "wandb" or "tensorboard,wandb"; metrics.jsonl is always written. A continued
            run goes on in the same wandb run.
        tracker_project_name: the project of that wandb run.
        progress: show progress bars.
    """

    output_dir: str
    pretrained_model_name_or_path: str | None = None
    expert: str | None = None
    overwrite_output_dir: bool = False
    resume_from_checkpoint: str | None = None
    seed: int = 0
    device: str | None = None
    mixed_precision: str = "no"
    gradient_checkpointing: bool = False
    compile: bool = False
    attention_backend: str | None = None
    offload_teacher: bool = False
    feature_map: str = "hedgehog"
    train_batch_size: int = 8
    gradient_accumulation_steps: int = 1
    max_train_steps: int = 200
    use_ema: bool = False
    ema_decay: float = 0.999
    checkpointing_steps: int = 500
    checkpoints_total_limit: int | None = None
    max_nonfinite_steps: int = 10
    report_to: str = "none"
    tracker_project_name: str = "linvideo"
    progress: bool = True
    prompts: PromptConfig = field(default_factory=PromptConfig)
    trajectories: TrajectoryConfig = field(default_factory=TrajectoryConfig)
    warmup: WarmupConfig = field(default_factory=WarmupConfig)
    sensitivity: SensitivityConfig = field(default_factory=SensitivityConfig)
    selection: SelectionConfig = field(default_factory=SelectionConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    lora: AdapterConfig = field(default_factory=AdapterConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)

    def __post_init__(self):
        if not self.output_dir:
            raise ValueError("output_dir must name a folder, got nothing")
        if self.overwrite_output_dir and self.resume_from_checkpoint:
            raise ValueError("overwrite_output_dir and resume_from_checkpoint exclude each other, got both")
        for name, allowed in (
            ("expert", (None, *EXPERTS)),
            ("mixed_precision", MIXED_PRECISION),
            ("feature_map", FEATURE_MAPS),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(map(str, allowed))}, got {getattr(self, name)!r}")
        tracker_names(self.report_to)
        for name in ("train_batch_size", "gradient_accumulation_steps", "checkpointing_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("max_train_steps", "max_nonfinite_steps"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if self.checkpoints_total_limit is not None and self.checkpoints_total_limit < 1:
            raise ValueError(f"checkpoints_total_limit must be at least 1, got {self.checkpoints_total_limit}")
        if not 0 <= self.ema_decay <= 1:
            raise ValueError(f"ema_decay must lie in [0, 1], got {self.ema_decay}")
        size = {name: getattr(self.trajectories, name) for name in ("height", "width")}
        if self.validation.steps and any(value % 16 for value in size.values()):
            raise ValueError(f"validation needs trajectories.height and width that are multiples of 16, got {size}")
        check_device(self.device)
        if self.offload_teacher and self.lora.rank is not None:
            raise ValueError("offload_teacher and lora.rank exclude each other: the teacher is the student's own base")
        if self.parallel.ring_degree > 1 and self.attention_backend in (None, "native"):
            raise ValueError(
                "parallel.ring_degree needs an attention_backend that returns log-sum-exps, say _native_cudnn or flash,"
                f" got {self.attention_backend}"
            )
        ranks_layers = self.selection.method == "sensitivity" or self.selection.r_from_sensitivity
        if ranks_layers and not self.sensitivity.num_states:
            raise ValueError("selection by sensitivity needs sensitivity.num_states of at least 1, got 0")

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def save(self, path: str | Path) -> None:
        """Write YAML that `load_config(["--config", path])` reads back."""
        write_text(path, yaml.safe_dump(self.to_dict(), sort_keys=False))

    def global_batch(self, processes: int) -> int:
        """Samples of an optimizer step on so many processes."""
        data_ranks = processes // self.parallel.context_degree
        return self.train_batch_size * self.gradient_accumulation_steps * data_ranks

    def check_continues(
        self, earlier: dict[str, Any], selected: bool = True, processes: int = 1, earlier_processes: int = 1
    ) -> None:
        """Raise ValueError when a run with the `earlier` config (a to_dict) cannot be continued exactly with this one.

        Until layers are `selected`, selection.rounding may still change: nothing has depended on it. The number of
        processes may always change, if the global batch stays.
        """
        free = [*FREE, "trajectories.path"] if selected else [*FREE, "trajectories.path", "selection.rounding"]
        layout = ParallelConfig(**earlier["parallel"])
        before = earlier["train_batch_size"] * earlier["gradient_accumulation_steps"]
        before, now = before * (earlier_processes // layout.context_degree), self.global_batch(processes)
        if before == now:
            free += ["train_batch_size", "gradient_accumulation_steps"]
        differences = [
            f"{name} {old!r} (now {new!r})"
            for name, old, new in _leaves(earlier, self.to_dict())
            if old != new and not {name, name.split(".")[0]} & set(free)
        ]
        if before != now and not differences:
            differences = [f"a global batch of {before} (now {now}, on {processes} processes)"]
        if differences:
            raise ValueError(f"the checkpoint was made with {', '.join(differences)}; continue with the same values")


def make_parser():
    """The jsonargparse parser of `linvideo train`: one option per field, with the docstrings as help."""
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(prog="linvideo train", exit_on_error=False)
    parser.add_argument("--config", action="config", help="YAML file with any of the options below, or a recipe's name")
    parser.add_class_arguments(TrainConfig, as_group=False)
    return parser


def load_config(argv: list[str]) -> TrainConfig:
    """A TrainConfig from `--config file.yaml` and dotted `--name value` arguments; later ones win.

    In place of a file --config takes the name of a recipe in linvideo/recipes.

    Raises:
        ValueError: anything that is no valid configuration, in one line. `--help` prints the options and exits.
    """
    from jsonargparse import ArgumentError

    names = {path.name.removesuffix(".yaml"): str(path) for path in RECIPES.iterdir()}
    for place, word in enumerate(argv):
        if place and argv[place - 1] == "--config" and not Path(word).exists():
            argv = [*argv[:place], names.get(word, word), *argv[place + 1 :]]
    try:
        values = make_parser().parse_args(argv)
        values = values.as_dict()
        values.pop("config", None)
        return from_dict(values)
    except (ArgumentError, TypeError, OSError) as error:
        raise ValueError(_one_line(error)) from None


def from_dict(values: dict[str, Any]) -> TrainConfig:
    """A TrainConfig from nested plain values, the inverse of `to_dict`."""
    sections = {f.name: f.default_factory for f in dataclasses.fields(TrainConfig) if dataclasses.is_dataclass(f.type)}
    try:
        parts = {name: cls(**values[name]) for name, cls in sections.items() if name in values}
        return TrainConfig(**{**values, **parts})
    except TypeError as error:
        raise ValueError(_one_line(error)) from None


def _leaves(old: dict, new: dict, prefix: str = ""):
    for name in {**old, **new}:
        a, b = old.get(name), new.get(name)
        if isinstance(a, dict) and isinstance(b, dict):
            yield from _leaves(a, b, f"{prefix}{name}.")
        else:
            yield prefix + name, a, b


def _one_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines) or type(error).__name__
