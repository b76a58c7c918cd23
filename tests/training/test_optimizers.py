import importlib.util

import pytest
import torch
from torch import nn

from graft.core.errors import GraftError
from graft.training import checkpoints, optimizers

EXTRA = importlib.util.find_spec("pytorch_optimizer") is not None
NAMES = ["adamw", "SGD", "Adafactor", "rmsprop", "NAdam", "Rprop", "ASGD", "Muon", "snsm"]
NAMES += ["lion", "prodigy", "schedulefreeadamw", "came", "soap", "adopt", "madgrad", "rose"] if EXTRA else []


def problem(dtype=torch.float32, shapes=((4, 6), (6,))):
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(shape).to(dtype)) for shape in shapes]


def descend(optimizer, parameters, steps):
    for _ in range(steps):
        loss = sum((p.float() - 1).pow(4).sum() for p in parameters)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_state_saved_and_restored_goes_on_to_the_same_bits(name, dtype, tmp_path):
    def build(parameters):
        return optimizers.build(name, parameters, learning_rate=0.01)

    shapes = [(4, 6), (6, 6)] if name == "Muon" else [(4, 6), (6,)]  # Muon is for matrices only
    straight = problem(dtype, shapes)
    optimizer = build(straight)
    descend(optimizer, straight, 3)
    state = {"optimizer": optimizer.state_dict(), "parameters": straight, "random": torch.get_rng_state()}
    checkpoints.save(tmp_path, 3, state)
    descend(optimizer, straight, 3)

    resumed = problem(dtype, shapes)
    optimizer = build(resumed)
    _, saved = checkpoints.newest(tmp_path)
    with torch.no_grad():
        for p, value in zip(resumed, saved["parameters"]):
            p.copy_(value)
    optimizers.restore(optimizer, saved["optimizer"])
    torch.set_rng_state(saved["random"])
    descend(optimizer, resumed, 3)
    assert all(torch.equal(a, b) for a, b in zip(straight, resumed))


@pytest.mark.skipif(not EXTRA, reason="needs pytorch-optimizer")
def test_a_state_that_cannot_be_saved_is_refused_before_the_run():
    with pytest.raises(GraftError, match="adashift has a state that cannot be saved: a deque"):
        optimizers.build("adashift", problem(), learning_rate=0.1)


def test_weight_decay_shrinks_matrices_and_nothing_else():
    parameters = problem()
    before = [p.detach().clone() for p in parameters]
    optimizer = optimizers.build("sgd", parameters, learning_rate=0.1, weight_decay=0.5)
    for p in parameters:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert torch.allclose(parameters[0], before[0] * (1 - 0.1 * 0.5))
    assert torch.equal(parameters[1], before[1])


def test_no_weight_decay_means_none_whatever_the_optimizers_default():
    parameters = problem()
    before = [p.detach().clone() for p in parameters]
    optimizer = optimizers.build("adamw", parameters, learning_rate=0.1)
    for p in parameters:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(parameters, before))


def test_heads_learn_at_their_own_rate():
    parameters = problem()
    optimizer = optimizers.build("sgd", parameters, learning_rate=0.1, heads=[parameters[1]], head_learning_rate=0.3)
    before = [p.detach().clone() for p in parameters]
    for p in parameters:
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert torch.allclose(before[0] - parameters[0], torch.tensor(0.1))
    assert torch.allclose(before[1] - parameters[1], torch.tensor(0.3))
    assert sorted(g["peak"] for g in optimizer.param_groups) == [0.1, 0.3]


def test_names_are_those_of_torch_in_any_case_and_a_class_will_do():
    assert optimizers.find("AdamW") is optimizers.find("adamw") is torch.optim.AdamW
    made = optimizers.build(torch.optim.Adam, problem(), learning_rate=0.1, options={"betas": (0.5, 0.9)})
    assert isinstance(made, torch.optim.Adam) and made.param_groups[0]["betas"] == (0.5, 0.9)


@pytest.mark.parametrize(
    "name,options,decay,match",
    [
        ("adamx", {}, 0.0, "no optimizer is called 'adamx': did you mean"),
        ("lbfgs", {}, 0.0, "lbfgs needs more than a gradient at each step"),
        ("adamw", {"beta": 1}, 0.0, "adamw does not take .*beta"),
        ("adamw", {"weight_decay": 0.1}, 0.0, "set weight_decay instead of optimizer_options"),
        ("rprop", {}, 0.1, "rprop has no weight decay"),
        ("muon", {}, 0.0, "muon refuses these parameters: Muon only supports 2D"),
        ("sparseadam", {}, 0.0, "sparseadam needs more than a gradient"),
    ],
)
def test_what_cannot_be_used_is_refused_before_the_run(name, options, decay, match):
    with pytest.raises(GraftError, match=match):
        optimizers.build(name, problem(), learning_rate=0.1, options=options, weight_decay=decay)


@pytest.mark.skipif(not EXTRA, reason="needs pytorch-optimizer")
def test_optimizers_without_a_schedule_are_evaluated_at_their_average():
    parameters = problem()
    optimizer = optimizers.build("schedulefreesgd", parameters, learning_rate=0.01)
    descend(optimizer, parameters, 5)
    trained_at = [p.detach().clone() for p in parameters]
    with optimizers.averaged(optimizer):
        assert not torch.allclose(parameters[0], trained_at[0])
    assert torch.allclose(parameters[0], trained_at[0], atol=1e-6)
