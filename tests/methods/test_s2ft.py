"""S2FT: groups of columns over all matrices; the input is kept, and gradients made, for these columns only."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import graft
from models import llama


@settings(max_examples=25, deadline=None)
@given(group=st.sampled_from([1, 2, 4]), groups=st.integers(1, 4), out=st.integers(1, 6), seed=st.integers(0, 50))
def test_whole_groups_of_the_highest_score_are_trained(group, groups, out, seed):
    torch.manual_seed(seed)
    host = nn.Linear(group * groups, out)
    adapter = graft.attach(nn.Sequential(host), graft.S2FT(density=0.5, group=group, choice="magnitude"), "0")
    index = adapter.deltas["0"].index
    chosen = index.view(-1, group)
    assert torch.equal(chosen, chosen[:, :1] + torch.arange(group)) and (chosen[:, 0] % group == 0).all()
    score = host.weight.detach().abs().sum(0).view(groups, group).sum(1)
    best = score.topk(max(1, round(0.5 * groups))).indices.sort().values
    assert torch.equal(chosen[:, 0] // group, best)


def test_only_the_chosen_features_are_kept_for_backward():
    model = nn.Sequential(nn.Linear(40, 30))
    delta = graft.attach(model, graft.S2FT(density=0.1), "0").deltas["0"]
    kept, x = [], torch.randn(5, 40)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = model(x)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    sizes = [t.numel() for t in kept if t.is_floating_point() and t.untyped_storage().data_ptr() not in weights]
    assert sizes == [5 * 4]
    g = torch.randn_like(y)
    (found,) = torch.autograd.grad(y, delta.value, g)
    torch.testing.assert_close(found, (g.T @ x)[:, delta.index.long()])


def test_density_is_that_of_all_matrices_together():
    adapter = graft.attach(llama(), graft.S2FT(density=0.1, group=8))
    widths = {path: d.site.d_in for path, d in adapter.deltas.items()}
    total = 2 * (32 + 48) // 8
    assert sum(len(d.index) for d in adapter.deltas.values()) == 8 * round(0.1 * total)
    assert set(widths.values()) <= {32, 48}


def test_a_group_that_does_not_divide_is_refused():
    with pytest.raises(graft.GraftError, match="group must divide the 10 columns of 0, 4 does not"):
        graft.attach(nn.Sequential(nn.Linear(10, 3)), graft.S2FT(group=4), "0")
