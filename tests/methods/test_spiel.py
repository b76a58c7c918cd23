"""SpIEL: finds the entries in which a teacher differs, with memory of the values it has."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import graft
from graft.core import sparse
from graft.methods.selection.spiel import note
from graft.training import optimizers


def train(density=0.05, steps=120, rounds=None, **hyper):
    """A student of a teacher that differs in a few entries: the share of them that the adapter holds, by step."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 20, bias=False))
    true = torch.randperm(480)[: round(density * 480)]
    teacher = model[0].weight.detach().clone()
    teacher.view(-1)[true] += torch.randn(len(true)).sign()
    adapter = graft.attach(model, graft.SpIEL(density=density, **hyper), "0")
    delta = adapter.deltas["0"]
    optimizer, recall = torch.optim.Adam([delta.value], 0.05), []
    for step in range(1, steps + 1):
        x = torch.randn(64, 24)
        (model(x) - x @ teacher.T).square().sum(1).mean().backward()
        optimizers.forget(optimizer, adapter.step(step / steps))
        optimizer.step()
        optimizer.zero_grad()
        recall.append(torch.isin(true, delta.index).float().mean().item())
        assert len(delta.index.unique()) == len(delta.index) == len(delta.value) == len(true)
    return delta, optimizer, recall


def test_the_entries_of_a_teacher_are_found():
    delta, optimizer, recall = train()
    assert recall[0] < 0.2 and recall[6] > recall[0] and recall[-1] > 0.9
    assert all(t.numel() <= len(delta.value) for t in optimizer.state[delta.value].values())


def test_places_change_after_the_watched_steps_only():
    _, _, recall = train(steps=30, interval=10, watched=3, rate=0.5)
    changes = [i + 2 for i in range(29) if recall[i] != recall[i + 1]]
    assert set(changes) <= {4, 14, 24} and 4 in changes


def test_what_is_grown_starts_at_zero_without_a_past():
    torch.manual_seed(0)
    adapter = graft.attach(nn.Sequential(nn.Linear(6, 5)), graft.SpIEL(density=0.3), "0")
    delta = adapter.deltas["0"]
    with torch.no_grad():
        delta.value.copy_(torch.arange(1.0, 10.0))
    optimizer = torch.optim.Adam([delta.value], 0.0)
    delta.value.grad = torch.ones_like(delta.value)
    optimizer.step()
    before = delta.index.clone()
    note(torch.randn(4, 5), torch.randn(4, 6), delta.candidates, delta.sums)
    new = delta.replace(3)
    optimizers.forget(optimizer, {delta.value: new})
    assert new.sum() <= 3 and not new[3:].any()
    assert torch.equal(delta.index[~new], before[~new]) and not torch.isin(delta.index[new], before).any()
    for tensor in (delta.value, delta.value.grad, optimizer.state[delta.value]["exp_avg"]):
        assert not tensor[new].any() and tensor[~new].all()


@settings(max_examples=25, deadline=None)
@given(out=st.integers(1, 9), width=st.integers(1, 9), seed=st.integers(0, 99), data=st.data())
def test_the_strongest_gradients_are_found_in_pieces(out, width, seed, data):
    torch.manual_seed(seed)
    g, x = torch.randn(4, out), torch.randn(4, width)
    keep = data.draw(st.integers(1, out * width))
    before, sparse.BLOCK = sparse.BLOCK, width
    try:
        found = sparse.strongest(g, x, keep)
    finally:
        sparse.BLOCK = before
    size = (g.T @ x).abs().flatten()
    torch.testing.assert_close(size[found].sort().values, size.topk(keep).values.sort().values)
    assert torch.equal(found, found.sort().values)


def test_a_resumed_run_watches_where_it_stopped():
    model = nn.Sequential(nn.Linear(6, 5))
    adapter = graft.attach(model, graft.SpIEL(interval=4, watched=2), "0")
    seen = []
    for step in range(8):
        again = graft.attach(nn.Sequential(nn.Linear(6, 5)), graft.SpIEL(interval=4, watched=2), "0")
        again.load_state_dict(adapter.state_dict())
        seen.append(bool(adapter.deltas["0"].watching))
        assert again.deltas["0"].watching == seen[-1]
        model(torch.randn(3, 6)).sum().backward()
        adapter.step(step / 8)
    assert seen == [False, True, True, False] * 2


def test_watching_all_the_time_is_refused():
    with pytest.raises(graft.GraftError, match="watched must be below interval = 5, not 5"):
        graft.attach(nn.Sequential(nn.Linear(4, 3)), graft.SpIEL(interval=5), "0")
