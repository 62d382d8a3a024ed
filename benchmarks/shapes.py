"""The shapes that benchmarks run, by name: (batch, tokens, heads, head_dim)."""

WAN = {
    "wan-1.3b-480p": (1, 32760, 12, 128),
    "wan-1.3b-720p": (1, 75600, 12, 128),
    "wan-14b-480p": (1, 32760, 40, 128),
    "wan-14b-720p": (1, 75600, 40, 128),
}
SWEEP = {f"n{tokens}": (1, tokens, 12, 128) for tokens in (1024, 4096, 16384, 65536)}
CPU = {f"cpu-n{tokens}": (1, tokens, 2, 64) for tokens in (256, 1024, 4096, 8192)}
SHAPES = WAN | SWEEP | CPU
