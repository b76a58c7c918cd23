"""ALoRA: its scores by brute force, how ranks move, and where they go when only two of eight layers need any."""

import copy

import torch
from torch import nn

import graft
import models
from graft.training import optimizers


class Trial:
    def __init__(self, loss):
        self.loss = loss


class Deep(nn.Module):
    def __init__(self, layers, width):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))

    def forward(self, x):
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return x


def attached(layers=3, **hyper):
    torch.manual_seed(0)
    model = Deep(layers, 6)
    return model, graft.attach(model, graft.ALoRA(**hyper), r"layers\.\d")


def ranks(adapter):
    return [int(d.keep.sum()) for d in adapter.deltas.values()]


def test_a_score_is_the_loss_without_a_rank_less_that_with_it_alone():
    model, adapter = attached(rank=2, limit=3)
    models.move(adapter, by=0.5)
    model.double()
    x, y = torch.randn(7, 6).double(), torch.randn(7, 6).double()
    base, deltas = [layer.weight.detach().clone() for layer in model.layers], list(adapter.deltas.values())

    def mean(chosen):
        """By dense weights: of the base, with the change of the chosen (site, rank) alone."""
        z = x
        for i, (layer, d) in enumerate(zip(model.layers, deltas)):
            w = base[i] + sum(d.scaling * torch.outer(d.P[:, r], d.Q[r]) for s, r in chosen if s == i)
            z = z + torch.tanh(z @ w.T + layer.bias)
        return (z - y).square().mean().item()

    there = [(i, r) for i in range(3) for r in range(2)]
    with torch.no_grad():
        found = adapter.recipe.method.scores(deltas, Trial(lambda: (model(x) - y).square().mean().item()))
        for i, r in there:
            wanted = mean([p for p in there if p != (i, r)]) - mean([(i, r)])
            torch.testing.assert_close(found[i][r].item(), wanted)
    assert all(f[2] == torch.inf for f in found) and ranks(adapter) == [2, 2, 2]


def moved(scores, **hyper):
    _, adapter = attached(len(scores), **hyper)
    limit = adapter.deltas["layers.0"].keep.shape[0]
    rows = [torch.tensor([*s, *[torch.inf] * (limit - len(s))]) for s in scores]
    with torch.no_grad():
        fresh = adapter.recipe.method.move(list(adapter.deltas.values()), rows)
    return adapter, fresh


def test_the_freed_ranks_are_divided_as_in_the_example_of_the_paper():
    """Eight ranks for three sites: three for each of the two that have the higher mean scores, two for the other."""
    adapter, _ = moved([[0.1] * 8, [5.0] * 8, [9.0] * 8, [7.0] * 8], rank=8, limit=12, moved=2)
    assert ranks(adapter) == [0, 10, 11, 11]


def test_a_full_site_passes_on_and_where_no_site_was_spared_ranks_are_lost():
    adapter, _ = moved([[0.1, 0.2], [0.3, 0.4], [9.0, 9.0], [8.0, 8.0]], rank=2, limit=3)
    assert ranks(adapter) == [0, 0, 3, 3]  # two of four found room
    adapter, _ = moved([[0.1, 5.0], [0.2, 5.0]], rank=2, limit=4)
    assert ranks(adapter) == [1, 1]


def test_new_ranks_start_without_effect_and_without_a_past():
    torch.manual_seed(1)
    _, adapter = attached(2, rank=2, limit=5)
    models.move(adapter)
    before = adapter.deltas["layers.1"].weight(torch.zeros(6, 6))
    with torch.no_grad():
        rows = [torch.tensor([0.1, 0.2, *[torch.inf] * 3]), torch.tensor([7.0, 8.0, *[torch.inf] * 3])]
        fresh = adapter.recipe.method.move(list(adapter.deltas.values()), rows)
    grown = adapter.deltas["layers.1"]
    assert ranks(adapter) == [0, 4]
    torch.testing.assert_close(grown.weight(torch.zeros(6, 6)), before)
    assert grown.Q[2:4].abs().sum() > 0 and grown.Q.abs()[2:4].max() <= 6**-0.5
    assert fresh[grown.P].sum() == fresh[grown.Q].sum() == 2 * 6 and fresh[grown.P][:, 2:4].all()
    assert set(fresh) == {grown.P, grown.Q}


def test_ranks_go_where_an_update_is_needed_and_the_loss_is_below_that_of_equal_ranks():
    torch.manual_seed(0)
    base = Deep(8, 12)
    teacher = copy.deepcopy(base)
    with torch.no_grad():
        for i in (2, 5):
            teacher.layers[i].weight.add_(0.25 * torch.randn(12, 6) @ torch.randn(6, 12))
        x, held = torch.randn(400, 12), torch.randn(64, 12)
        y, wanted = teacher(x), teacher(held)

    def learn(method):
        model = copy.deepcopy(base)
        adapter = graft.attach(model, method, r"layers\.\d")
        optimizer = torch.optim.Adam(adapter.parameters(), 0.01)
        trial, steps = Trial(lambda: (model(held) - wanted).square().mean().item()), 400
        for step in range(steps):
            optimizer.zero_grad()
            (model(x) - y).square().mean().backward()
            optimizers.forget(optimizer, adapter.review((step + 1) / steps, trial))
            optimizer.step()
        return adapter, trial.loss()

    adapter, loss = learn(graft.ALoRA(rank=3, limit=12, alpha=3.0, rounds=4))
    found = ranks(adapter)
    assert sum(found) == 24 and found[2] + found[5] >= 14
    assert loss < 0.5 * learn(graft.LoRA(rank=3, alpha=3.0))[1]
