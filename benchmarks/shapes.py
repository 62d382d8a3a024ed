"""Named sizes to measure: attention shapes of video models, sweeps over one axis, and whole Wan models."""

from typing import NamedTuple

from linvideo.planning.known import KNOWN


class Shape(NamedTuple):
    batch: int
    tokens: int
    heads: int
    head_dim: int
    frames: int = 16  # latent frames, into which window attention divides the tokens
    text: int = 0  # text tokens among the tokens

    @property
    def frame_tokens(self) -> int:
        return (self.tokens - self.text) // self.frames

    def __str__(self) -> str:
        return f"batch {self.batch}, {self.tokens:,} tokens, {self.heads} heads of {self.head_dim}"


# Tokens are latent frames x rows x columns after patchifying, plus the text tokens where these share the attention.
MODELS = {
    "wan2.1-1.3b-480p": Shape(1, 21 * 30 * 52, 12, 128, frames=21),
    "wan2.1-1.3b-720p": Shape(1, 21 * 45 * 80, 12, 128, frames=21),
    "wan2.1-14b-480p": Shape(1, 21 * 30 * 52, 40, 128, frames=21),
    "wan2.1-14b-720p": Shape(1, 21 * 45 * 80, 40, 128, frames=21),
    "wan2.2-ti2v-5b-720p": Shape(1, 31 * 22 * 40, 24, 128, frames=31),
    "cogvideox-5b-480p": Shape(1, 13 * 30 * 45 + 226, 48, 64, frames=13, text=226),
    "hunyuanvideo-720p": Shape(1, 33 * 45 * 80 + 256, 24, 128, frames=33, text=256),
    "ltx-video-704p": Shape(1, 16 * 22 * 38, 32, 64, frames=16),
}
TOKENS = {f"n{tokens // 1024}k": Shape(1, tokens, 12, 128) for tokens in (1024 << i for i in range(9))}
DIMS = {f"d{dim}": Shape(1, 32768, 12, dim) for dim in (64, 96, 128)}
CPU = {f"cpu-n{tokens}": Shape(1, tokens, 2, 64) for tokens in (256, 512, 1024, 2048, 4096)}
# Softmax attention takes minutes here, so `--peers` should leave it out.
CPU_LONG = {f"cpu-n{tokens}": Shape(1, tokens, 2, 64) for tokens in (16384, 65536)}
# The frames and head size of Wan, with fewer heads and fewer tokens per frame.
CPU_WAN = {f"cpu-wan-n{21 * size}": Shape(1, 21 * size, 2, 128, frames=21) for size in (13 * 15, 15 * 26)}
TINY_SHAPE, INTERPRETED_SHAPE = "tiny", "interpreted"  # for tests; Triton's interpreter takes a second per tile
SHAPES = MODELS | TOKENS | DIMS | CPU | CPU_LONG | CPU_WAN
SHAPES |= {TINY_SHAPE: Shape(1, 96, 2, 16, frames=8), INTERPRETED_SHAPE: Shape(1, 16, 1, 16)}


class WanModel(NamedTuple):
    """A transformer's config and the shape of one video's latents, [16, F, H, W]."""

    config: dict
    latents: tuple[int, int, int, int]
    linear_layers: tuple[int, ...]  # counts of linear layers for which the whole model is timed
    text_tokens: int = 512

    @property
    def layers(self) -> int:
        return self.config["num_layers"]

    @property
    def tokens(self) -> int:
        _, frames, height, width = self.latents
        return frames * (height // 2) * (width // 2)

    @property
    def frame_tokens(self) -> int:
        return self.tokens // self.latents[1]

    @property
    def text_dim(self) -> int:
        return self.config.get("text_dim", 4096)


_SMALL, _LARGE = KNOWN["wan2.1-1.3b"], KNOWN["wan2.1-14b"]
_P480, _P720 = (16, 21, 60, 104), (16, 21, 90, 160)
WAN = {  # 81 frames; the middle count is the paper's
    "1.3b-480p": WanModel(_SMALL, _P480, (0, 16, 30)),
    "1.3b-720p": WanModel(_SMALL, _P720, (0, 16, 30)),
    "14b-480p": WanModel(_LARGE, _P480, (0, 22, 40)),
    "14b-720p": WanModel(_LARGE, _P720, (0, 22, 40)),
}
WINDOW = "window, "  # before the name of a softmax backend in rows of window layers, which use it for the near part
LINEAR_COUNTS = (0, 8, 12, 16, 18, 22)  # counts of composed forwards; all layers come on top
TINY = WanModel(  # for tests
    {"num_attention_heads": 2, "attention_head_dim": 24, "ffn_dim": 64, "num_layers": 3, "text_dim": 32},
    (16, 6, 8, 8),
    (0, 2, 3),
    text_tokens=5,
)
