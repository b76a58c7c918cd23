"""DyLoRA: that every truncation is trained, the draw, and LyCORIS's module."""

import pytest
import torch
from torch import nn

import graft
from models import move

lycoris = pytest.importorskip("lycoris")


@pytest.mark.parametrize("b", [1, 2, 4])
def test_is_that_of_lycoris(b, monkeypatch):
    """Their blocks of size 1 are our rows; they always train the last one alone."""
    from lycoris.modules.dylora import DyLoraModule

    torch.manual_seed(0)
    layer = nn.Linear(6, 5).double()
    theirs = DyLoraModule("x", layer, lora_dim=4, alpha=3.0, block_size=1).double()
    model = nn.Sequential(nn.Linear(6, 5)).double()
    model.load_state_dict({"0.weight": layer.weight, "0.bias": layer.bias})
    adapter = move(graft.attach(model.train(), graft.DyLoRA(rank=4, alpha=3.0, frozen=True), "0"))
    delta = adapter.deltas["0"]
    delta.drawn.fill_(b)
    for i in range(4):
        theirs.down_list[i].data = delta.A.data[i : i + 1].clone()
        theirs.up_list[i].data = delta.B.data[:, i : i + 1].clone()
    monkeypatch.setattr("random.randint", lambda low, high: b - 1)
    x = torch.randn(7, 6, dtype=torch.float64)
    mine, other = model(x), theirs(x)
    torch.testing.assert_close(mine, other)
    mine.sin().sum().backward()
    other.sin().sum().backward()
    for i in range(4):
        row, column = delta.A.grad[i : i + 1], delta.B.grad[:, i : i + 1]
        for grad, p in ((row, theirs.down_list[i]), (column, theirs.up_list[i])):
            torch.testing.assert_close(grad, torch.zeros_like(p) if p.grad is None else p.grad)
            assert grad.any() == (i == b - 1)


def train(recipe, x, targets, steps=500):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 12, bias=False)).double().train()
    adapter = graft.attach(model, recipe, "0")
    optimizer = torch.optim.Adam(adapter.parameters(), 0.05)
    rates = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for k in range(steps):
        loss = (model(x) - targets).square().mean()
        optimizer.zero_grad()
        loss.backward()
        adapter.step((k + 1) / steps)
        optimizer.step()
        rates.step()
    return model.eval(), adapter.deltas["0"]


@pytest.mark.parametrize("frozen", [False, True])
def test_every_truncation_is_better_than_that_of_a_lora(frozen):
    torch.manual_seed(0)
    w = nn.Linear(12, 12, bias=False).double().weight.detach()
    left, _, right = torch.linalg.svd(torch.randn(12, 12, dtype=torch.float64))
    sizes = torch.tensor([4.0, 3, 2, 1], dtype=torch.float64)
    change = left[:, :4] * sizes @ right[:4]
    x = torch.randn(300, 12, dtype=torch.float64)
    targets = x @ (w + change).T
    ours, delta = train(graft.DyLoRA(rank=4, alpha=4.0, frozen=frozen), x, targets)
    _, lora = train(graft.LoRA(rank=4, alpha=4.0), x, targets)

    def loss(B, A):
        return (x @ (B @ A - change).T).square().sum().item()

    for b in (1, 2, 3):
        delta.use(b)
        A, B = delta.factors()
        torch.testing.assert_close(ours(x), x @ (w + B[:, :b] @ A[:b]).T)
        mine, plain, scaled = loss(B, A), loss(lora.B[:, :b], lora.A[:b]), loss(4 / b * lora.B[:, :b], lora.A[:b])
        assert mine < 0.8 * scaled and (mine < plain or b == 3)
        if b == 1:
            assert mine < 1.1 * loss(left[:, :1] * sizes[:1], right[:1]) < 0.85 * plain


def test_all_ranks_are_drawn_evenly_by_all_sites_together_and_again():
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4))
    adapter = graft.attach(model, graft.DyLoRA(rank={"0": 8, "1": 4}, least_rank=2), r"\d")
    seen = []
    for k in range(1, 2101):
        adapter.step(k / 2100)
        seen.append(tuple(int(d.drawn) for d in adapter.deltas.values()))
    counts = torch.tensor([sum(a == r for a, _ in seen) for r in range(2, 9)])
    assert counts.sum() == 2100 and (counts - 300).abs().max() < 60  # 3.7 deviations
    assert all(3 * (a - 2) // 7 <= b - 2 <= 3 * (a - 1) // 7 for a, b in seen)  # the same share of both ranges
    adapter.step(0.25)
    again = [int(d.drawn) for d in adapter.deltas.values()]
    adapter.step(0.5)
    adapter.step(0.25)
    assert again == [int(d.drawn) for d in adapter.deltas.values()]


def test_a_rank_out_of_range_is_refused():
    adapter = graft.attach(nn.Sequential(nn.Linear(6, 5)), graft.DyLoRA(rank=4), "0")
    with pytest.raises(graft.GraftError, match="dylora: the rank of 0 is 1 to 4, not 5"):
        adapter.deltas["0"].use(5)
    with pytest.raises(graft.GraftError, match="dylora: least_rank must be at most rank = 4, not 5"):
        graft.attach(nn.Sequential(nn.Linear(6, 5)), graft.DyLoRA(rank=4, least_rank=5), "0")
