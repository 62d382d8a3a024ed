"""Trains the embedded teacher from scratch: `python -m linvideo.demo.train_teacher --output_dir DIR`.

Flow matching on videos rendered on the fly. Muon on the blocks' matrices and AdamW on the rest; t is drawn from a
logit-normal law shifted by 6, because position, shape and direction are decided at high noise; 10% of the captions are
replaced by the empty one so that classifier-free guidance works.

The direction of motion is learned last, and a second cycle of the learning rate helps it most. The shipped folder is

    python -m linvideo.demo.train_teacher --output_dir first
    python -m linvideo.demo.train_teacher --output_dir second --init_from first --seed 1 --max_train_steps 2500

both with --compile, about an hour on one CPU core.
"""

import argparse
import json
import math
import time
from pathlib import Path

import torch
from diffusers.training_utils import EMAModel
from tqdm.auto import tqdm

from linvideo.demo import teacher, world
from linvideo.models import load_pipeline, new_folder

SHIFT = 6.0


def shifted_logit_normal(batch: int, generator: torch.Generator) -> torch.Tensor:
    """Times in (0, 1), float [batch]: t = S s / (1 + (S - 1) s) with s = sigmoid(normal)."""
    s = torch.sigmoid(torch.randn(batch, generator=generator))
    return SHIFT * s / (1 + (SHIFT - 1) * s)


def make_optimizers(transformer: torch.nn.Module) -> list[torch.optim.Optimizer]:
    matrices = [p for n, p in transformer.named_parameters() if n.startswith("blocks.") and p.dim() == 2]
    chosen = {id(p) for p in matrices}
    rest = [p for p in transformer.parameters() if id(p) not in chosen]
    return [
        torch.optim.Muon(matrices, lr=4e-3, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=2e-3, weight_decay=0.0, betas=(0.9, 0.99)),
    ]


def train(
    output_dir: Path, steps: int, batch: int, seed: int, compile_blocks: bool, device: str, init_from: Path | None
) -> None:
    pipeline = load_pipeline(init_from) if init_from else teacher.build_pipeline(seed)
    transformer = pipeline.transformer.to(device).train()
    captions, empty = (e.to(device) for e in teacher.caption_embeddings(pipeline))
    ema = EMAModel(transformer.parameters(), decay=0.995, use_ema_warmup=True)
    optimizers = make_optimizers(transformer)

    def factor(step: int) -> float:
        return min(1.0, (step + 1) / 40) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps)))

    schedules = [torch.optim.lr_scheduler.LambdaLR(o, factor) for o in optimizers]
    if compile_blocks:
        for block in transformer.blocks:
            block.compile(dynamic=False)
    generator = torch.Generator().manual_seed(seed)
    average, started = None, time.time()
    progress = tqdm(range(steps), desc="teacher", mininterval=5)
    for step in progress:
        scenes = world.sample_scenes(batch, generator)
        clean = world.render(scenes).to(device)
        condition = captions[world.caption_number(scenes).to(device)]
        dropped = torch.rand(batch, generator=generator) < 0.1
        condition = torch.where(dropped.to(device)[:, None, None], empty, condition)
        noise = torch.randn(clean.shape, generator=generator).to(device)
        t = shifted_logit_normal(batch, generator).to(device)
        s = t[:, None, None, None, None]
        velocity = transformer((1 - s) * clean + s * noise, 1000 * t, condition, return_dict=False)[0]
        loss = (velocity - (noise - clean)).square().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(transformer.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        ema.step(transformer.parameters())
        average = loss.item() if average is None else 0.99 * average + 0.01 * loss.item()
        progress.set_postfix(loss=f"{average:.4f}")
        if (step + 1) % 1000 == 0 or step + 1 == steps:
            ema.store(transformer.parameters())
            ema.copy_to(transformer.parameters())
            save(pipeline, output_dir)
            ema.restore(transformer.parameters())
            print(
                f"step {step + 1}: loss {average:.4f}, {time.time() - started:.0f} s, saved to {output_dir}", flush=True
            )


def save(pipeline, folder: Path) -> None:
    """The whole folder, complete or not at all."""
    with new_folder(folder) as new:
        pipeline.save_pretrained(new)
        for file in new.rglob("*.json"):  # where --init_from lay on this machine is nobody's business
            config = json.loads(file.read_text())
            if config.pop("_name_or_path", None) is not None:
                file.write_text(json.dumps(config, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output_dir", type=Path, required=True, help="folder for the pipeline")
    parser.add_argument("--max_train_steps", type=int, default=6000)
    parser.add_argument("--train_batch_size", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--init_from", type=Path, help="continue from this folder, with a new learning rate cycle")
    parser.add_argument("--compile", action="store_true", help="compile the blocks (needs a C++ compiler on CPU)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--overwrite", action="store_true")
    args = parser.parse_args()
    if args.output_dir.exists() and not (args.overwrite and (args.output_dir / "model_index.json").is_file()):
        parser.error(f"{args.output_dir} exists; choose another --output_dir, or --overwrite a pipeline folder")
    steps, batch = args.max_train_steps, args.train_batch_size
    train(args.output_dir, steps, batch, args.seed, args.compile, args.device, args.init_from)


if __name__ == "__main__":
    main()
