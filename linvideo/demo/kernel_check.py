"""Compares one training step through the Triton kernels with the same step through the reference.

On CUDA the kernels run on the device. Elsewhere they run in Triton's interpreter, which has to be chosen before triton
is imported and therefore needs a process of its own: this module, run with `python -m`.
"""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import torch

from linvideo.models import load_pipeline
from linvideo.ops.reference import linear_attn_reference

SEED = 0


class KernelCheckFailed(RuntimeError):
    """Raised when the process that runs the kernels ends with an error."""


def check_kernels(folder: str | os.PathLike, device: str) -> dict[str, float | str] | None:
    """Load the converted pipeline in `folder` and take one flow-matching step in both ways.

    Return a dict with the fields below, or None if triton is not installed (it exists for Linux only).

        kernels: "cuda" or "interpreter".
        loss_kernels, loss_reference: The two losses.
        gradient_error: Norm of the difference of all gradients over the norm of the reference's.

    Raises:
        KernelCheckFailed: The process with the interpreter failed; the message has its last line.
    """
    if importlib.util.find_spec("triton") is None:
        return None
    if torch.device(device).type == "cuda":
        return compare(folder, device)
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "linvideo.demo.kernel_check", str(folder)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    if run.returncode:
        raise KernelCheckFailed(f"the kernel check failed: {(run.stderr.strip().splitlines() or ['no message'])[-1]}")
    return json.loads(run.stdout.strip().splitlines()[-1])


def compare(folder: str | os.PathLike, device: str) -> dict[str, float | str]:
    transformer = load_pipeline(folder).transformer.to(device).train()
    loss, gradients = training_step(transformer)
    with mock.patch("linvideo.nn.linear_attention.linear_attn", linear_attn_reference):
        reference_loss, reference_gradients = training_step(transformer)
    return {
        "kernels": "cuda" if torch.device(device).type == "cuda" else "interpreter",
        "loss_kernels": loss,
        "loss_reference": reference_loss,
        "gradient_error": ((gradients - reference_gradients).norm() / reference_gradients.norm()).item(),
    }


def training_step(transformer: torch.nn.Module) -> tuple[float, torch.Tensor]:
    """Return the loss of one video, and the gradients of all weights as one vector."""
    generator = torch.Generator().manual_seed(SEED)
    noise, target = torch.randn(2, 1, 3, 8, 16, 16, generator=generator).to(transformer.device)
    text = torch.randn(1, 16, transformer.config.text_dim, generator=generator).to(transformer.device)
    timestep = torch.tensor([700.0], device=transformer.device)
    transformer.zero_grad()
    loss = (transformer(noise, timestep, text, return_dict=False)[0] - target).square().mean()
    loss.backward()
    return loss.item(), torch.cat([p.grad.flatten() for p in transformer.parameters() if p.grad is not None])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="folder of a converted pipeline of the embedded world")
    print(json.dumps(compare(parser.parse_args().folder, "cpu")))
