"""APET: exactly so many parameters, anywhere in the model, each position as likely as any other."""

import pytest
import torch
from torch import nn

import graft
from models import llama


@pytest.mark.parametrize("count", [1, 7, 1000])
def test_the_number_is_that_of_the_whole_model(count):
    adapter = graft.attach(llama(), graft.APET(parameters=count))
    assert sum(p.numel() for p in adapter.parameters()) == count
    assert len(adapter.deltas) <= count
    for delta in adapter.deltas.values():
        assert len(delta.index.unique()) == len(delta.index)


def test_positions_are_uniform_over_matrices_of_different_sizes():
    model = nn.ModuleList([nn.Linear(2, 3), nn.Linear(10, 10), nn.Linear(4, 1)])
    counts = torch.zeros(110)
    for seed in range(400):
        adapter = graft.attach(model, graft.APET(parameters=11), ["0", "1", "2"], seed=seed)
        for path, delta in adapter.deltas.items():
            counts[delta.index.long() + {"0": 0, "1": 6, "2": 106}[path]] += 1
        adapter.detach()
    expect = 400 * 11 / 110
    chi = ((counts - expect).square() / (expect * (1 - 0.1))).sum()
    assert abs(chi - 109) < 4 * (2 * 109) ** 0.5


def test_more_than_there_are_is_refused():
    with pytest.raises(graft.GraftError, match="13 entries cannot be chosen of the 12"):
        graft.attach(nn.Sequential(nn.Linear(4, 3)), graft.APET(parameters=13), "0")
