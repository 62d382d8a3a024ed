"""The parts of the clock model, and their sum against an independent estimate."""

import pytest

pytest.importorskip("triton", reason="tests/aot needs triton")

import torch  # noqa: E402
from linvideo_kernels.linear_attn import configs  # noqa: E402
from linvideo_kernels.linear_attn.aot import compile_jobs  # noqa: E402

from benchmarks import clock_model  # noqa: E402
from benchmarks.machine_code import Code  # noqa: E402
from benchmarks.shapes import MODELS, Shape  # noqa: E402

EMPTY = Code(**dict.fromkeys(Code._fields, 0))._replace(resident=1, exponentials=1.0, ahead=0.0)


def made(name: str, tile: configs.Tile, capability: int = 90):
    """Return the job of a kernel and use ("<kernel>-<use>") with the given tile. Nothing is compiled."""
    jobs = compile_jobs(128, "hedgehog", torch.bfloat16, capability, options=("rope",) if name.endswith("cos") else ())
    kernel, _, use = name.partition("-")
    job = next(job for job in jobs if job.launch.kernel.__name__ == kernel and job.name.endswith("-" + use))
    constexprs = job.launch.constexprs | {"BLOCK": tile.block}
    return job._replace(launch=job.launch._replace(tile=tile, constexprs=constexprs))


@pytest.mark.parametrize(
    ("name", "tile", "loop", "resident", "ahead", "estimate"),
    [
        ("accumulate_state-plain", (128, 8, 2), 555, 1, 0.0, 94),
        ("accumulate_state-factors", (128, 8, 2), 613, 1, 0.0, 100),
        ("apply_state-normalize", (64, 4, 1), 1340, 2, 0.0, 42),
        ("apply_state-normalize_cos", (128, 8, 1), 1745, 1, 0.0, 70),
        ("apply_state-plain", (64, 4, 1), 1066, 2, 0.0, 40),
        ("map_grad-normalize_factors", (64, 8, 2), 1390, 1, 0.0, 98),
        ("map_grad-keys", (64, 8, 2), 1199, 1, 0.0, 89),
        ("map_grad-normalize_factors", (64, 8, 3), 1419, 1, 1.0, 79),
        ("map_grad-keys", (64, 8, 3), 1228, 1, 1.0, 71),
        ("project_grad-plain", (64, 4, 2), 418, 2, 0.0, 50),
    ],
)
def test_within_a_third_of_an_independent_estimate(name, tile, loop, resident, ahead, estimate):
    """Both estimates are clocks per row and head, from the machine code of the same kernels (D = 128, sm_90)."""
    job = made(name, configs.Tile(*tile))
    code = EMPTY._replace(loop=loop, resident=resident, ahead=ahead)
    assert clock_model.clocks(job, code).total == pytest.approx(estimate, rel=0.3)


def test_the_parts_of_the_model():
    job = made("accumulate_state-plain", configs.Tile(128, 8, 1))
    clocks = clock_model.clocks(job, EMPTY._replace(loop=640))
    assert clocks.tensor == pytest.approx(8 * 128**2 / (790e12 / 132 / 1.755e9))  # xW and phi^T y, each half
    assert clocks.issue == 2 * 640 * 8 / 4 / 128
    assert clocks.exponentials == 2 * 128 / 16
    assert clocks.memory == pytest.approx(2 * 256 / (4.3e12 / 132 / 1.755e9))
    assert clocks.serial == pytest.approx(clocks.tensor + clocks.issue + clocks.memory)
    assert clocks.bound == "serial" and clocks.total == clocks.serial
    ahead = clock_model.clocks(job, EMPTY._replace(loop=640, ahead=1.0))
    assert ahead.serial == pytest.approx(clocks.serial - clocks.memory)
    shared = clock_model.clocks(job, EMPTY._replace(loop=640, ahead=1.0, resident=2))
    assert shared.serial == ahead.serial / 2 and shared.bound == "tensor" and shared.total == clocks.tensor


def test_a_grid_that_does_not_fill_its_last_wave_takes_longer():
    tile = configs.Tile(64, 8, 1)
    job = made("map_grad-keys", tile)
    assert clock_model.utilisation(job, EMPTY, Shape(1, 132 * 64, 1, 128)) == 1.0
    assert clock_model.utilisation(job, EMPTY, Shape(1, 64, 133, 128)) == pytest.approx(133 / 264)
    assert all(0.5 < clock_model.utilisation(job, EMPTY, shape) <= 1.0 for shape in list(MODELS.values())[:4])


def test_the_model_divides_the_rows_as_a_launch_does():
    compared = set()
    for options in ((), ("rope",)):
        for job in compile_jobs(128, "hedgehog", torch.bfloat16, 90, options=options):
            kernel, _, args, _ = job.launch
            given = dict(zip((parameter.name for parameter in kernel.params), args, strict=False))
            if {"splits", "rows"} <= set(given) and kernel.__name__ in clock_model.MOVED:
                work, _ = clock_model.dealt_out(job, Shape(1, 4096, 16, 128))
                assert (work.splits, work.rows) == (given["splits"], given["rows"]), job.name
                compared.add(kernel.__name__)
    assert compared == {"accumulate_state", "apply_state", "map_grad", "project_grad"}


@pytest.mark.parametrize("capability", clock_model.GPUS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_every_row_kernel_has_clocks_on_every_gpu(capability, dtype):
    for feature_map, options in (("hedgehog_joint", ("rope", "mix")), ("elu", ())):
        jobs = compile_jobs(64, feature_map, dtype, capability, options=options)
        rows = [job for job in jobs if job.launch.kernel.__name__ in clock_model.MOVED]
        assert len(rows) >= 3
        assert all(clock_model.clocks(job, EMPTY._replace(loop=100)).total > 0 for job in rows)
