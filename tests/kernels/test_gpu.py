"""The kernels on a device other than the current one, on another stream, and in CUDA graphs."""

import pytest
import torch
from cases import Case, make_inputs
from numerics import _moved, call, check, run

from linvideo.ops import linear_attn

OPTIONS = {
    "plain": {},
    "rope and mix": {"rope": True, "mix": 0.3},
    "mask": {"mask": "some"},
    "packed": {"packed": "rows", "rope": True},
}
CASES = [pytest.param(Case(head_dim=128, nq=300, nk=300, **option), id=name) for name, option in OPTIONS.items()]


def training(inputs: dict, grad: torch.Tensor, options: dict) -> list[torch.Tensor]:
    out = call(linear_attn, inputs, options)
    return [out.detach(), *torch.autograd.grad(out, list(inputs.values()), grad)]


def inference(inputs: dict, grad: torch.Tensor, options: dict) -> list[torch.Tensor]:
    with torch.no_grad():
        return [call(linear_attn, inputs, options)]


@pytest.mark.parametrize("case", CASES)
def test_a_device_other_than_the_current_one(case, gpu):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    assert torch.cuda.current_device() == 0
    inputs, grad = make_inputs(case, "cuda:1")
    actual = run(linear_attn, inputs, grad, case.options)
    assert torch.cuda.current_device() == 0 and all(x.device.index == 1 for x in actual.values())
    check(case, inputs, grad, actual)


@pytest.mark.parametrize("call_of", [inference, training])
@pytest.mark.parametrize("case", CASES)
def test_a_side_stream(case, call_of, gpu):
    """The kernels run on the current stream, not the default one: they wait for the long work before them there."""
    (inputs, grad), options = make_inputs(case, gpu), moved(case.options, gpu)
    expected = call_of(inputs, grad, options)
    values = {name: x.detach().clone() for name, x in inputs.items()}
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream), torch.no_grad():
        for x in inputs.values():
            x.zero_()
        torch.cuda._sleep(50_000_000)  # tens of milliseconds; meanwhile a kernel on another stream would read zeros
        for name, x in inputs.items():
            x.copy_(values[name])
    with torch.cuda.stream(stream):
        actual = call_of(inputs, grad, options)
    stream.synchronize()
    assert all(torch.equal(x, y) for x, y in zip(actual, expected, strict=True))


@pytest.mark.parametrize("call_of", [inference, training])
@pytest.mark.parametrize("case", CASES)
def test_a_cuda_graph_replays_on_new_values(case, call_of, gpu):
    (inputs, grad), options = make_inputs(case, gpu), moved(case.options, gpu)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call_of(inputs, grad, options)  # compiles the kernels, which must not happen during a capture
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call_of(inputs, grad, options)
    others, other_grad = make_inputs(case, gpu, seed=1)
    with torch.no_grad():
        grad.copy_(other_grad)
        for name, x in inputs.items():
            x.copy_(others[name])
    graph.replay()
    torch.cuda.synchronize()
    expected = call_of(others, other_grad, options)
    assert all(torch.equal(x, y) for x, y in zip(captured, expected, strict=True))


def moved(options: dict, device: str) -> dict:
    return {name: _moved(x, torch.device(device)) for name, x in options.items()}
