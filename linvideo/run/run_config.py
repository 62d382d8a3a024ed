"""What every run of training is configured by, whatever it learns; the sections are defined next to their parts."""

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
UNBOUNDED = ("max_grad_norm", "weight_clip")  # infinity leaves these limits out
MIXED_PRECISION = ("no", "bf16")
# may change between a run and its continuation
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
# of the call, not of the run
OF_THE_CALL = {"overwrite_output_dir": False, "resume_from_checkpoint": None}
PATHS = ("pretrained_model_name_or_path", "student_model_name_or_path", "prompts.prompts_file", "trajectories.path")
SCHEDULES_WITHOUT_END = ("constant", "constant_with_warmup")


@dataclass
class ValidationConfig:
    """Videos of the student during selection and fine-tuning, compared with the teacher's from the same noise.

    Sizes and guidance are those of the trajectories; in fine-tuning with use_ema it is the averaged weights that are
    validated. The result of a run does not depend on it, nothing is drawn that training would draw.

    Args:
        steps: the number of steps of the whole run between two validations; there is one at the end of both stages,
            too. 0 is never.
        prompts: the prompts of the videos; None is captions from all over the run's list.
        num_videos: the number of videos, which are made one after another.
        num_inference_steps: the number of steps of the sampler; None is that of the trajectories.
        fps: frames per second of the mp4 files; None is the pipeline's own.
        seed: the seed of the noise, which is the same each time.
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
    """One run in a folder.

    Args:
        output_dir: folder of the run: config.yaml, metrics.jsonl, checkpoint-<step>/, trajectories/, with validation
            its videos and validation.jsonl, and in the end pipeline/.
        pretrained_model_name_or_path: the teacher, a pipeline folder or Hub id; not needed when the teacher is given in
            memory.
        overwrite_output_dir: delete what an earlier run left in output_dir.
        resume_from_checkpoint: "latest" or a checkpoint folder in output_dir; continues exactly. "latest" starts from
            the beginning when there is no checkpoint yet, with the trajectories that are there; an older checkpoint
            takes the run back, the newer ones are deleted.
        seed: the seed of everything that is drawn at random.
        device: the device of a teacher that is loaded here; None is CUDA when there is a GPU.
        mixed_precision: "no", or "bf16" (autocast over fp32 weights; a teacher loaded by us is then bf16).
        gradient_checkpointing: recompute activations of the blocks of what trains.
        compile: torch.compile the blocks of what trains.
        attention_backend: the attention backend of the softmax layers, a name of diffusers' set_attention_backend, say
            "flash" or "_flash_3_hub"; None is PyTorch's own choice.
        offload_teacher: keep the teacher's weights in CPU memory and bring each block when it is its turn.
        train_batch_size: samples per forward on each data rank.
        gradient_accumulation_steps: forwards per optimizer step. The product of both and the number of data ranks is
            the global batch; it may not change when a run is continued, its factors may.
        max_train_steps: the number of steps of the main stage; the others have their own. It may change when a run is
            continued, before that stage has made a step, or where every lr_scheduler is "constant" or
            "constant_with_warmup": so a finished run is extended.
        use_ema: export an exponential moving average of the weights that the last stage trains.
        ema_decay: the decay of that average; after n steps at most (1 + n) / (10 + n).
        checkpointing_steps: the number of steps of the whole run between two checkpoints; there is one at the end of
            each stage, too.
        checkpoints_total_limit: the number of checkpoints that are kept, the newest ones; None keeps all.
        max_nonfinite_steps: steps with a non-finite loss or gradient are skipped; more than these end the run.
        report_to: "none", "tensorboard", "wandb" or "tensorboard,wandb"; metrics.jsonl is always written. A continued
            run goes on in the same wandb run.
        tracker_project_name: the project of that wandb run.
        progress: show progress bars.
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
        """Option -> the learning rate's schedule in the main stage."""
        return {"optimizer.lr_scheduler": self.optimizer.lr_scheduler}

    @property
    def can_be_extended(self) -> bool:
        """Whether the main stage's steps don't depend on how many there will be."""
        return all(name in SCHEDULES_WITHOUT_END for name in self.schedules().values())

    def check_length(self, earlier: int, made: int) -> None:
        """Raise ValueError when a run with max_train_steps `earlier`, of which it has made so many, cannot be continued
        to this config's."""
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
        """Raise ValueError when the field `name` has none of these values."""
        if getattr(self, name) not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(map(str, allowed))}, got {getattr(self, name)!r}")

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def record(self) -> dict[str, Any]:
        """`to_dict` for the run's folder, to be read in any other: local paths are absolute, and what this call was to
        do with a folder that is there is left out."""
        values = self.to_dict() | OF_THE_CALL
        for name in PATHS:
            section, _, key = name.rpartition(".")
            holder = values[section] if section else values
            if key in holder:
                holder[key] = _absolute(holder[key])
        return values

    def save(self, path: str | Path) -> None:
        """Write its record as YAML for `load_config(["--config", path], kind)`."""
        write_text(path, yaml.safe_dump(self.record(), sort_keys=False))

    def global_batch(self, processes: int) -> int:
        """Samples of an optimizer step on so many processes."""
        data_ranks = processes // self.parallel.context_degree
        return self.train_batch_size * self.gradient_accumulation_steps * data_ranks

    def check_continues(
        self, earlier: dict[str, Any], processes: int = 1, earlier_processes: int = 1, free: tuple[str, ...] = ()
    ) -> None:
        """Raise ValueError when a run with the `earlier` config (a to_dict) cannot be continued exactly with this one.

        The number of processes may always change, if the global batch stays. free: names that may differ here too.
        """
        may_differ = {*FREE, *free}
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
    """A file or folder of this machine by its absolute path; a Hub id, or what is not there, as it is."""
    found = None if path is None else packaged(path)
    return os.path.abspath(found) if found is not None and os.path.exists(found) else path


def _leaves(old: dict, new: dict, prefix: str = ""):
    for name in {**old, **new}:
        a, b = old.get(name), new.get(name)
        if isinstance(a, dict) and isinstance(b, dict):
            yield from _leaves(a, b, f"{prefix}{name}.")
        else:
            yield prefix + name, a, b
