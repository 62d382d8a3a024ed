import pytest
import torch
from tiny import tiny_transformer

from linvideo.models import convert
from linvideo.models.branches import gates
from linvideo.run.optimizer import OptimizerConfig, StudentOptimizer
from linvideo.transfer.selection import (
    SelectionConfig,
    add_penalties,
    anneal_alpha,
    count_penalty,
    initial_r,
    lowest,
    round_r,
    rounding_penalty,
)

R = [0.9, 0.6, 0.3, 0.1]


def test_continuous_count():
    r = torch.tensor(R, requires_grad=True)
    penalty = count_penalty(r, target=1)
    assert torch.allclose(penalty, torch.tensor((0.475 - 0.75) ** 2))
    penalty.backward()
    assert torch.allclose(r.grad, torch.full((4,), 2 * (0.475 - 0.75) / 4))
    assert float(count_penalty(torch.tensor([1.0, 0.0, 1.0, 1.0]), target=1)) == 0


def test_rounded_count_is_straight_through():
    r = torch.tensor(R, requires_grad=True)
    penalty = count_penalty(r, target=1, count="rounded")
    assert float(penalty.detach()) == 1.0  # two round to 0
    penalty.backward()
    assert torch.allclose(r.grad, torch.full((4,), -2.0))  # gradient descent raises every r equally
    assert float(count_penalty(torch.tensor(R), target=2, count="rounded")) == 0


@pytest.mark.parametrize("alpha", [2.0, 20.0])
def test_rounding_penalty(alpha):
    r = torch.tensor(R, dtype=torch.float64, requires_grad=True)
    penalty = rounding_penalty(r, alpha)
    by_hand = sum(1 - abs(2 * x - 1) ** alpha for x in R)
    assert float(penalty.detach()) == pytest.approx(by_hand)
    penalty.backward()
    slope = [-2 * alpha * abs(2 * x - 1) ** (alpha - 1) * (1 if x > 0.5 else -1) for x in R]
    assert r.grad.tolist() == pytest.approx(slope)
    assert float(rounding_penalty(torch.tensor([0.0, 1.0, 1.0]), alpha)) == 0
    middle = torch.tensor([0.5], requires_grad=True)
    rounding_penalty(middle, alpha).backward()
    assert middle.grad.isfinite().all()


def test_alpha_goes_from_20_to_2():
    config = SelectionConfig(max_train_steps=10)
    assert anneal_alpha(config, 0) == 20 and anneal_alpha(config, 9) == pytest.approx(2)
    values = [anneal_alpha(config, step) for step in range(10)]
    assert values == sorted(values, reverse=True)


@pytest.mark.parametrize("count", ["continuous", "rounded"])
def test_add_penalties_adds_the_weighted_gradients(count):
    parameters = [torch.nn.Parameter(torch.tensor([x])) for x in R]
    for parameter in parameters:
        parameter.grad = torch.full((1,), 0.5)
    config = SelectionConfig(count=count, lambda_con=0.3, lambda_reg=0.02, max_train_steps=10)
    report = add_penalties(parameters, 1, config, step=9)

    r = torch.tensor(R, requires_grad=True)
    (0.3 * count_penalty(r, 1, count) + 0.02 * rounding_penalty(r, 2.0)).backward()
    assert torch.allclose(torch.cat([p.grad for p in parameters]), 0.5 + r.grad)
    assert report["grad_r_task"] == pytest.approx(1.0)
    assert report["loss_con"] == pytest.approx(0.3 * float(count_penalty(torch.tensor(R), 1, count)))
    assert report["loss_reg"] == pytest.approx(0.02 * float(rounding_penalty(torch.tensor(R), 2.0)))


@pytest.mark.parametrize("target", [1, 3, 5])
def test_lowest_meets_the_target_whatever_r_is(target):
    for r in ({i: 0.9 for i in range(6)}, {i: 0.0 for i in range(6)}, dict(enumerate([0.5, 0.4, 0.9, 0.4, 0.1, 0.2]))):
        chosen = lowest(r, target)
        assert len(chosen) == target == len(set(chosen))
        assert max(r[i] for i in chosen) <= min(r[i] for i in r if i not in chosen)


def test_nan_cannot_be_ranked():
    with pytest.raises(ValueError, match=r"values of layers \[1\] are NaN"):
        lowest({3: 0.5, 1: float("nan"), 0: 0.7}, 2)


def test_ties_go_to_the_earlier_layer():
    assert lowest({3: 0.5, 1: 0.5, 2: 0.5, 0: 0.7}, 2) == round_r({2: 0.5, 3: 0.5, 1: 0.5}, 2) == [1, 2]
    r = initial_r({2: 1.0, 1: 1.0, 0: 2.0})
    assert r[1] < r[2] < r[0]


