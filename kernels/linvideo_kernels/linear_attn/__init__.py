"""Linear attention: `forward` and `backward` launch the kernels. Importing this loads Triton."""

from linvideo_kernels.linear_attn.backward import backward
from linvideo_kernels.linear_attn.forward import forward

__all__ = ["backward", "forward"]
