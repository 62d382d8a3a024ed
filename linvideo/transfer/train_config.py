"""The configuration of selective transfer.

Every value can come from a YAML file and be overridden on the command line by its dotted name:

    linvideo train --config run.yaml --selection.num_linear_layers 16 --optimizer.learning_rate 1e-5

Defaults are what worked in short runs (about 100 steps a stage) of the embedded model. The paper's own form, for runs
of thousands of steps, is selection.count=rounded, selection.rounding=threshold,
selection.lambda_con=selection.lambda_reg=0.01, selection.objective=adm_step, selection.r_learning_rate about 1e-3,
objective.name=adm_step.
"""

from dataclasses import dataclass, field

from linvideo.nn import FEATURE_MAPS, Window
from linvideo.run.adapters import AdapterConfig
from linvideo.run.run_config import RunConfig
from linvideo.trajectories.experts import EXPERTS
from linvideo.transfer.objectives import ObjectiveConfig
from linvideo.transfer.selection import SelectionConfig
from linvideo.transfer.sensitivity import SensitivityConfig
from linvideo.transfer.warmup import WarmupConfig


@dataclass
class TrainConfig(RunConfig):
    """Selective transfer of one Wan pipeline, from trajectories to the exported pipeline folder.

    Notes on the options that every run has: output_dir also holds selection.json. max_train_steps and use_ema apply to
    fine-tuning, compile applies to selection and fine-tuning. train_batch_size counts teacher states or, for objectives
    on the student's own states, rollouts. offload_teacher helps with objectives that evaluate the teacher in every
    step (all but "mse"); with lora the teacher takes no memory of its own anyway.

    Args:
        expert: The transformer to train in a pipeline with two experts (Wan 2.2): "high_noise" or "low_noise". The
            other one is exported as it is. To convert both, use the pipeline of one run as the teacher of a second run.
        feature_map: Name of the linear branches' feature map: "hedgehog", "hedgehog_joint", "elu", "relu" or "softmax".
            Only the hedgehog maps have weights, which the warm-up fits to the teacher.
        window: The frames to which window layers attend with softmax, if selection.window_layers names any.
    """

    command = "train"

    expert: str | None = None
    feature_map: str = "hedgehog"
    window: Window = field(default_factory=Window)
    warmup: WarmupConfig = field(default_factory=WarmupConfig)
    sensitivity: SensitivityConfig = field(default_factory=SensitivityConfig)
    selection: SelectionConfig = field(default_factory=SelectionConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    lora: AdapterConfig = field(default_factory=AdapterConfig)

    def __post_init__(self):
        super().__post_init__()
        self.check_choice("expert", (None, *EXPERTS))
        self.check_choice("feature_map", FEATURE_MAPS)
        if self.window != Window() and not self.selection.window_layers:
            raise ValueError(f"window settings need selection.window_layers, got none, and {self.window}")
        if self.offload_teacher and self.lora.rank is not None:
            raise ValueError(
                "offload_teacher and lora.rank exclude each other: with lora the teacher is in the student"
            )
        ranks_layers = self.selection.method == "sensitivity" or self.selection.r_from_sensitivity
        if ranks_layers and not self.sensitivity.num_states:
            raise ValueError("selection by sensitivity needs sensitivity.num_states of at least 1, got 0")
