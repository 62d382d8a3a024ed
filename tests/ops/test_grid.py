"""How well the kernels' grids fill a GPU at Wan's shapes."""

import pytest
import torch

pytest.importorskip("triton")
from linvideo_kernels.linear_attn import configs  # noqa: E402

H100 = 132  # multiprocessors
SHAPES = [  # (heads, tokens): 1.3B and 14B at 480p and 720p
    (heads, tokens) for heads in (12, 40) for tokens in (21 * 30 * 52, 21 * 45 * 80)
]
KERNELS = {  # programs per head and item (2: one for each half of the feature map); whether they write partial sums
    "accumulate_state": (2, True),
    "apply_state": (1, False),
    "map_grad": (1, False),
    "project_grad": (1, True),
    "mix_grad": (1, True),
}
# Other tiles that the table may hold one day: (rows, programs per multiprocessor).
TILES = {
    "accumulate_state": [(64, 2), (128, 1)],
    "apply_state": [(64, 2), (128, 1)],
    "map_grad": [(64, 1), (128, 1)],
    "project_grad": [(64, 2), (128, 1)],
    "mix_grad": [],
}


def tiles(kernel: str) -> list[configs.Tile]:
    given = [set(), {"rope"}, {"mix"}, {"rope", "mix"}, {"factors"}, {"keys"}, {"rope", "keys"}]
    shipped = [configs.tile(kernel, 128, torch.bfloat16, 90, "hedgehog", frozenset(options)) for options in given]
    rivals = [configs.Tile(block, block // 16, 1, resident) for block, resident in TILES[kernel]]
    return list(dict.fromkeys([*shipped, *rivals]))


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize(("heads", "tokens"), SHAPES)
@pytest.mark.parametrize("kernel", KERNELS)
def test_grids_fill_the_multiprocessors(kernel, heads, tokens, batch):
    """The grid computes at least 95% of the tiles that the GPU has time for until the last program ends."""
    halves, partials = KERNELS[kernel]
    for tile in tiles(kernel):
        work = configs.deal_out(tile, tokens, batch, None, heads * halves, H100, partials)
        waves = -(-work.items * heads * halves // (tile.resident * H100))
        assert waves <= (5 if partials else 16)
        needed = -(-tokens // tile.block) * batch * heads * halves
        possible = waves * tile.resident * H100 * (work.rows // tile.block)
        assert needed >= 0.95 * possible, f"{tile}: {needed / possible:.3f}"


def test_a_small_grid_is_one_wave():
    """With fewer tiles than programs that fit on the GPU, each tile gets a program of its own."""
    work = configs.deal_out(configs.Tile(64, 4, 1, resident=2), 300, 1, None, 4, H100, True)
    assert (work.items, work.rows) == (5, 64)
