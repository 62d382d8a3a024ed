"""How the operators may be sharded if their tensors are DTensors: by batch, by heads, and by sequence.

With keys sharded by sequence, S and z are partial sums, which DTensor reduces before the queries read them. Other
placements are redistributed, as for PyTorch's own operators. `linear_attn` runs DTensors as its two halves.
"""

from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor._op_schema import RuntimeSchemaInfo
from torch.distributed.tensor.experimental import register_sharding

from linvideo.ops import halves, window_library

WAYS = ("batch", "heads", "sequence")
# The axis of a tensor that is sharded in each of these ways; None where every rank has the whole tensor, "sum" where
# the tensor is a sum over the ranks.
ROWS, WEIGHT, TABLE, MASK = (0, 2, 1), (None, 0, None), (None, None, 0), (0, None, 1)
SUMS, NUMBERS, WHOLE = (0, 1, None), (0, 1, 2), (None, None, None)
SUMS_OF_ROWS, WEIGHT_GRAD, R_GRAD = (0, 1, "sum"), ("sum", 0, "sum"), ("sum", "sum", "sum")
STATE = (ROWS, ROWS, WEIGHT, TABLE, TABLE, MASK, WHOLE)
APPLY = (ROWS, SUMS, SUMS, WEIGHT, TABLE, TABLE, ROWS, WHOLE, WHOLE)
WINDOW = (ROWS, ROWS, ROWS, WEIGHT, WEIGHT, WEIGHT, WHOLE, WHOLE, MASK)


def _register(op, ways: tuple[str, ...], tensors: tuple, results: tuple, exists) -> None:
    """Register how an operator can be sharded.

    Args:
        op: The operator.
        ways: Those of WAYS that it supports.
        tensors, results: Axes of the first arguments, which are tensors, and of the results.
        exists: Function of the arguments, by name, that says of each result whether it exists. An empty tensor stands
            for one that doesn't.
    """
    names = [argument.name for argument in op._schema.arguments]

    @register_sharding(op)
    def _(*arguments):
        given = dict(zip(names, arguments, strict=False))
        there = exists(given)
        shardings = []
        for way in (None, *(way for way in ways if _possible(way, given))):
            of_results = [_placement(axes, way if here else None) for axes, here in zip(results, there, strict=True)]
            of_tensors = [
                None if x is None else _placement(axes, way) for axes, x in zip(tensors, arguments, strict=False)
            ]
            shardings.append((of_results, of_tensors + [None] * (len(arguments) - len(tensors))))
        return shardings

    # DTensor remembers its choice for each shape, and for those other arguments that this names: all after the tensors.
    # `register_sharding` would name integers only, and no bool such as `return_normalizer`.
    DTensor._op_dispatcher.sharding_propagator.op_to_schema_info[op] = RuntimeSchemaInfo(
        len(tensors), needs_pytree=True
    )


def _placement(axes: tuple, way: str | None):
    axis = None if way is None else axes[WAYS.index(way)]
    return Replicate() if axis is None else Partial() if axis == "sum" else Shard(axis)


def _possible(way: str, given: dict) -> bool:
    """Return whether each rank gets as many key heads, with their query heads, or whole packed sequences."""
    if way != "heads":
        return given.get("cu_seqlens") is None
    keys, axis = (given["k"], 2) if "k" in given else (given["state"], 1)
    return keys.shape[axis] % keys.mesh.size() == 0


_register(halves.state_op, WAYS, STATE, (SUMS_OF_ROWS, SUMS_OF_ROWS, ROWS), lambda x: (True, True, x["save_rotated"]))
_register(
    halves.apply_op,
    WAYS,
    APPLY,
    (ROWS, NUMBERS, ROWS),
    lambda x: (True, x["return_normalizer"], x["save_rotated"]),
)
_register(
    halves.state_backward_op,
    WAYS,
    (SUMS, SUMS, *STATE, SUMS, SUMS),
    (ROWS, ROWS, WEIGHT_GRAD),
    lambda x: (True, True, x["weight"] is not None),
)
_register(
    halves.apply_backward_op,
    WAYS,
    (ROWS, NUMBERS, *APPLY),
    (ROWS, SUMS_OF_ROWS, SUMS_OF_ROWS, WEIGHT_GRAD, ROWS, R_GRAD),
    lambda x: (True, True, True, *(x[name] is not None for name in ("weight", "softmax_out", "r"))),
)
_register(
    window_library.forward_op,
    WAYS[:2],
    WINDOW,
    (ROWS, NUMBERS, ROWS, ROWS),
    lambda x: (True, x["training"], *[x["training"] and x["cos"] is not None] * 2),
)
_register(
    window_library.backward_op,
    WAYS[:2],
    (ROWS, *WINDOW, ROWS, NUMBERS),
    (ROWS, ROWS, ROWS, WEIGHT_GRAD, WEIGHT_GRAD, WEIGHT_GRAD),
    lambda x: (*[x["rows"]] * 3, True, *(x[name] is not None for name in ("q_weight", "k_weight"))),
)
