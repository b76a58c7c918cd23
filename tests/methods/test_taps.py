"""TAPS: a matrix changes or is the base's to the bit, and the gradient of its score is passed straight through."""

import torch
from torch import nn

import graft


def adapted(**hyper):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    adapter = graft.attach(model, graft.TAPS(**hyper), ["0", "2"])
    for delta in adapter.deltas.values():
        nn.init.normal_(delta.D)
    return model, adapter


def test_below_the_threshold_the_matrix_is_the_bases_to_the_bit():
    model, adapter = adapted(threshold=0.1)
    with torch.no_grad():
        adapter.deltas["0"].s.fill_(0.0999)
        adapter.deltas["2"].s.fill_(0.1)
    merged = graft.merged_state_dict(model)
    assert torch.equal(merged["0.weight"], model[0].weight)
    torch.testing.assert_close(merged["2.weight"], model[2].weight + adapter.deltas["2"].D)


def test_the_score_learns_on_either_side_and_the_change_above_only():
    for score in (0.0, 0.5):
        model, adapter = adapted()
        delta = adapter.deltas["2"]
        with torch.no_grad():
            delta.s.fill_(score)
        dense = model[2].weight.detach() + (score > 0) * delta.D.detach()
        x = torch.randn(4, 6).double()
        model(x).sin().sum().backward()
        h = torch.tanh(model[0](x)).detach()
        dense.requires_grad_()
        nn.functional.linear(h, dense, model[2].bias).sin().sum().backward()
        torch.testing.assert_close(delta.s.grad, (dense.grad * delta.D).sum().view(1))
        torch.testing.assert_close(delta.D.grad, dense.grad * (score > 0))


def test_the_penalty_is_the_mean_score():
    _, adapter = adapted(strength=3.0)
    with torch.no_grad():
        adapter.deltas["0"].s.fill_(-0.5)
    torch.testing.assert_close(adapter.penalty(), torch.tensor(3.0 * (0.5 + 0.15) / 2).double())


def test_a_stronger_penalty_leaves_fewer_matrices_changed():
    left = []
    for strength in (0.0, 1.0):
        model, adapter = adapted(strength=strength)
        for delta in adapter.deltas.values():
            nn.init.zeros_(delta.D)
        optimizer = torch.optim.SGD(adapter.parameters(), 0.05)
        x = torch.randn(32, 6).double()
        for _ in range(60):
            ((model(x) - x[:, :3]).square().mean() + adapter.penalty()).backward()
            optimizer.step()
            optimizer.zero_grad()
        left.append(sum(float(d.s) >= 0.1 for d in adapter.deltas.values()))
    assert left[0] == 2 and left[1] < 2
