"""BiLoRA: its hypergradient against automatic differentiation through the step."""

import pytest
import torch
from torch import nn

import graft
import models


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 5)

    def forward(self, x):
        return self.b(torch.tanh(self.a(x)))


class Trial:
    """Two sets of regression data."""

    def __init__(self, model, learning_rate):
        self.model, self.learning_rate = model, learning_rate
        self.data = [(torch.randn(9, 6).double(), torch.randn(9, 5).double()) for _ in range(2)]

    def mean(self, aside, model=None):
        x, y = self.data[aside]
        return ((model or self.model)(x) - y).square().mean()

    def gradients(self, parameters, aside=False):
        return list(torch.autograd.grad(self.mean(aside), parameters))


def made(learning_rate):
    torch.manual_seed(0)
    model = Two().double()
    adapter = models.move(graft.attach(model, graft.BiLoRA(rank=3, gamma=0.0), "[ab]"), by=0.5)
    return model, adapter, Trial(model, learning_rate)


@pytest.mark.parametrize("rate", [0.0, 0.02, 0.3])
def test_gradient_of_the_values_is_that_through_a_step_of_the_vectors(rate):
    model, adapter, trial = made(rate)
    trial.mean(False).backward()
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    vectors = [n for n in names if not n.endswith("e")]
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    adapter.review(0.5, trial)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())

    free = {n: p.detach().clone().requires_grad_(n in names) for n, p in model.named_parameters()}

    def loss(tensors, aside):
        x, y = trial.data[aside]
        return (torch.func.functional_call(model, tensors, (x,)) - y).square().mean()

    steps = torch.autograd.grad(loss(free, False), [free[n] for n in vectors], create_graph=True)
    after = free | {n: free[n] - rate * g for n, g in zip(vectors, steps)}
    wanted = torch.autograd.grad(loss(after, True), [free[n] for n in names if n not in vectors])
    for n, w in zip([n for n in names if n not in vectors], wanted):
        torch.testing.assert_close(model.get_parameter(n).grad, w, rtol=2e-3, atol=1e-6)
    if rate:
        _, _, same = made(0.0)
        first = torch.autograd.grad(same.mean(True), same.model.get_parameter("a.deltas.default.e"))[0]
        assert not torch.allclose(model.get_parameter("a.deltas.default.e").grad, first, rtol=0.02)
