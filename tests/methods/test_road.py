"""RoAd: pairs of outputs are complex numbers that are multiplied; PEFT's layer."""

import peft
import pytest
import torch
from against_peft import both, fill, same
from hypothesis import given, settings
from hypothesis import strategies as st
from one_layer import adapted, linear

import graft


@settings(max_examples=25, deadline=None)
@given(d_in=st.integers(1, 6), groups=st.integers(1, 3), half=st.integers(1, 4), seed=st.integers(0, 99))
def test_one_angle_and_scale_per_pair_multiply_a_complex_number(d_in, groups, half, seed):
    host = linear(d_in, groups * 2 * half, seed=seed)
    x = torch.randn(4, d_in, dtype=torch.float64)
    plain = host(x).unflatten(-1, (groups, 2, half))
    model, delta = adapted(host, graft.RoAd(group=2 * half), seed)
    number = torch.polar(torch.ones_like(delta.angle), delta.angle).view(groups, half) * delta.scale.view(groups, half)
    y = torch.complex(plain[:, :, 0], plain[:, :, 1]) * number
    torch.testing.assert_close(model(x), torch.stack([y.real, y.imag], -2).flatten(1))


def test_a_rotation_keeps_the_length_of_the_output_and_turns_the_bias():
    host, x = linear(6, 8), torch.randn(5, 6, dtype=torch.float64)
    lengths = host(x).norm(dim=-1)
    model, delta = adapted(host, graft.RoAd(group=4))
    with torch.no_grad():
        delta.scale.fill_(1)
    torch.testing.assert_close(model(x).norm(dim=-1), lengths)
    torch.testing.assert_close(delta.bias(host.bias).norm(), host.bias.norm())
    assert (delta.bias(host.bias) - host.bias).abs().max() > 0.01


@pytest.mark.parametrize("variant", [1, 2, 4])
def test_equals_peft(variant):
    config = peft.RoadConfig(variant=f"road_{variant}", group_size=4)
    ours, delta, theirs = both(linear(6, 12), graft.RoAd(variant=variant, group=4), config)
    pairs = [(delta.angle, theirs.road_theta["default"]), (delta.scale, theirs.road_alpha["default"])]
    fill(pairs)
    same(ours, theirs, pairs, torch.randn(3, 5, 6, dtype=torch.float64))


@pytest.mark.parametrize("group, size", [(3, 12), (8, 12)])
def test_groups_that_do_not_fit_are_refused(group, size):
    with pytest.raises(graft.GraftError, match=f"road: group {group} must be even and divide the output size {size}"):
        adapted(linear(4, size), graft.RoAd(group=group))
