"""tune: the tiles that it offers, and how it compares results."""

import pytest
import torch

pytest.importorskip("triton", reason="tune needs triton")

from benchmarks import tune  # noqa: E402


def test_a_nan_is_no_agreement():
    right, wrong = torch.ones(3), torch.full((3,), float("nan"))
    for results in ((right, wrong), (wrong, right)):
        assert not tune.difference(results, (right, right)) < 1e9
    assert tune.difference((right, None), (right, None)) == 0


def test_the_defaults_are_among_the_choices():
    """argparse doesn't check defaults: a renamed shape would only fail on a GPU, after all kernels are compiled."""
    for action in tune.make_parser()._actions:
        if action.choices and action.default is not None:
            chosen = action.default if isinstance(action.default, list) else [action.default]
            assert set(chosen) <= set(action.choices), action.dest


def test_descriptors_are_offered_only_where_they_can_read():
    for kernel in {use.kernel for use in tune.USES.values()}:
        for options in ([], ["rope"], ["key_mask"], ["packed"], ["expanded"]):
            offered = any(tile.tma for tile in tune.candidates(kernel, 90, options))
            fits = kernel == "accumulate_state" and options in ([], ["rope"])
            fits |= kernel == "apply_state" and options in ([], ["rope"], ["key_mask"])
            assert offered == fits, (kernel, options)
    assert not any(tile.tma for tile in tune.candidates("apply_state", 80, []))
