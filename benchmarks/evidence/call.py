"""One forward and backward of each op with RoPE, for tools that observe a program (ncu, compute-sanitizer)."""

import sys

import torch

from benchmarks.peers import PEERS, WINDOW, Inputs
from benchmarks.shapes import SHAPES, TINY_SHAPE

dry_run = "--dry_run" in sys.argv
shape, device = (SHAPES[TINY_SHAPE], "cpu") if dry_run else (SHAPES["wan2.1-1.3b-480p"], "cuda")
inputs = Inputs.random(shape, torch.float32 if dry_run else torch.bfloat16, device)
gradients = []
for peer in (PEERS["linvideo hedgehog, RoPE"], PEERS[WINDOW]):
    gradients += torch.autograd.grad(peer.build(inputs)(), peer.leaves(inputs), inputs.gradient)
print("all finite" if all(gradient.isfinite().all() for gradient in gradients) else "NOT FINITE")
