"""COLA: that a chain reaches what one link cannot, and what happens where a link ends."""

import torch
from torch import nn

import graft
import models
from graft.training import optimizers


def train(recipe, steps=600):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 12, bias=False)).double()
    change = torch.randn(12, 8, dtype=torch.float64) @ torch.randn(8, 12, dtype=torch.float64) / 8
    x = torch.randn(100, 12, dtype=torch.float64)
    targets = model(x).detach() + x @ change.T
    adapter = graft.attach(model, recipe, "0")
    optimizer = torch.optim.Adam(adapter.parameters(), 0.03)
    for k in range(steps):
        loss = (model(x) - targets).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizers.forget(optimizer, adapter.step((k + 1) / steps))
        optimizer.step()
    return model, adapter, loss.item()


def test_a_chain_of_links_of_rank_2_learns_a_change_of_rank_8():
    model, chain, loss = train(graft.COLA(rank=2, links=4))
    _, single, alone = train(graft.LoRA(rank=2))
    assert sum(p.numel() for p in chain.parameters()) == sum(p.numel() for p in single.parameters()) == 48
    assert loss < 0.05 * alone
    change = graft.merged_state_dict(model)["0.weight"] - model[0].weight.detach()
    assert torch.linalg.matrix_rank(change) == 8


def test_where_a_link_ends_the_function_stays_and_the_optimizer_forgets():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5)).double()
    adapter = graft.attach(model, graft.COLA(rank=2, links=3), "0")
    delta, x = adapter.deltas["0"], torch.randn(4, 6, dtype=torch.float64)
    optimizer = torch.optim.Adam(adapter.parameters(), 0.1)
    for progress in (0.1, 0.2, 0.3):
        model(x).sin().sum().backward()
        optimizers.forget(optimizer, adapter.step(progress))
        optimizer.step()
        optimizer.zero_grad()
    assert len(optimizer.state) == 2 and not delta.past_B.any() and delta.link == 0
    y, A, B = model(x), delta.A.detach().clone(), delta.B.detach().clone()
    y.sin().sum().backward()
    optimizers.forget(optimizer, adapter.step(1 / 3))
    assert delta.link == 1 and delta.A.grad is delta.B.grad is None and not optimizer.state
    optimizer.step()
    torch.testing.assert_close(model(x), y)
    assert torch.equal(delta.past_A[:2], A) and torch.equal(delta.past_B[:, :2], B)
    assert not delta.B.any() and not torch.equal(delta.A, A) and (delta.A.abs() <= 6**-0.5).all()
    for progress in (0.4, 2 / 3, 0.9, 1.0):
        model(x).sin().sum().backward()
        optimizers.forget(optimizer, adapter.step(progress))
        optimizer.step()
        optimizer.zero_grad()
    assert delta.link == 2 and delta.past_B[:, 2:].any() and delta.B.any()
    assert torch.equal(delta.past_B[:, :2], B)


def test_the_loop_hands_its_optimizer_over(monkeypatch):
    steps, made = [], []
    build = optimizers.build
    monkeypatch.setattr(optimizers, "build", lambda *a, **k: made.append(build(*a, **k)) or made[0])
    graft.COLA  # noqa: B018  fills METHODS
    own = graft.METHODS["cola"].step
    model = models.llama(vocab_size=200)
    adapter = graft.attach(model, graft.COLA(rank=2, links=2), "q_proj")

    def watched(deltas, progress):
        anew = own(deltas, progress)
        steps.append((len(anew), len(made[0].state)))
        return anew

    monkeypatch.setattr(graft.METHODS["cola"], "step", watched)
    graft.fit(
        model, [{"text": "the film was very good"}] * 4, processor=models.tokenizer(), objective="causal-lm", steps=4,
        batch_size=4, progress=False,
    )  # fmt: skip
    assert steps == [(0, 0), (4, 4), (0, 0), (0, 4)]  # two sites; all state gone at the end of a link
    assert all(d.link == 1 and d.B.any() for d in adapter.deltas.values())
