"""GPS: each neuron trains the inputs with the largest gradients, and no other weight moves."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import graft


@settings(max_examples=25, deadline=None)
@given(out=st.integers(1, 7), width=st.integers(1, 7), seed=st.integers(0, 99), data=st.data())
def test_each_row_has_its_own_best_entries(out, width, seed, data):
    torch.manual_seed(seed)
    per_row = data.draw(st.integers(1, width))
    gradient = torch.randn(out, width)
    model = nn.Sequential(nn.Linear(width, out))
    adapter = graft.attach(model, graft.GPS(per_row=per_row), "0", stats={"0": {"weight_grad": gradient}})
    delta = adapter.deltas["0"]
    with torch.no_grad():
        delta.value.fill_(1.0)
    moved = graft.merged_state_dict(model)["0.weight"] != model[0].weight
    assert moved.sum(1).tolist() == [per_row] * out
    for row, chosen in zip(gradient.abs(), moved):
        assert chosen.all() or row[chosen].min() >= row[~chosen].max()


def test_more_than_a_row_has_is_refused():
    stats = {"0": {"weight_grad": torch.randn(3, 4)}}
    with pytest.raises(graft.GraftError, match="per_row must be at most the 4 columns of 0, not 5"):
        graft.attach(nn.Sequential(nn.Linear(4, 3)), graft.GPS(per_row=5), "0", stats=stats)
