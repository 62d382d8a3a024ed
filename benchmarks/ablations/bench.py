"""One ablation run: a setting and a seed on a suite's world give one row of figures."""

import gc
import shutil
from dataclasses import replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from benchmarks.ablations.ablate import ablate, start_after
from benchmarks.ablations.distance import WorldDistance
from benchmarks.ablations.settings import COST, DEFAULT, TUNING_SEED, Setting, Suite, fixed_layers, steps
from benchmarks.results import slug
from linvideo.demo import teacher
from linvideo.demo.judge import coverage, explain, psnr, score
from linvideo.demo.world import WORLDS, Scenes, World
from linvideo.evaluation.velocity import trajectory_error
from linvideo.models import load_pipeline
from linvideo.run.read_config import from_dict
from linvideo.trajectories import encode_prompts
from linvideo.trajectories.atomic_files import read_json, write_safetensors
from linvideo.trajectories.conditions import Conditions
from linvideo.trajectories.flow import sample_steps
from linvideo.trajectories.seeding import draw_noise, generator
from linvideo.transfer import TrainConfig

PROBED = 4  # videos for each point of the curve
FILMED = 4  # videos that are kept of each student, for pictures
AT_ONCE = 16  # videos in a batch


class Bench:
    """Runs of one suite, with the teacher in memory.

    Args:
        suite: Suite whose scale applies.
        teacher_folder: Folder of the teacher's pipeline.
        folder: Folder for runs, trajectories and videos.
        device: "cpu" or "cuda".
    """

    def __init__(self, suite: Suite, teacher_folder: str | Path, folder: Path, device: str):
        self.suite, self.folder, self.device = suite, folder, device
        self.world, self.sampler = WORLDS[suite.world], teacher.SETTINGS[suite.world]
        if suite.guidance_scale is not None:
            self.sampler = replace(self.sampler, guidance_scale=suite.guidance_scale)
        dtype = torch.bfloat16 if suite.mixed_precision == "bf16" else torch.float32
        self.pipeline = load_pipeline(teacher_folder, dtype=dtype).to(device)
        self.pipeline.set_progress_bar_config(disable=True)
        self.prompts = self.world.training_captions()
        self.start = lru_cache(maxsize=1)(self._start)  # every point of a curve starts from it
        self.others = lru_cache(maxsize=1)(self._others)  # every student is compared with them

    @cached_property
    def distance(self) -> WorldDistance:
        return WorldDistance(self.folder / "video_net.safetensors", self.world, self.device)

    def row(self, setting: Setting, seed: int, rate_factor: float | None = None) -> dict[str, Any]:
        """Train and judge a student.

        The default run of the seed must be done before the other settings. Its folder is kept; those of other settings
        are deleted after judging.

        Args:
            setting: Setting to run.
            seed: Seed of all random draws.
            rate_factor: Factor on the suite's learning rate, required if the setting's rate is tuned. None means the
                setting's own.
        """
        if rate_factor is not None:
            setting = replace(setting, changes=setting.changes | {"optimizer.learning_rate": rate_factor})
        config = self.config(setting, seed)
        if setting.after == "trajectories":
            shutil.rmtree(config.output_dir, ignore_errors=True)
        outcome = ablate(config, self.pipeline, self.prompts, setting, self.probe(seed))
        results = outcome.results
        row: dict[str, Any] = {"setting": setting.name, "seed": seed, "layers_linear": results.get("linear_layers")}
        if "window_layers" in results:
            row |= {"layers_window": results["window_layers"], "window": config.window.settings()}
        if results.get("linear_layers") is not None:
            row["softmax_pairs"] = self.softmax_pairs(config, results)
        if outcome.diverged is None:
            row |= {"seconds": results["seconds"], "r": results.get("r", {})}
            row |= {"sensitivity": results.get("sensitivity", {})}
            if (chosen := Path(config.output_dir) / "selection.json").is_file():  # of this run, not of the default run
                row |= {k: v for k, v in read_json(chosen).items() if k in ("error_mixed", "error_rounded")}
        else:
            row["diverged"] = outcome.diverged
        if rate_factor is not None:
            row["rate_factor"] = rate_factor
        row |= {"learning_rate": config.optimizer.learning_rate}
        row |= {"steps": config.max_train_steps, "curve": outcome.curve, **outcome.cost}
        row |= self.judge(outcome.student, seed, setting.name)
        if setting != DEFAULT:
            shutil.rmtree(config.output_dir)
        del outcome
        gc.collect()
        return row

    def teacher_row(self, seed: int) -> dict[str, Any]:
        """Judge the teacher itself. Its videos are kept for the PSNR of the others and, if it leaves something to gain,
        as many from other noise for their distance to its distribution."""
        _, embeds, negative, captions = self.start(seed)
        _, videos = self.sample(self.pipeline.transformer, seed, len(captions))
        kept = {"videos": videos}
        if self.suite.headroom:
            noise = self.noise("teacher", seed, len(captions))
            kept["others"] = self.sample_videos(self.pipeline.transformer, noise, embeds, negative)
        write_safetensors(self.teacher_videos(seed), kept)
        write_safetensors(film(self.folder, "teacher", seed), {"videos": videos[:FILMED]})
        return {"setting": "teacher", "seed": seed, **self.figures(videos, seed)}

    def world_row(self, seed: int) -> dict[str, Any]:
        """Judge videos of the world itself, under the same captions."""
        *_, captions = self.start(seed)
        scenes = self.world.scenes_from_captions(captions, generator(seed, "world"))
        return {"setting": "world", "seed": seed, **self.figures(self.world.render(scenes), seed)}

    def config(self, setting: Setting, seed: int) -> TrainConfig:
        """Return the run's config. If it shares stages with the default run, its folder starts at the end of these."""
        suite, folder = self.suite, self.folder / "runs"
        tried = f"-{slug(str(setting.changes['optimizer.learning_rate']))}" if setting.tuned else ""
        output_dir = folder / f"{slug(setting.name)}-{seed}{tried}"
        base = folder / f"{slug(DEFAULT.name)}-{seed}"
        num_layers = len(self.pipeline.transformer.blocks)
        count = max(1, round(setting.share * num_layers))
        values = TrainConfig(
            output_dir=str(output_dir),
            seed=seed,
            train_batch_size=suite.batch_size,
            mixed_precision=suite.mixed_precision,
            checkpointing_steps=10**9,
            progress=False,
        ).to_dict()
        values["trajectories"] |= {
            "path": str(self.trajectories(setting, seed)),
            "num_trajectories": suite.num_trajectories,
            "num_inference_steps": self.sampler.num_inference_steps,
            "guidance_scale": self.sampler.guidance_scale,
            "height": self.world.size,
            "width": self.world.size,
            "num_frames": self.world.frames,
            "batch_size": 16,
        }
        values["warmup"]["max_train_steps"] = suite.warmup_steps
        values["sensitivity"]["num_states"] = suite.num_states
        values["optimizer"]["learning_rate"] = suite.learning_rate
        values["selection"] |= {"max_train_steps": suite.selection_steps, "num_linear_layers": count}
        layers = self.layers(setting.layers, count, seed)
        windows = None
        if setting.windows is not None:
            layers = layers or []
            rest = [layer for layer in range(num_layers) if layer not in layers]
            windows = rest if setting.windows == "rest" else self.layers(setting.windows, count, seed)
        if layers is not None:
            chosen = {"method": "layers", "layers": layers, "num_linear_layers": None, "window_layers": windows}
            values["selection"] |= chosen
        for name, value in setting.changes.items():
            section = values
            *path, last = name.split(".")
            for key in path:
                section = section[key]
            section[last] = value * section[last] if name == "optimizer.learning_rate" else value
        objective = values["objective"]
        if isinstance(objective["mse_steps"], float):
            objective["mse_steps"] = round(objective["mse_steps"] * suite.budget)
        if "max_train_steps" not in setting.changes:
            name = setting.objective if setting.objective in COST else objective["name"]
            second = "own_mse" if setting.objective == "own_mse_for_adm" else "adm"
            budget = round(setting.length * suite.budget)
            guided = values["trajectories"]["guidance_scale"] > 1
            values["max_train_steps"] = steps(name, budget, objective["mse_steps"], second, guided)
        config = from_dict(values, TrainConfig)
        if setting.after != "trajectories":
            return start_after(setting.after, base, config)
        return config

    def softmax_pairs(self, config: TrainConfig, results: dict[str, Any]) -> float:
        """Return the share of pairs of tokens that softmax attention keeps, over all layers."""
        layers, windows = len(self.pipeline.transformer.blocks), len(results.get("window_layers", ()))
        frames = self.world.frames
        kept = config.window.softmax_pairs(frames) * windows + layers - windows - len(results["linear_layers"])
        return kept / layers

    def layers(self, rule: str | None, count: int, seed: int) -> list[int] | None:
        """Return the layers of a setting's rule, None without one. The default run of the seed must be done."""
        if rule in ("default", "most sensitive"):
            selection = read_json(self.folder / "runs" / f"{slug(DEFAULT.name)}-{seed}" / "selection.json")
            if rule == "default":
                return selection["linear_layers"]
            alone = {int(layer): error for layer, error in selection["sensitivity"].items()}
            return [max(alone, key=alone.get)]
        return None if rule is None else fixed_layers(rule, count, len(self.pipeline.transformer.blocks), seed)

    def judge(self, student: torch.nn.Module, seed: int, name: str) -> dict[str, Any]:
        """Return all figures of a student, and keep some of its videos under `name`."""
        error, videos = self.sample(student, seed, len(self.start(seed)[-1]))
        write_safetensors(film(self.folder, name, seed), {"videos": videos[:FILMED]})
        if not videos.isfinite().all():
            return {"good": 0.0}
        reference = load_file(self.teacher_videos(seed))["videos"]
        return self.figures(videos, seed) | {"own_state_error": error, "psnr_to_teacher": psnr(videos, reference)}

    def figures(self, videos: torch.Tensor, seed: int) -> dict[str, float]:
        """Return the figures of the videos, with their distance to the teacher's if others of it were kept."""
        *_, captions = self.start(seed)
        videos = videos.float().clamp(-1, 1)
        explained = explain(videos, captions, self.world)
        found = score(explained, captions, self.world) | {"distance": self.distance(videos)}
        if self.suite.noises > 1:
            found["diversity"] = diversity(videos, self.suite.noises)
        if (kept := self.others(seed)) is not None:
            others, scenes = kept
            found["teacher_coverage"] = coverage(explained.scenes, scenes)
            found["teacher_distance"] = self.distance.between(videos, others)
        return found

    def _others(self, seed: int) -> tuple[torch.Tensor, Scenes] | None:
        """Return the teacher's videos from other noise and their explanation, None if none were kept."""
        if (others := load_file(self.teacher_videos(seed)).get("others")) is None:
            return None
        others = others.clamp(-1, 1)
        return others, explain(others, self.start(seed)[-1], self.world).scenes

    def probe(self, seed: int):
        """Return the measure for the curve: the velocity error on the student's own states over a few videos."""
        return lambda student: self.sample(student, seed, PROBED)[0]

    def sample(self, student: torch.nn.Module, seed: int, count: int) -> tuple[float, torch.Tensor]:
        """Sample from the first `count` starts of the seed; returns the velocity error and the videos, on the CPU."""
        noise, embeds, negative, _ = self.start(seed)
        noise, embeds = noise[:count], embeds[:count]
        first, sampler = slice(self.suite.compared), self.sampler
        models = student, self.pipeline.transformer
        settings = self.pipeline.scheduler, sampler.num_inference_steps, negative, sampler.guidance_scale
        error, videos = trajectory_error(*models, noise[first], embeds[first], *settings)
        rest = slice(len(videos), None)
        return error, torch.cat([videos.cpu(), self.sample_videos(student, noise[rest], embeds[rest], negative)])

    @torch.no_grad()
    def sample_videos(
        self,
        model: torch.nn.Module,
        noise: torch.Tensor,
        embeds: torch.Tensor,
        negative: torch.Tensor,
        scheduler: Any = None,
        steps: int | None = None,
        guidance: float | None = None,
    ) -> torch.Tensor:
        """Return videos sampled from this noise, on the CPU. None stands for the value that the teacher is sampled
        with."""
        scheduler = self.pipeline.scheduler if scheduler is None else scheduler
        steps = self.sampler.num_inference_steps if steps is None else steps
        guidance = self.sampler.guidance_scale if guidance is None else guidance
        parts = [noise[:0].cpu()]
        for start in range(0, len(noise), AT_ONCE):
            part = slice(start, start + AT_ONCE)
            under, without = Conditions(embeds[part]), Conditions(negative.expand_as(embeds[part]))
            for step in sample_steps(model, scheduler, steps, noise[part], under, without, guidance):
                last = step.x_next
            parts.append(last.cpu())
        return torch.cat(parts)

    def _start(self, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, list[str]]:
        """Return the noise, prompt embeddings, negative embedding and captions that all models of the seed share."""
        count = self.suite.videos // self.suite.noises
        if seed == TUNING_SEED:
            count = max(1, count // 2)
        captions = judged_captions(self.world, count, seed)
        captions = [caption for caption in captions for _ in range(self.suite.noises)]
        embeddings = encode_prompts(self.pipeline, captions)
        number = torch.arange(len(captions))
        negative = embeddings.take(number[:1], torch.ones(1, dtype=torch.bool), self.device)
        noise = self.noise("ablations", seed, len(captions))
        return noise, embeddings.take(number, device=self.device), negative, captions

    def noise(self, purpose: str, seed: int, count: int) -> torch.Tensor:
        shape = (3, self.world.frames, self.world.size, self.world.size)
        return torch.stack([draw_noise(shape, purpose, seed, i) for i in range(count)]).to(self.device)

    def trajectories(self, setting: Setting, seed: int) -> Path:
        """Return the folder of the trajectories, which a setting shares with the default run unless it changes them."""
        changed = [f"{name}-{value}" for name, value in setting.changes.items() if name.startswith("trajectories.")]
        return self.folder / "-".join(["trajectories", *map(slug, changed), str(seed)])

    def teacher_videos(self, seed: int) -> Path:
        return self.folder / f"teacher-{seed}.safetensors"


def diversity(videos: torch.Tensor, noises: int) -> float:
    """Return the mean squared difference between two videos with the same caption, of which `noises` stand together."""
    return 2 * videos.unflatten(0, (-1, noises)).var(1).mean().item()


def judged_captions(world: World, count: int, seed: int) -> list[str]:
    """Return the captions of a seed's videos, each once. They are others than the demo's."""
    return world.evaluation_captions(count, seed=901 + seed)


def film(folder: Path, name: str, seed: int) -> Path:
    """Return the file of the videos that were kept of a setting."""
    (folder / "films").mkdir(parents=True, exist_ok=True)
    return folder / "films" / f"{slug(name)}-{seed}.safetensors"
