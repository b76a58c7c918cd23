"""DoRA of dynamic rank: importance and penalty against dense matrices, the budget, and where ranks gather."""

import copy

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_adalora import Parallel
from torch import nn

import graft
from models import move


@settings(max_examples=20, deadline=None)
@given(d_in=st.integers(1, 7), d_out=st.integers(1, 7), rank=st.integers(1, 4))
def test_importance_is_the_share_of_each_component_in_the_norm_of_the_change(d_in, d_out, rank):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(d_in, d_out)).double()
    delta = move(graft.attach(model, graft.DyDoRA(rank=rank, target_rank=1, beta=0.6), "0"), 1.0).deltas["0"]
    expect = torch.zeros(rank, dtype=torch.float64)
    for _ in range(3):
        with torch.no_grad():
            delta.e.normal_()
            delta.observe()
            parts = torch.stack([delta.e[i] * torch.outer(delta.P[:, i], delta.Q[i]) for i in range(rank)])
            now = torch.linalg.matrix_norm(parts) / (torch.linalg.matrix_norm(parts.sum(0)) + 1e-8)
        expect = 0.6 * expect + 0.4 * now
    torch.testing.assert_close(delta.importance(), expect)


def test_the_penalty_is_the_mean_variance_of_components_until_ranks_are_settled():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)).double()
    adapter = graft.attach(model, graft.DyDoRA(rank=2, target_rank=1, gamma=0.5, cooldown=0.4), r"\d")
    rows = [row for d in adapter.deltas.values() for m in (d.P.T, d.Q) for row in m]
    expect = 0.5 * sum(((row - row.mean()) ** 2).sum() / (len(row) - 1) for row in rows) / len(rows)
    torch.testing.assert_close(adapter.penalty(), expect)
    adapter.step(0.5)
    torch.testing.assert_close(adapter.penalty(), expect)
    adapter.step(0.6)
    assert adapter.penalty() == 0


def test_the_budget_falls_slowly_first_and_the_final_choice_stays():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)).double()
    adapter = graft.attach(model, graft.DyDoRA(rank=6, target_rank=2, warmup=0.2, cooldown=0.3), r"\d")
    deltas, kept = list(adapter.deltas.values()), {}
    for k in range(1, 21):
        move(adapter, seed=k)
        adapter.step(k / 20)
        keep = torch.cat([d.keep for d in deltas])
        kept[k / 20] = int(keep.sum())
        assert not torch.cat([d.e for d in deltas])[keep == 0].any()
        if k == 14:
            settled = keep
        assert k < 14 or torch.equal(keep, settled)
    assert kept[0.2] == 12 and kept[0.45] == 12 - 1 and kept[0.7] == kept[1.0] == 4


def test_ranks_gather_where_they_are_needed():
    """Of three layers one must change in 6 directions, one in 2 and one in none."""
    torch.manual_seed(0)
    student = Parallel()
    teacher = copy.deepcopy(student)
    with torch.no_grad():
        for site, rank in ((0, 6), (2, 2)):
            teacher.sites[site].weight += torch.randn(12, rank) @ torch.randn(rank, 12) / 3
    adapter = graft.attach(student, graft.DyDoRA(rank=6, target_rank=3, cooldown=0.3), r"sites\.\d")
    optimizer = torch.optim.Adam(adapter.parameters(), 0.02)
    for step in range(200):
        x = torch.randn(64, 12)
        loss = (student(x) - teacher(x)).square().mean() + adapter.penalty()
        optimizer.zero_grad()
        loss.backward()
        adapter.step((step + 1) / 200)
        optimizer.step()
    ranks = [int(d.keep.sum()) for d in adapter.deltas.values()]
    assert sum(ranks) == 9 and ranks[0] > 5 > ranks[2] > 1 > ranks[1]
