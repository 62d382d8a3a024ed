"""Trains an embedded teacher from scratch: `python -m linvideo.demo.train_teacher --output_dir DIR`.

Flow matching on videos that are rendered on the fly, on the training device. Muon trains the blocks' matrices and AdamW
the rest. t is drawn from a logit-normal distribution shifted to high noise, because position, shape and direction are
decided there. 10% of the captions are replaced by the empty one, so that classifier-free guidance works. On CUDA,
training uses bf16 (autocast) and TF32.

The state of the run is next to the output folder, in DIR.state, until the folder is complete; a killed run continues
with --resume_from_checkpoint. At the end, the teacher with averaged weights is judged on its own videos, and the
metrics are added to the folder as teacher.json.

The direction of motion is learned last, and a second cycle of the learning rate helps it most. The folder in the
package was made with

    python -m linvideo.demo.train_teacher --output_dir first
    python -m linvideo.demo.train_teacher --output_dir second --init_from first --seed 1 --max_train_steps 2500

both with --compile, in about an hour on one CPU core.

For `--world middle` and `large` there is an estimate, but no measurement. Per token, a forward takes two operations for
each of the blocks' weights and, per layer, 4 N d for attention to N tokens with width d; a backward takes twice as
many:

    middle: 3 (2 x 5.9 M + 12 x 4 x 1,024 x 192) = 64 M per token, 4.2 T per step of 64 videos. At 50 TFLOP/s, a
            twentieth of what an H100 can do in bf16 (layers this narrow wait for memory), 0.08 s, with 0.02 s for the
            optimizers 0.1 s, and under 9 minutes for 5,000 steps.
    large:  3 (2 x 59 M + 30 x 4 x 4,096 x 384) = 0.92 G per token, 30 T per step of 8 videos. At 150 TFLOP/s 0.2 s,
            with the optimizers 0.25 s, and about 40 minutes for 10,000 steps.

--max_minutes ends a run in time, and the learning rate decays accordingly.
"""

import argparse
import json
import math
import time
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from diffusers.training_utils import EMAModel

from linvideo.demo import judge
from linvideo.demo.evaluate import sample_videos, start_noise
from linvideo.demo.teacher import SETTINGS, build_pipeline, resized
from linvideo.demo.world import COLOURS, DIRECTIONS, SHAPES, WORLDS, Scenes, World
from linvideo.models import load_pipeline, new_folder
from linvideo.progress import bar
from linvideo.run.checkpoint import list_checkpoints, load_checkpoint, remove_newer, save_checkpoint
from linvideo.trajectories.atomic_files import read_json, write_json
from linvideo.trajectories.devices import check_device, device_name
from linvideo.workspace import locked, remove_dead

METRICS = "teacher.json"


@dataclass(frozen=True)
class Recipe:
    """The settings of a training run.

    Args:
        steps, batch: Defaults of --max_train_steps and --train_batch_size.
        shift: Shift of the distribution of t.
        muon_lr, adamw_lr: Highest learning rates.
    """

    steps: int
    batch: int
    shift: float
    muon_lr: float
    adamw_lr: float


# The small one is tuned; the others are derived from it, with lower rates for more layers.
RECIPES = {
    "small": Recipe(steps=6000, batch=16, shift=6.0, muon_lr=4e-3, adamw_lr=2e-3),
    "middle": Recipe(steps=5000, batch=64, shift=6.0, muon_lr=3e-3, adamw_lr=2e-3),
    "large": Recipe(steps=10000, batch=8, shift=8.0, muon_lr=2e-3, adamw_lr=1e-3),
}


def shifted_logit_normal(batch: int, shift: float, generator: torch.Generator) -> torch.Tensor:
    """Draw times in (0, 1), float [batch]: t = S s / (1 + (S - 1) s) with s = sigmoid(normal)."""
    s = torch.sigmoid(torch.randn(batch, generator=generator))
    return shift * s / (1 + (shift - 1) * s)


