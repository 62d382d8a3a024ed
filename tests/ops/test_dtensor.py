"""DTensors sharded by batch, sequence or heads, on two processes."""

import torch
import torch.distributed as dist
from cases import Case, make_inputs
from numerics import call
from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh

from linvideo.ops import linear_attn, linear_attn_apply, linear_attn_state, window_attn

RANKS = 2
CASE = Case(head_dim=8, nq=8, dtype="fp32", heads=2, group=2, rope=True, mix=0.3, mask="some", map=("hedgehog", True))
AXES = {"rows": (0, 1, 2), "weight": (None, None, 0), "table": (None, 0, None), "mask": (0, 1, None)}
WINDOW = {"frame_tokens": 2, "chunk": 1, "overlap": 0}


def kind(name: str) -> str:
    return "weight" if name.endswith("weight") or name == "log_gain" else "rows" if name != "r" else "whole"


def window(q, k, v, q_weight, k_weight, log_gain, **_):
    return window_attn(q, k, v, q_weight=q_weight, k_weight=k_weight, log_gain=log_gain, **WINDOW)


def assert_shards(mesh, axis: int | None, op, inputs: dict, options: dict, grad: torch.Tensor) -> None:
    """Assert that the op gives the values and gradients of whole tensors, and shards of its output."""

    def placed(x: torch.Tensor, kind: str):
        axes = AXES.get(kind)
        at = None if axis is None or axes is None else axes[axis]
        return distribute_tensor(x.detach(), mesh, [Replicate() if at is None else Shard(at)])

    sharded = {name: placed(x, kind(name)).requires_grad_() for name, x in inputs.items()}
    sharded_options = dict(options)
    if "rope" in options:
        sharded_options["rope"] = tuple(placed(x, "table") for x in options["rope"])
        sharded_options["key_mask"] = placed(options["key_mask"], "mask")
    out, whole = call(op, sharded, sharded_options), call(op, inputs, options)
    if op is linear_attn or axis != 1:
        assert out.placements == sharded["q"].placements
    grads = torch.autograd.grad(out, list(sharded.values()), placed(grad, "rows"))
    expected = torch.autograd.grad(whole, list(inputs.values()), grad)
    for x, y in zip((out, *grads), (whole, *expected), strict=True):
        torch.testing.assert_close(x.full_tensor(), y, rtol=1e-4, atol=1e-5)


def assert_results_follow_arguments(rows: dict) -> None:
    """Assert that a call with other flags is not taken for one before it with the same shapes."""
    sums = linear_attn_state(rows["k"], rows["v"], feature_map="elu")
    alone = linear_attn_apply(rows["q"], *sums, feature_map="elu")
    out, den = linear_attn_apply(rows["q"], *sums, feature_map="elu", return_normalizer=True)
    assert torch.equal(out.full_tensor(), alone.full_tensor()) and den.full_tensor().shape == (2, 2, 8)
    gain = distribute_tensor(torch.zeros(2), rows["q"].device_mesh, [Shard(0)])
    options = {"feature_map": "elu", "log_gain": gain} | WINDOW
    with torch.no_grad():
        window_attn(**rows, **options)
    q = rows["q"].detach().requires_grad_()
    window_attn(q, rows["k"], rows["v"], **options).sum().backward()
    assert q.grad.full_tensor().isfinite().all()


def run_rank(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/ranks", rank=rank, world_size=RANKS)
    mesh = init_device_mesh("cpu", (RANKS,))
    inputs, grad = make_inputs(CASE, "cpu")
    inputs = {name: x.detach().nan_to_num(0, 0, 0).requires_grad_() for name, x in inputs.items()}
    for axis in (None, 0, 1, 2):
        assert_shards(mesh, axis, linear_attn, inputs, CASE.options, grad)
    rows = {name: torch.randn(2, 8, 2, 8, requires_grad=True) for name in "qkv"}
    small = {name: inputs["k_weight"].detach().clone().requires_grad_() for name in ("q_weight", "k_weight")}
    rows |= small | {"log_gain": torch.zeros(2, requires_grad=True)}
    torch.manual_seed(0)
    for axis in (None, 0, 1, 2):
        assert_shards(mesh, axis, window, rows, {}, torch.randn(2, 8, 2, 8))
    shard_heads = {name: distribute_tensor(x.detach(), mesh, [Shard(2)]) for name, x in rows.items() if name in "qkv"}
    assert_results_follow_arguments(shard_heads)
    uneven = [distribute_tensor(torch.randn(1, 4, 3, 8), mesh, [Shard(2)]) for _ in "qkv"]  # 2 heads and 1 head
    whole = linear_attn(*(x.full_tensor() for x in uneven), feature_map="elu")
    torch.testing.assert_close(linear_attn(*uneven, feature_map="elu").full_tensor(), whole)
    compiled = torch.compile(lambda q, k, v: linear_attn(q, k, v, feature_map="elu"), backend="aot_eager")
    q, k, v = (distribute_tensor(rows[name].detach(), mesh, [Shard(2)]) for name in "qkv")
    torch.testing.assert_close(compiled(q, k, v).full_tensor(), linear_attn(q, k, v, feature_map="elu").full_tensor())
    dist.destroy_process_group()


def test_dtensors(tmp_path):
    torch.multiprocessing.spawn(run_rank, (str(tmp_path),), nprocs=RANKS)
