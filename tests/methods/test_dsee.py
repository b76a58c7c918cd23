"""DSEE: that its entries are those which stand out from a low-rank part of W, and what it computes with them."""

import numpy as np
import pytest
import torch
from torch import nn

import graft
from graft.methods.weight.dsee import left
from models import move


def planted(size, rank, spikes):
    """A weight of low rank with noise, and where spikes were added that are smaller than its largest entries."""
    w = 0.05 * torch.randn(size, rank) @ torch.randn(rank, size) + 0.003 * torch.randn(size, size)
    where = torch.randperm(size * size)[:spikes]
    w.view(-1)[where] += 0.15 * torch.randn(spikes).sign()
    return w, set(where.tolist())


@pytest.mark.parametrize("seed", range(3))
def test_trains_what_stands_out_from_a_low_rank_weight_and_not_the_largest_weights(seed):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(60, 60))
    w, spikes = planted(60, 6, 12)
    model[0].weight.data.copy_(w)
    adapter = graft.attach(model, graft.DSEE(rank=2, entries=12, rounds=3), "0", seed=seed)
    found = set(adapter.deltas["0"].sparse.index.tolist())
    assert len(found) == 12 and len(found & spikes) >= 9
    assert not set(w.abs().flatten().topk(12).indices.tolist()) & spikes


@pytest.mark.parametrize("shape, rounds", [((40, 30), 1), ((40, 30), 4), ((24, 50), 100), ((5, 4), 3)])
def test_decomposes_as_the_published_procedure_does(shape, rounds):
    """In numpy, with a QR of the whole remainder where ours looks at its first columns."""
    torch.manual_seed(1)
    w = 0.02 * torch.randn(shape, dtype=torch.float64)
    torch.manual_seed(2)
    V = torch.randn(1, shape[1]).double().numpy()
    W, rest = w.numpy(), None
    for _ in range(rounds):
        S = np.zeros(shape)
        for _ in range(2):
            U = np.linalg.qr((W - S) @ V.T)[0]
            V = U.T @ (W - S)
            rest = W - U @ V
            S = np.where(abs(rest) < 0.01, 0, rest)
        if len(V) + 5 >= min(shape):
            break
        V = np.concatenate([V, np.linalg.qr(rest - S)[1][:5]])
    torch.manual_seed(2)
    torch.testing.assert_close(left(w, rounds), torch.from_numpy(rest))


def test_both_parts_are_scaled_as_in_the_dense_formula():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(9, 7)).double()
    adapter = move(graft.attach(model, graft.DSEE(rank=2, alpha=3.0, entries=6), "0"))
    low, sparse = adapter.deltas["0"].low, adapter.deltas["0"].sparse
    S = torch.zeros(63, dtype=torch.float64).index_copy(0, sparse.index.long(), sparse.value.detach()).view(7, 9)
    x = torch.randn(5, 9, dtype=torch.float64)
    dense = model[0].weight + 1.5 * (low.B @ low.A + S)
    torch.testing.assert_close(model(x), x @ dense.T + model[0].bias)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained == 2 * (9 + 7) + 6


def test_more_entries_than_there_are_is_refused():
    with pytest.raises(graft.GraftError, match="entries must be at most the 12 of 0, not 13"):
        graft.attach(nn.Sequential(nn.Linear(4, 3)), graft.DSEE(entries=13), "0")
