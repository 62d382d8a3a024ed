"""Convert half of a model, make a video, save both: python examples/convert_and_generate.py [output folder]"""

import sys
import tempfile
from pathlib import Path

import torch
from diffusers import WanPipeline

import linvideo

output = Path(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp())
stock = linvideo.load_pipeline("linvideo/demo/teacher")  # a Hub id such as Wan-AI/Wan2.1-T2V-1.3B-Diffusers works, too
half = range(len(stock.transformer.blocks) // 2)  # `linvideo analyze` finds out which layers are the best
pipe = linvideo.convert(stock, layers=half, mode="linear")  # a new pipeline; the stock one stays as it was
print(linvideo.describe(pipe.transformer))

# Nothing is trained yet, so this video shows what training has to repair
settings = linvideo.sampling_settings(pipe)  # the size, frames, steps and guidance that this folder was made for
seed = torch.Generator().manual_seed(0)
frames = linvideo.generate_video(pipe, "a red disc moving left", generator=seed, **settings)
linvideo.save_video(frames, output / "disc.mp4", fps=linvideo.default_fps(pipe))

linvideo.save_pipeline(pipe, output / "converted")
again = WanPipeline.from_pretrained(output / "converted")  # diffusers finds our class because linvideo is imported
assert linvideo.describe(again.transformer).layers_linear == list(half)
print(f"wrote {output / 'disc.mp4'} and the pipeline folder {output / 'converted'}")
