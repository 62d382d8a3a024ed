"""The options that all kinds of training runs share. Sections are defined next to the code that they configure."""

import dataclasses
import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import yaml

from linvideo.packaged import packaged
from linvideo.run.optimizer import OptimizerConfig
from linvideo.run.parallel import ParallelConfig
from linvideo.run.trackers import tracker_names
from linvideo.trajectories.atomic_files import write_text
from linvideo.trajectories.collect import LARGEST as MOST_STEPS
from linvideo.trajectories.collect import TrajectoryConfig
from linvideo.trajectories.devices import check_device
from linvideo.trajectories.prompts import PromptConfig

LARGEST = 2**63 - 1  # PyTorch's integers
UNBOUNDED = ("max_grad_norm", "weight_clip")  # infinity turns these limits off
MIXED_PRECISION = ("no", "bf16")
# options that may change when a run is continued
FREE = (
    "output_dir",
    "overwrite_output_dir",
    "resume_from_checkpoint",
    "checkpointing_steps",
    "checkpoints_total_limit",
)
FREE += ("report_to", "tracker_project_name", "device", "progress", "parallel", "validation")
FREE += ("compile", "attention_backend", "offload_teacher", "trajectories.path")
FREE += ("max_train_steps",)  # within limits: see check_length
# options of one call, not of the run
OF_THE_CALL = {"overwrite_output_dir": False, "resume_from_checkpoint": None}
PATHS = ("pretrained_model_name_or_path", "student_model_name_or_path", "prompts.prompts_file", "trajectories.path")
SCHEDULES_WITHOUT_END = ("constant", "constant_with_warmup")


