"""SNELLA: a sparse change of high rank from thin tensors, and entries for which the matrices compete."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from one_layer import adapted, linear
from torch import nn

import graft
from graft.methods.selection.snella import shared_out


def reference(delta):
    """S(D), entry by entry distances and torch's quantile, as in the authors' code."""
    A, B, p, t, q = (v.detach() for v in (delta.A, delta.B, delta.p, delta.t, delta.q))
    first, second = (torch.cdist(A[i], B[i], compute_mode="donot_use_mm_for_euclid_dist") for i in (0, 1))
    K = 0.1 * first - 0.1 * second  # [in, out]
    D = K + p * torch.softmax(K / t, -1) + q
    size = D.abs()
    share = 1 - int(delta.count) / D.numel()
    kept = size * (size > (size.flatten().quantile(share) if share else -1.0))
    return D.T, (D * kept).T


@pytest.mark.parametrize("count", [12 * 8, 40, 1])
def test_the_change_is_that_of_the_authors(count):
    _, delta = adapted(linear(8, 12), graft.SNELLA(rank=6))
    delta.count.fill_(count)
    change = delta.weight(delta.site.weight) - delta.site.weight
    assert int((change != 0).sum()) == count
    torch.testing.assert_close(change, reference(delta)[1])


def test_the_kernel_makes_a_rank_above_that_of_the_factors():
    _, delta = adapted(linear(24, 32), graft.SNELLA(rank=4))
    D, change = reference(delta)
    assert torch.linalg.matrix_rank(D) == 24 and torch.linalg.matrix_rank(change) == 24
    assert torch.linalg.matrix_rank(delta.B[0] @ delta.A[0].mT) == 2
    assert sum(p.numel() for p in delta.parameters()) == 4 * (24 + 32) + 3


def test_gradients_hold_the_size_of_a_change_constant():
    model, delta = adapted(linear(8, 12), graft.SNELLA(rank=4))
    delta.count.fill_(30)
    x = torch.randn(5, 8, dtype=torch.float64)
    model(x).sin().sum().backward()
    dense = delta.weight(delta.site.weight).detach().requires_grad_()
    torch.nn.functional.linear(x, dense, delta.site.bias).sin().sum().backward()
    D, change = reference(delta)
    at_d = dense.grad * D.abs() * (change != 0)  # dL/dD
    torch.testing.assert_close(delta.q.grad, at_d.sum().view(1))
    for i, sign in ((0, 0.1), (1, -0.1)):  # with p = 0 only the distances are left
        delta.p.data.zero_()
        model.zero_grad()
        model(x).sin().sum().backward()
        dense = delta.weight(delta.site.weight).detach().requires_grad_()
        torch.nn.functional.linear(x, dense, delta.site.bias).sin().sum().backward()
        D, change = reference(delta)
        at_k = sign * dense.grad * D.abs() * (change != 0)
        apart = delta.B[i][:, None] - delta.A[i][None]
        unit = apart / apart.norm(dim=-1, keepdim=True)
        torch.testing.assert_close(delta.B.grad[i], (at_k[..., None] * unit).sum(1))
        torch.testing.assert_close(delta.A.grad[i], -(at_k[..., None] * unit).sum(0))


def three_layers(**hyper):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 20), nn.Tanh(), nn.Linear(20, 10), nn.Tanh(), nn.Linear(10, 2)).double()
    return model, graft.attach(model, graft.SNELLA(rank=4, **hyper), ["0", "2", "4"])


def test_the_matrices_share_the_budget_by_their_importance():
    model, adapter = three_layers(density=0.25, warmup=0.2, cooldown=0.2)
    sizes, deltas = [120, 200, 20], [*adapter.deltas.values()]
    optimizer = torch.optim.SGD(adapter.parameters(), 0.1)
    total = []
    for step in range(1, 11):
        model(torch.randn(16, 6).double()).sin().sum().backward()
        adapter.step(step / 10)
        weights = [sum(float((j * u).mean()) for j, u in map(d.averages, ("A", "B"))) for d in deltas]
        counts = [int(d.count) for d in deltas]
        total.append(sum(counts))
        assert all(0 <= n <= size for n, size in zip(counts, sizes))
        free = [n / w for n, w, size in zip(counts, weights, sizes) if 0 < n < size]
        spread = [1 / w for n, w, size in zip(counts, weights, sizes) if 0 < n < size]
        assert max(free, default=0) - min(free, default=0) <= max(spread, default=0) * 1.01  # by one entry at most
        optimizer.step()
        optimizer.zero_grad()
    expect = [340 * (0.25 + 0.75 * (1 - min(max((s / 10 - 0.2) / 0.6, 0), 1)) ** 3) for s in range(1, 11)]
    assert all(abs(n - e) <= 0.5 for n, e in zip(total, expect)) and total[-1] == 85
    changed = [int((d.weight(d.site.weight) != d.site.weight).sum()) for d in deltas]
    assert changed == [int(d.count) for d in deltas]


@given(st.lists(st.tuples(st.integers(1, 400), st.floats(0, 1)), min_size=1, max_size=12), st.floats(0, 1))
def test_what_is_shared_out_is_proportional_up_to_the_room(parts, share):
    room, weights = zip(*parts)
    total = round(share * sum(room))
    counts = shared_out(total, torch.tensor(weights), [*room])
    assert sum(counts) == total and all(0 <= n <= most for n, most in zip(counts, room))
    per = [(n, w) for n, w, most in zip(counts, weights, room) if n < most and w > 1e-6 * max(weights)]
    level = max(((n - 1) / w for n, w in per if n), default=0)
    assert all((n + 1) / w >= level * (1 - 1e-6) for n, w in per)  # none is more than an entry away from its part


def test_what_cannot_be_halved_or_leaves_no_time_is_refused():
    with pytest.raises(graft.GraftError, match="rank must be even"):
        graft.attach(nn.Sequential(nn.Linear(4, 4)), graft.SNELLA(rank=3), "0")
    with pytest.raises(graft.GraftError, match="warmup \\+ cooldown must be below 1"):
        graft.attach(nn.Sequential(nn.Linear(4, 4)), graft.SNELLA(warmup=0.5, cooldown=0.5), "0")
