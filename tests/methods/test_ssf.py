"""SSF: scale and shift behind every operation, and their place in weight and bias."""

import pytest
import torch
from torch import nn

import graft

HOSTS = {
    "linear": (nn.Linear(5, 4), (3, 5), (4,)),
    "conv": (nn.Conv2d(2, 4, 3, groups=2), (3, 2, 5, 5), (4, 1, 1)),
    "layernorm": (nn.LayerNorm(4), (3, 4), (4,)),
    "batchnorm": (nn.BatchNorm2d(4), (3, 4, 2, 2), (4, 1, 1)),
    "groupnorm": (nn.GroupNorm(2, 4), (3, 4, 2), (4, 1)),
}


@pytest.mark.parametrize("name", HOSTS)
def test_scales_and_shifts_the_output(name):
    host, shape, channels = HOSTS[name]
    model = nn.Sequential(host).double().eval()
    x = torch.randn(shape, dtype=torch.float64)
    y = model(x)
    delta = graft.attach(model, graft.SSF(), "0").deltas["0"]
    assert torch.equal(model(x), y)
    with torch.no_grad():
        delta.gamma.normal_()
        delta.beta.normal_()
    expect = y * delta.gamma.view(channels) + delta.beta.view(channels)
    torch.testing.assert_close(model(x), expect)
    with graft.merge(model):
        torch.testing.assert_close(model(x), expect)


def test_a_host_without_bias_is_shifted_only_on_demand_and_then_not_merged():
    host = nn.Linear(5, 4, bias=False)
    assert graft.attach(nn.Sequential(host), graft.SSF(), "0").deltas["0"].beta is None
    model = nn.Sequential(nn.Linear(5, 4, bias=False))
    delta = graft.attach(model, graft.SSF(shift_all=True), "0").deltas["0"]
    with torch.no_grad():
        delta.beta.fill_(2)
    torch.testing.assert_close(model(torch.zeros(1, 5)), torch.full((1, 4), 2.0))
    with pytest.raises(graft.GraftError, match="0 has no bias to take the one of ssf"):
        graft.merge(model)


def test_spread_is_the_papers_start():
    delta = graft.attach(nn.Sequential(nn.Linear(3, 4000)), graft.SSF(spread=0.02), "0").deltas["0"]
    for values, mean in ((delta.gamma, 1), (delta.beta, 0)):
        assert abs(values.mean() - mean) < 0.002 and abs(values.std() - 0.02) < 0.002
