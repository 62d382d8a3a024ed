"""Arguments of the custom operators (linvideo/ops/whole.py, halves.py and tangent.py) for a case."""

import torch
from cases import Case, make_inputs
from numerics import _moved

from linvideo.ops.library import uses_kernels

OPS = torch.ops.linvideo


def operator_arguments(case: Case, device: str) -> dict[str, tuple]:
    """Return {name after "linear_attn": arguments} for the whole op, its two halves, their backwards and tangents.

    The tensors of the three forwards require gradients. Without kernels the operators never see a rotary embedding or a
    mixture.
    """
    inputs, grad = make_inputs(case, device)
    inputs = {name: x.detach().nan_to_num(0, 0, 0).requires_grad_() for name, x in inputs.items()}  # opcheck compares
    options = {name: _moved(x, torch.device(device)) for name, x in case.options.items()}
    fused = uses_kernels(inputs["q"])
    rope = options.get("rope", (None, None)) if fused else (None, None)
    mix = [inputs.get(name) if fused else None for name in ("softmax_out", "r")]
    name, precision = case.map[0], "ieee"
    scaling = options.get("scale", 1.0), case.map[1], case.eps
    keys = inputs["k"], inputs["v"], inputs.get("k_weight"), *rope
    ends = options.get("key_mask"), options.get("cu_seqlens_k")
    state_arguments = *keys, *ends, name, precision, rope[0] is not None
    with torch.no_grad():
        state, z, k = OPS.linear_attn_state(*state_arguments)
    rotated_keys = (k if rope[0] is not None else inputs["k"], *keys[1:])
    sums = [x.detach().requires_grad_() for x in (state, z)]
    queries = inputs["q"], *sums, inputs.get("q_weight"), *rope, *mix, options.get("cu_seqlens_q")
    normalizer = case.map[1] and mix[0] is None
    apply_arguments = *queries, name, *scaling, precision, rope[0] is not None, normalizer
    with torch.no_grad():
        _, den, q = OPS.linear_attn_apply_v2(*apply_arguments)
    rotated_queries = (q if rope[0] is not None else inputs["q"], *queries[1:])
    sums_grad = torch.randn_like(state), torch.randn_like(z)
    rows, weights = [inputs[x] for x in "qkv"], [inputs.get(f"{x}_weight") for x in "qk"]
    tensors = *weights, *rope, *mix, options.get("key_mask"), *(options.get(f"cu_seqlens_{x}") for x in "qk")
    with torch.no_grad():
        _, kept = OPS.linear_attn_v2(*rows, *tensors, name, *scaling, precision, True)
    rotated = [*kept[4:], *(() if kept[4:] else rows[:2]), rows[2]]
    kept = [*kept[:4], None, None][:4]  # only the kernels return T and its statistics
    return {
        "_v2": (*rows, *tensors, name, *scaling, precision, False),
        "_v2_backward": _detached(grad, *rotated, *tensors, *kept, name, *scaling, precision, True),
        "_state": state_arguments,
        "_state_backward": _detached(*sums_grad, *rotated_keys, *ends, state, z, name, precision),
        "_apply_v2": apply_arguments,
        "_apply_v2_backward": _detached(
            grad, torch.randn_like(den) if normalizer else None, *rotated_queries, name, *scaling, precision
        ),
        "_state_tangent": _detached(*keys[:3], *(_random_like(x) for x in keys[:3]), *ends, name),
        "_apply_tangent": _detached(
            *queries[:4], *(_random_like(x) for x in queries[:4]), queries[-1], name, *scaling, normalizer
        ),
    }


def _random_like(x: torch.Tensor | None) -> torch.Tensor | None:
    return None if x is None else torch.randn_like(x)


def _detached(*arguments):
    return tuple(x.detach() if torch.is_tensor(x) else x for x in arguments)


FORWARD_CHECKS = (
    "test_schema",
    "test_autograd_registration",
    "test_faketensor",
    "test_aot_dispatch_static",
    "test_aot_dispatch_dynamic",
)
DERIVATIVE_CHECKS = ("test_schema", "test_faketensor")


def check_operators(case: Case, device: str) -> None:
    """Run torch.library.opcheck on all operators."""
    for name, arguments in operator_arguments(case, device).items():
        checks = DERIVATIVE_CHECKS if name.endswith(("backward", "tangent")) else FORWARD_CHECKS
        torch.library.opcheck(getattr(OPS, f"linear_attn{name}").default, arguments, test_utils=checks)
