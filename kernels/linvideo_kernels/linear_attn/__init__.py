"""Linear attention: four functions launch the kernels (passes.py). Importing this loads Triton."""

from linvideo_kernels.linear_attn.passes import apply, apply_backward, state, state_backward

__all__ = ["apply", "apply_backward", "state", "state_backward"]