def test_threshold_takes_every_r_below_a_half():
    r = {3: 0.49, 0: 0.5, 1: 0.1, 2: 0.9}
    assert round_r(r, 1, "threshold") == [1, 3]
    assert round_r(r, 1) == [1] and round_r(r, 3) == [0, 1, 3]
    with pytest.raises(ValueError, match="an r below 0.5, got 0.60 as the smallest.*selection.rounding top_k"):
        round_r({0: 0.6, 1: 0.7}, 1, "threshold")


def test_initial_r_ranks_by_sensitivity_inside_the_open_interval():
    r = initial_r({0: 0.3, 1: 5.0, 2: 0.001})
    assert r[2] == pytest.approx(0.6) and r[1] == pytest.approx(0.95) and r[2] < r[0] < r[1]


@pytest.mark.parametrize("count", ["continuous", "rounded"])
def test_r_separates_the_layers_and_stays_in_the_unit_interval(count):
    """Half of the layers are costly when linear (their task gradient pulls r towards 1), the others are not."""
    student = convert(tiny_transformer(num_layers=4), r_init=0.8)
    config = SelectionConfig(count=count, num_linear_layers=2)
    lambdas = {"continuous": (0.2, 0.015), "rounded": (0.001, 0.01)}
    config.lambda_con, config.lambda_reg = lambdas[count]
    optimizer = StudentOptimizer(student, OptimizerConfig(), 120, config.r_learning_rate)
    config.max_train_steps = 120
    named = gates(student)
    slope = {0: -0.05, 1: -0.001, 2: -0.04, 3: -0.0005}
    for step in range(120):
        for layer, r in named.items():
            r.grad = torch.full((1,), slope[layer])
        add_penalties(list(named.values()), 2, config, step)
        optimizer.step()
        assert all(0 <= float(r.detach()) <= 1 for r in named.values())
    r = {layer: float(value.detach()) for layer, value in named.items()}
    assert lowest(r, 2) == [1, 3]
    assert min(r[0], r[2]) - max(r[1], r[3]) > 0.3


def test_r_has_its_own_optimizer_and_is_not_clipped_with_the_weights():
    student = convert(tiny_transformer(num_layers=2), r_init=0.8)
    optimizer = StudentOptimizer(student, OptimizerConfig(learning_rate=1e-3, max_grad_norm=1.0), 10, 2e-2)
    own = {id(r) for r in gates(student).values()}
    assert own == {id(p) for group in optimizer.r_adam.param_groups for p in group["params"]}
    in_adamw = {id(p) for group in optimizer.adamw.param_groups for p in group["params"]}
    assert own.isdisjoint(in_adamw) and in_adamw | own == {id(p) for p in student.parameters()}
    for parameter in student.parameters():
        parameter.grad = torch.full_like(parameter, 1e-3)
    optimizer.step()
    assert all(float(r.detach()) == pytest.approx(0.78, abs=1e-4) for r in gates(student).values())


def test_not_finite_gradients_move_nothing():
    student = convert(tiny_transformer(num_layers=2))
    optimizer = StudentOptimizer(student, OptimizerConfig(), 10, 2e-2)
    before = {name: p.detach().clone() for name, p in student.named_parameters()}
    for bad in (next(iter(gates(student).values())), student.proj_out.weight):
        for parameter in student.parameters():
            parameter.grad = torch.ones_like(parameter)
        bad.grad.view(-1)[0] = float("nan")
        assert optimizer.step() is None
        assert all(torch.equal(before[name], p) for name, p in student.named_parameters())
        assert all(p.grad is None for p in student.parameters())


def test_skipped_steps_move_the_schedule():
    student = convert(tiny_transformer(num_layers=1))
    optimizer = StudentOptimizer(student, OptimizerConfig(learning_rate=1e-3, lr_warmup_steps=10), 20, 2e-2)
    rate = optimizer.adamw.param_groups[0]
    student.proj_out.weight.grad = torch.full_like(student.proj_out.weight, float("nan"))
    assert optimizer.step() is None and rate["lr"] == pytest.approx(1e-4)
    optimizer.skip()
    assert rate["lr"] == pytest.approx(2e-4)


def test_target():
    assert SelectionConfig().target(8) == 4 and SelectionConfig(num_linear_layers=8).target(8) == 8
    assert SelectionConfig(method="layers", layers=[0, 7]).target(8) == 2
    with pytest.raises(ValueError, match="at most the model's 8 layers, got 9"):
        SelectionConfig(num_linear_layers=9).target(8)
    with pytest.raises(ValueError, match="must lie in 0 to 7"):
        SelectionConfig(method="layers", layers=[0, 8]).target(8)
