"""The operations that FlopCounterMode counts for the ops."""

import os
import subprocess
import sys

import pytest
import torch
from cases import Case, make_inputs
from torch.utils.flop_counter import FlopCounterMode

from linvideo.ops import linear_attn, window_attn
from linvideo.ops.reference import linear_attn_reference


def test_a_counter_that_is_made_first():
    """Its own formulas stay, and it counts the first call."""
    code = """
import torch, linvideo.ops
from torch.utils.flop_counter import FlopCounterMode
q, k, v = torch.randn(3, 1, 10, 2, 16)
with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.mm: lambda *a, **k: 7}) as counter:
    linvideo.ops.linear_attn(q, k, v, feature_map="elu")
    print(counter.get_total_flops())
    q[0, 0] @ q[0, 0].T
print(counter.get_total_flops())
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    first, both = map(int, done.stdout.split())
    assert first == 4 * 10 * 2 * 16**2 and both == first + 7


def counted(op, inputs: dict) -> tuple[int, int]:
    """Return the operations of a forward and of its backward."""
    with FlopCounterMode(display=False) as counter:
        out = op(**inputs)
        forward = counter.get_total_flops()
        out.sum().backward()
    return forward, counter.get_total_flops() - forward


@pytest.mark.parametrize("feature_map", ["hedgehog", "elu"])
def test_the_count_of_operations(feature_map):
    """It is that of the reference, without its sums over rows; the backward also computes the logits again."""
    case = Case(head_dim=16, nq=60, nk=60, dtype="fp32", map=(feature_map, True))
    inputs, _ = make_inputs(case, "cpu")

    def of(op):
        return counted(lambda **x: op(**x, feature_map=feature_map), inputs)

    forward, backward = of(linear_attn)
    expected = of(linear_attn_reference)
    sums = 2 * case.batch * case.nq * case.heads * case.head_dim * (2 if feature_map == "hedgehog" else 1)
    again = 2 * 2 * case.batch * case.nq * case.heads * case.head_dim**2 if feature_map == "hedgehog" else 0
    assert forward == expected[0] - sums
    assert backward == expected[1] - 2 * sums + again


def test_the_count_of_a_window():
    """Without a far part it is that of softmax attention, 4 N^2 D and 10 N^2 D in each head."""
    rows = {name: torch.randn(2, 12, 3, 16, requires_grad=True) for name in "qkv"}
    options = {"frame_tokens": 4, "feature_map": "elu", "log_gain": torch.zeros(3)}
    pairs = 2 * 3 * 12**2 * 16
    assert counted(lambda **x: window_attn(**x, **options), rows) == (4 * pairs, 10 * pairs)
    near, _ = counted(lambda **x: window_attn(**x, **options, chunk=1, overlap=0), rows)
    linear, _ = counted(lambda **x: linear_attn(**x, feature_map="elu"), rows)
    assert near == 4 * pairs // 3 + linear