@dataclass
class ValidationConfig:
    """Validation videos: the student's during training, compared with the teacher's from the same noise.

    Size and guidance are those of the trajectories. With use_ema, the last stage validates the averaged weights.
    Validation doesn't change the result of a run, because it draws its own random numbers.

    Args:
        steps: Number of training steps (of the whole run) between two validations. The end of a training stage is
            validated, too. 0 turns validation off.
        prompts: Prompts of the videos. None takes captions spread evenly over the run's list.
        num_videos: Number of videos. They are made one after another.
        num_inference_steps: Number of sampler steps. None means that of the trajectories.
        fps: Frames per second of the mp4 files. None means the pipeline's own rate.
        seed: Seed of the noise. Every validation starts from the same noise.
    """

    steps: int = 0
    prompts: list[str] | None = None
    num_videos: int = 4
    num_inference_steps: int | None = None
    fps: int | None = None
    seed: int = 0

    def __post_init__(self):
        if self.steps < 0:
            raise ValueError(f"validation.steps must not be negative, got {self.steps}")
        if self.prompts is not None and not self.prompts:
            raise ValueError("validation.prompts must hold at least one prompt, got none")
        for name in ("num_videos", "num_inference_steps", "fps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"validation.{name} must be at least 1, got {value}")
        if (self.num_inference_steps or 1) > MOST_STEPS:
            raise ValueError(
                f"validation.num_inference_steps must be at most {MOST_STEPS}, got {self.num_inference_steps}"
            )


@dataclass
class RunConfig:
    """The options of a run in a folder.

    Args:
        output_dir: Folder of the run. It gets config.yaml, metrics.jsonl, checkpoint-<step>/, trajectories/ and, at the
            end, pipeline/. With validation it also gets validation/ (the videos) and validation.jsonl.
        pretrained_model_name_or_path: Pipeline folder or Hub id of the teacher. Not needed when the teacher is given in
            memory.
        overwrite_output_dir: Whether to delete the files of an earlier run in output_dir first.
        resume_from_checkpoint: Checkpoint to continue from: "latest", or a checkpoint folder in output_dir. The result
            is that of an uninterrupted run. "latest" starts from the beginning when there is no checkpoint yet, and
            reuses existing trajectories. Continuing from an older checkpoint deletes the newer ones.
        seed: Seed of all random draws.
        device: Device to train on, when the teacher is loaded by name. None means CUDA if a GPU is available.
        mixed_precision: Precision of the computation: "no" (fp32) or "bf16" (autocast over fp32 weights). With "bf16" a
            teacher that is loaded by name is held in bf16, too.
        gradient_checkpointing: Whether to recompute the activations of the trained model's blocks in the backward pass,
            which saves memory and costs about one more forward.
        compile: Whether to apply torch.compile to the blocks of the trained model.
        attention_backend: Attention backend of softmax and window layers, a name for diffusers' set_attention_backend
            such as "flash" or "_flash_3_hub" (window layers take some of them only). None means PyTorch's own choice.
        offload_teacher: Whether to keep the teacher's weights in CPU memory and copy each block to the GPU when it
            runs.
        train_batch_size: Number of samples per forward on each data rank. A data rank is one GPU, or a group of GPUs
            that share the tokens of a video (see parallel).
        gradient_accumulation_steps: Number of forwards per optimizer step. The global batch is train_batch_size *
            gradient_accumulation_steps * data ranks. When a run is continued the global batch must stay the same, but
            these factors may change.
        max_train_steps: Number of steps of the main stage (train: fine-tuning, distill: DMD). The other stages have
            options of their own. When a run is continued it may change if the main stage has not begun, or if every
            lr_scheduler is "constant" or "constant_with_warmup", so that a finished run can be extended.
        use_ema: Whether to keep an exponential moving average (EMA) of the weights in the last stage, and export it in
            place of the last weights.
        ema_decay: Decay of the EMA. After n steps it is at most (1 + n) / (10 + n), so that the average soon forgets
            the initial weights.
        checkpointing_steps: Number of steps (of the whole run) between two checkpoints. The end of each stage is
            saved, too.
        checkpoints_total_limit: Number of checkpoints to keep; older ones are deleted. None keeps all.
        max_nonfinite_steps: Number of steps with a non-finite loss or gradient to tolerate. Such steps are skipped; one
            more than this ends the run.
        report_to: Trackers to report to: "none", "tensorboard", "wandb" or "tensorboard,wandb". metrics.jsonl is
            written in any case. A continued run continues its wandb run.
        tracker_project_name: Name of the wandb project.
        progress: Whether to show progress bars.
    """

    command: ClassVar[str]  # the `linvideo` command that reads such a config

    output_dir: str
    pretrained_model_name_or_path: str | None = None
    overwrite_output_dir: bool = False
    resume_from_checkpoint: str | None = None
    seed: int = 0
    device: str | None = None
    mixed_precision: str = "no"
    gradient_checkpointing: bool = False
    compile: bool = False
    attention_backend: str | None = None
    offload_teacher: bool = False
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
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)

    def __post_init__(self):
        for name in ("output_dir", "resume_from_checkpoint", *PATHS):  # Python callers may give a Path
            section, _, key = name.rpartition(".")
            holder = getattr(self, section) if section else self
            if isinstance(path := getattr(holder, key, None), os.PathLike):
                setattr(holder, key, os.fspath(path))
        for name, _, value in _leaves(self.to_dict(), self.to_dict()):
            if value != value:
                raise ValueError(f"{name} must be a number, got nan")
            if isinstance(value, float) and math.isinf(value) and not name.endswith(UNBOUNDED):
                raise ValueError(f"{name} must be finite, got {value}")
            if isinstance(value, int) and not -LARGEST <= value <= LARGEST:
                raise ValueError(f"{name} must lie within {LARGEST} of 0, got {value}")
        if not self.output_dir:
            raise ValueError("output_dir must name a folder, got nothing")
        if self.overwrite_output_dir and self.resume_from_checkpoint:
            raise ValueError("overwrite_output_dir and resume_from_checkpoint exclude each other, got both")
        self.check_choice("mixed_precision", MIXED_PRECISION)
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
        if self.parallel.ring_degree > 1 and self.attention_backend in (None, "native"):
            raise ValueError(
                "parallel.ring_degree needs an attention_backend that returns log-sum-exps, say _native_cudnn or flash,"
                f" got {self.attention_backend}"
            )

    def schedules(self) -> dict[str, str]:
        """Return option -> learning rate schedule of the main stage, for all optimizers."""
        return {"optimizer.lr_scheduler": self.optimizer.lr_scheduler}

    @property
    def can_be_extended(self) -> bool:
        """Whether the steps of the main stage don't depend on their total number."""
        return all(name in SCHEDULES_WITHOUT_END for name in self.schedules().values())

    def check_length(self, earlier: int, made: int) -> None:
        """Raise ValueError when max_train_steps cannot change from `earlier` to this config's after `made` steps."""
        now = self.max_train_steps
        if now == earlier or not made:
            return
        change = f"max_train_steps cannot change from {earlier} to {now} after step {made} of its stage"
        if not self.can_be_extended:
            names = ", ".join(f"{option} {name}" for option, name in self.schedules().items())
            raise ValueError(f"{change}: {names} depends on it, only {' and '.join(SCHEDULES_WITHOUT_END)} do not")
        if now < made:
            raise ValueError(f"{change}: continue from an earlier checkpoint, --resume_from_checkpoint FOLDER")

    def check_choice(self, name: str, allowed: tuple) -> None:
        """Raise ValueError when the value of the field `name` is not one of `allowed`."""
        if getattr(self, name) not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(map(str, allowed))}, got {getattr(self, name)!r}")

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def record(self) -> dict[str, Any]:
        """Return `to_dict` for the run's folder, to be read from any working directory.

        Local paths are absolute, and options of this call (overwriting, resuming) have their defaults.
        """
        values = self.to_dict() | OF_THE_CALL
        for name in PATHS:
            section, _, key = name.rpartition(".")
            holder = values[section] if section else values
            if key in holder:
                holder[key] = _absolute(holder[key])
        return values

    def save(self, path: str | Path) -> None:
        """Write `record` as YAML that `load_config(["--config", path], kind)` reads."""
        write_text(path, yaml.safe_dump(self.record(), sort_keys=False))

    def global_batch(self, processes: int) -> int:
        """Return the number of samples per optimizer step on this number of processes."""
        data_ranks = processes // self.parallel.context_degree
        return self.train_batch_size * self.gradient_accumulation_steps * data_ranks

    def check_continues(
        self, earlier: dict[str, Any], processes: int = 1, earlier_processes: int = 1, free: tuple[str, ...] = ()
    ) -> None:
        """Raise ValueError when a run with the `earlier` config cannot be continued exactly with this one.

        The number of processes may change as long as the global batch stays the same.

        Args:
            earlier: The earlier config as returned by `to_dict`.
            processes: Number of processes now.
            earlier_processes: Number of processes of the earlier run.
            free: Names of further options that may differ.
        """
        may_differ = {*FREE, *free}
        # an earlier version may have lacked options, which then had no effect: their defaults
        earlier = {**type(self)(self.output_dir).to_dict(), **earlier}
        layout = ParallelConfig(**earlier["parallel"])
        before = earlier["train_batch_size"] * earlier["gradient_accumulation_steps"]
        before, now = before * (earlier_processes // layout.context_degree), self.global_batch(processes)
        if before == now:
            may_differ |= {"train_batch_size", "gradient_accumulation_steps"}
        differences = [
            f"{name} {old!r} (now {new!r})"
            for name, old, new in _leaves(earlier, self.to_dict())
            if not {name, name.split(".")[0]} & may_differ
            and (_absolute(old) != _absolute(new) if name in PATHS else old != new)
        ]
        if before != now and not differences:
            differences = [f"a global batch of {before} (now {now}, on {processes} processes)"]
        if differences:
            raise ValueError(f"the checkpoint was made with {', '.join(differences)}; continue with the same values")


def _absolute(path: str | None) -> str | None:
    """Return the absolute path of an existing file or folder; anything else, a Hub id say, as it is."""
    found = None if path is None else packaged(path)
    return os.path.abspath(found) if found is not None and os.path.exists(found) else path


def _leaves(old: dict, new: dict, prefix: str = ""):
    for name in {**old, **new}:
        a, b = old.get(name), new.get(name)
        if isinstance(a, dict) and isinstance(b, dict):
            yield from _leaves(a, b, f"{prefix}{name}.")
        else:
            yield prefix + name, a, b
