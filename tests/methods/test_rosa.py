"""RoSA: that it finds a low-rank and a sparse change together, which entries it trains, and what it saves."""

import copy

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import graft
from models import move


def learn(method, targets, x, stats, **hyper):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 24, bias=False)).double()
    adapter = graft.attach(model, method, "0", stats=stats, **hyper)
    optimizer = torch.optim.Adam(adapter.parameters(), 0.1)
    rates = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 400)
    for _ in range(400):
        loss = (model(x) - targets).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rates.step()
    return sum(p.numel() for p in adapter.parameters()), loss.item()


def test_a_planted_low_rank_and_sparse_change_is_found_by_neither_alone():
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(24, 24, bias=False)).double()
    x = torch.randn(200, 24, dtype=torch.float64)
    change = torch.randn(24, 2, dtype=torch.float64) @ torch.randn(2, 24, dtype=torch.float64) / 2
    outliers = torch.randperm(576)[:48]
    change.view(-1)[outliers] += 4 * torch.randn(48, dtype=torch.float64).sign()
    targets = x @ (base[0].weight.detach() + change).T
    stats = graft.collect(base, [x], ["weight_grad"], "0", loss=lambda m, b: (m(b) - targets).square().mean())
    entries = 96  # as many as a LoRA of rank 2 has
    both, loss = learn("rosa", targets, x, stats, rank=2, density=entries / 576)
    low, low_loss = learn("lora", targets, x, None, rank=4)
    sparse, sparse_loss = learn("shira", targets, x, stats, density=2 * entries / 576, mask="gradient")
    assert both == low == sparse == 192
    assert loss < 0.05 * min(low_loss, sparse_loss)


def test_trains_the_entries_of_the_largest_gradients_as_the_dense_formula_does():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(9, 7)).double()
    grad = torch.randn(7, 9, dtype=torch.float64)
    recipe = graft.RoSA(rank=2, alpha=3.0, density=0.1)
    adapter = move(graft.attach(model, recipe, "0", stats={"0": {"weight_grad": grad}}))
    delta = adapter.deltas["0"]
    assert set(delta.sparse.index.tolist()) == set(grad.abs().flatten().topk(6).indices.tolist())
    S = (
        torch.zeros(63, dtype=torch.float64)
        .index_copy(0, delta.sparse.index.long(), delta.sparse.value.detach())
        .view(7, 9)
    )
    dense = model[0].weight + 1.5 * delta.low.B @ delta.low.A + S
    x = torch.randn(5, 9, dtype=torch.float64)
    torch.testing.assert_close(model(x), x @ dense.T + model[0].bias)


def test_the_file_holds_factors_values_and_positions_alone(tmp_path):
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(9, 7)).double()
    model = copy.deepcopy(base)
    stats = {"0": {"weight_grad": torch.randn(7, 9)}}
    adapter = move(graft.attach(model, graft.RoSA(rank=2, density=0.1), "0", stats=stats))
    adapter.save(tmp_path / "a")
    saved = load_file(tmp_path / "a" / "adapter_model.safetensors")
    assert {k: v.numel() for k, v in saved.items()} == {
        "0:low.A": 18, "0:low.B": 14, "0:sparse.index": 6, "0:sparse.value": 6,
    }  # fmt: skip
    graft.load(base, tmp_path / "a")
    x = torch.randn(5, 9, dtype=torch.float64)
    assert torch.equal(base(x), model(x))


def test_gradients_are_asked_for():
    with pytest.raises(graft.GraftError, match="needs the statistic weight_grad at 0"):
        graft.attach(nn.Sequential(nn.Linear(4, 4)), "rosa", "0")