def noisy(scenes: Scenes, probability: float, generator: torch.Generator) -> Scenes:
    """Return copies of scenes with other words in their captions: each colour, shape and direction is replaced, with
    this probability, by one drawn uniformly, which may be the same."""
    words = {"colour": COLOURS, "shape": SHAPES, "direction": DIRECTIONS}
    changed = {}
    for name, choices in words.items():
        value = getattr(scenes, name)
        drawn = torch.randint(len(choices), value.shape, generator=generator)
        replaced = torch.rand(value.shape, generator=generator) < probability
        changed[name] = torch.where(replaced, drawn, value)
    return replace(scenes, **changed)


def make_optimizers(transformer: torch.nn.Module, recipe: Recipe) -> list[torch.optim.Optimizer]:
    matrices = [p for n, p in transformer.named_parameters() if n.startswith("blocks.") and p.dim() == 2]
    chosen = {id(p) for p in matrices}
    rest = [p for p in transformer.parameters() if id(p) not in chosen]
    return [
        torch.optim.Muon(matrices, lr=recipe.muon_lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=recipe.adamw_lr, weight_decay=0.0, betas=(0.9, 0.99)),
    ]


class TeacherRun:
    """A training run, with everything that a checkpoint stores.

    Args:
        world: World whose videos are learned.
        steps: Number of training steps.
        batch: Videos per step.
        seed: Seed of all random draws.
        device: Device for rendering and training.
        init_from: Folder of a teacher of the same world to start from; None starts from random weights.
        caption_noise: Probability with which each colour, shape and direction in a caption is replaced by a random one.
        layers, heads: Size of the transformer; None means the world's, or that of init_from.

    Raises:
        ValueError: init_from holds a teacher of another world or comes with a size, the size is below 1,
            caption_noise is not a probability, or it is above 0 in a world of several shapes.
    """

    def __init__(
        self,
        world: World,
        steps: int,
        batch: int,
        seed: int,
        device: str,
        init_from: Path | None = None,
        caption_noise: float = 0.0,
        layers: int | None = None,
        heads: int | None = None,
    ):
        self.world, self.steps, self.batch, self.device = world, steps, batch, torch.device(device)
        self.caption_noise = caption_noise
        self.identity = {"world": world.name, "steps": steps, "batch": batch, "seed": seed}
        changed = {"caption_noise": caption_noise or None, "layers": layers, "heads": heads}
        self.identity |= {name: value for name, value in changed.items() if value is not None}
        if not 0 <= caption_noise <= 1:
            raise ValueError(f"expected the caption noise to be a probability, got {caption_noise}")
        if caption_noise and world.objects > 1:  # two shapes of a video never have the same colour
            raise ValueError(
                f"expected caption noise 0 in the {world.name} world, whose videos have several shapes, got"
                f" {caption_noise}"
            )
        if init_from is not None and (layers, heads) != (None, None):
            raise ValueError(
                f"expected layers and heads to be None for a run from {init_from}, which has its own, got {layers} and"
                f" {heads}"
            )
        settings = resized(SETTINGS[world.name], layers, heads)
        self.pipeline = load_pipeline(init_from) if init_from else build_pipeline(world, seed, settings)
        if self.pipeline.tokenizer.model_max_length != settings.text_length:
            raise ValueError(f"{init_from} is not a teacher of the {world.name} world")
        self.before = None  # the run that made init_from, and its minutes
        if init_from is not None and (init_from / METRICS).is_file():
            made = read_json(init_from / METRICS)
            self.before = {name: made[name] for name in ("run", "minutes", "before") if name in made}
        self.pipeline.to(self.device).set_progress_bar_config(disable=True)
        self.transformer = self.pipeline.transformer.train()
        self.ema = EMAModel(self.transformer.parameters(), decay=0.995, use_ema_warmup=True, foreach=True)
        self.optimizers = make_optimizers(self.transformer, RECIPES[world.name])
        self.rates = [optimizer.param_groups[0]["lr"] for optimizer in self.optimizers]
        # Noise is drawn on the training device: for a GPU, drawing it on the CPU would take as long as the step.
        self.generator = torch.Generator().manual_seed(seed)
        self.noise_generator = (
            self.generator if self.device.type == "cpu" else torch.Generator(self.device).manual_seed(seed)
        )
        self.step, self.seconds = 0, 0.0
        self.loss = torch.zeros((), device=self.device)  # running mean

    def train(self, state_dir: Path, checkpointing_steps: int, max_minutes: float | None) -> None:
        """Train until `steps` are done, or until all sessions together have taken `max_minutes`."""
        limit = math.inf if max_minutes is None else 60 * max_minutes
        before, started = self.seconds, time.monotonic()
        progress = bar(total=self.steps, initial=self.step, desc=f"{self.world.name} teacher", mininterval=5)
        while (done := max(self.step / self.steps, self.seconds / limit)) < 1:
            self.train_step(min(1.0, (self.step + 1) / 40) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done))))
            self.step += 1
            self.seconds = before + time.monotonic() - started
            progress.update()
            if self.step % 50 == 0:
                progress.set_postfix(loss=f"{self.loss.item():.4f}", refresh=False)
            if self.step % checkpointing_steps == 0:
                self.save_state(state_dir)
        progress.close()
        self.save_state(state_dir)
        print(f"step {self.step}: loss {self.loss.item():.4f}, {self.seconds:.0f} s", flush=True)

    def train_step(self, factor: float) -> None:
        """Make one step with the highest learning rates times `factor`."""
        scenes = self.world.sample_scenes(self.batch, self.generator)
        clean = self.world.render(scenes.to(self.device))
        dropped = (torch.rand(self.batch, generator=self.generator) < 0.1).tolist()
        described = noisy(scenes, self.caption_noise, self.generator) if self.caption_noise else scenes
        captions = ["" if drop else caption for drop, caption in zip(dropped, described.captions(), strict=True)]
        with torch.no_grad():
            condition, _ = self.pipeline.encode_prompt(
                captions,
                do_classifier_free_guidance=False,
                max_sequence_length=SETTINGS[self.world.name].text_length,
                device=self.device,
            )
        noise = torch.randn(clean.shape, generator=self.noise_generator, device=self.device)
        t = shifted_logit_normal(self.batch, RECIPES[self.world.name].shift, self.generator).to(self.device)
        s = t[:, None, None, None, None]
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            velocity = self.transformer((1 - s) * clean + s * noise, 1000 * t, condition, return_dict=False)[0]
        loss = (velocity.float() - (noise - clean)).square().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.transformer.parameters(), 1.0)
        for optimizer, rate in zip(self.optimizers, self.rates, strict=True):
            optimizer.param_groups[0]["lr"] = rate * factor
            optimizer.step()
            optimizer.zero_grad()
        self.ema.step(self.transformer.parameters())
        self.loss = loss.detach() if self.step == 0 else self.loss.lerp(loss.detach(), 0.01)

    def save_state(self, state_dir: Path) -> None:
        state = {
            "identity": self.identity,
            "seconds": self.seconds,
            "loss": self.loss,
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "ema": self.ema.state_dict(),
            "generators": [self.generator.get_state(), self.noise_generator.get_state()],
        }
        save_checkpoint(state_dir, self.step, self.transformer.state_dict(), state | {"step": self.step}, limit=1)

    def load_state(self, state_dir: Path) -> None:
        """Continue from the newest checkpoint in `state_dir`, or start from the beginning if there is none.

        Raises:
            ValueError: The checkpoint belongs to a run with other settings, or is damaged.
        """
        remove_dead(state_dir)
        checkpoints = list_checkpoints(state_dir)
        if not checkpoints:
            print(f"no checkpoint in {state_dir}: starting from the beginning")
            return
        model, state = load_checkpoint(checkpoints[-1])
        if state["identity"] != self.identity:
            raise ValueError(f"{checkpoints[-1]} belongs to the run {state['identity']}, not to {self.identity}")
        self.transformer.load_state_dict(model)
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.ema.load_state_dict(state["ema"])
        self.ema.to(self.device)
        for generator, saved in zip((self.generator, self.noise_generator), state["generators"], strict=True):
            generator.set_state(saved)
        self.step, self.seconds, self.loss = state["step"], state["seconds"], state["loss"].to(self.device)

    def finish(self, folder: Path, num_videos: int) -> dict:
        """Save the pipeline with the averaged weights, completely or not at all; then judge it and add teacher.json."""
        self.ema.copy_to(self.transformer.parameters())
        with new_folder(folder) as new:
            self.pipeline.save_pretrained(new)
            for file in new.rglob("*.json"):  # the path of --init_from on this machine is private
                config = json.loads(file.read_text())
                if config.pop("_name_or_path", None) is not None:
                    file.write_text(json.dumps(config, indent=2) + "\n")
        self.transformer.eval()
        captions = self.world.evaluation_captions(num_videos)
        noise = start_noise(self.world, num_videos).to(self.device)
        with torch.compiler.set_stance("force_eager"):  # for a few calls with other shapes, compiling takes longer
            videos = sample_videos(self.pipeline, captions, noise, self.world)
        outcome = judge.judge(videos, captions, self.world) | {
            "videos": num_videos,
            "run": self.identity | {"steps": self.step},
            "loss": self.loss.item(),
            "minutes": self.seconds / 60,
            **({} if self.before is None else {"before": self.before}),
            "device": device_name(str(self.device)),
        }
        write_json(folder / METRICS, outcome)
        return outcome


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True, help="folder for the pipeline")
    parser.add_argument("--world", choices=list(WORLDS), default="small", help="world to learn; default: small")
    parser.add_argument("--max_train_steps", type=int, help="number of steps; default: the world's, see RECIPES")
    parser.add_argument("--train_batch_size", type=int, help="videos per step; default: the world's, see RECIPES")
    what = "time limit, in which the learning rate decays; default: none"
    parser.add_argument("--max_minutes", type=float, help=what)
    what = "number of steps between two checkpoints; default: 500"
    parser.add_argument("--checkpointing_steps", type=int, default=500, help=what)
    parser.add_argument("--resume_from_checkpoint", action="store_true", help="continue a killed run")
    what = "number of videos on which the finished teacher is judged; default: 200"
    parser.add_argument("--num_videos", type=int, default=200, help=what)
    parser.add_argument("--seed", type=int, default=0, help="seed of all random draws; default: 0")
    what = "probability that a word of a caption is replaced by a random one, for a teacher that errs; default: 0"
    parser.add_argument("--caption_noise", type=float, default=0.0, help=what)
    parser.add_argument("--layers", type=int, help="number of layers; default: the world's")
    parser.add_argument("--heads", type=int, help="number of heads, and with them the width; default: the world's")
    what = "folder of a teacher to start from, with a new cycle of the learning rate"
    parser.add_argument("--init_from", type=Path, help=what)
    parser.add_argument("--compile", action="store_true", help="compile the blocks (on a CPU, needs a C++ compiler)")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=device, help="device; default: cuda if PyTorch sees a GPU, otherwise cpu")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing pipeline folder")
    args = parser.parse_args(argv)
    folder = args.output_dir.resolve()
    state_dir = folder.with_name(folder.name + ".state")
    remove_dead(folder.parent)  # puts the folder back if a killed call has moved it aside
    resumed = args.resume_from_checkpoint and state_dir.exists()  # the folder may exist without having been judged
    if folder.exists() and not resumed and not (args.overwrite and (folder / "model_index.json").is_file()):
        parser.error(f"{folder} exists; choose another --output_dir, or pass --overwrite for a pipeline folder")
    if state_dir.exists() and not resumed:
        parser.error(f"{state_dir} holds a killed run; pass --resume_from_checkpoint, or delete it")
    recipe = RECIPES[args.world]
    steps, batch = args.max_train_steps or recipe.steps, args.train_batch_size or recipe.batch
    with ExitStack() as stack:
        try:
            check_device(args.device)
            changes = args.init_from, args.caption_noise, args.layers, args.heads
            run = TeacherRun(WORLDS[args.world], steps, batch, args.seed, args.device, *changes)
            stack.callback(_remove_if_empty, state_dir)
            stack.enter_context(locked(state_dir))
            if resumed:
                run.load_state(state_dir)
        except ValueError as error:
            parser.error(str(error))
        if run.device.type == "cuda":
            torch.set_float32_matmul_precision("high")
        if args.compile:
            for block in run.transformer.blocks:
                block.compile(dynamic=False)
        run.train(state_dir, args.checkpointing_steps, args.max_minutes)
        print(json.dumps(run.finish(folder, args.num_videos), indent=2))
        remove_newer(state_dir, -1)


def _remove_if_empty(folder: Path) -> None:
    with suppress(OSError):
        folder.rmdir()


if __name__ == "__main__":
    main()
