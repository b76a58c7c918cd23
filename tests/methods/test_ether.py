"""ETHER: reflections of fixed strength. ETHER+: relaxed ones on both sides, which leave the bias alone."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from one_layer import acts_as_its_weight, adapted, linear

import graft

sizes = dict(blocks=st.integers(1, 3), b_in=st.integers(1, 4), b_out=st.integers(1, 4), seed=st.integers(0, 99))


def outer(u):
    return torch.outer(u, u) / (u @ u)


@settings(max_examples=25, deadline=None)
@given(**sizes)
def test_reflects_each_block_of_inputs(blocks, b_in, b_out, seed):
    host = linear(blocks * b_in, b_out, seed=seed)
    w, x = host.weight.detach().clone(), torch.randn(4, blocks * b_in, dtype=torch.float64)
    model, delta = adapted(host, graft.ETHER(blocks=blocks), seed)
    eye = torch.eye(b_in, dtype=torch.float64)
    H = [eye - 2 * outer(u) for u in delta.u.detach()]
    for block in H:
        torch.testing.assert_close(block @ block, eye)
        torch.testing.assert_close(torch.linalg.det(block).item(), -1.0)
        torch.testing.assert_close((block - eye).norm().item(), 2.0)
    H = torch.block_diag(*H)
    torch.testing.assert_close(model(x), x @ (w @ H).T + host.bias)
    torch.testing.assert_close(delta.weight(w), w @ H)


@settings(max_examples=25, deadline=None)
@given(one_sided=st.booleans(), bias=st.booleans(), **sizes)
def test_plus_relaxes_them_on_both_sides(blocks, b_in, b_out, seed, one_sided, bias):
    host = linear(blocks * b_in, blocks * b_out, bias, seed=seed)
    w, x = host.weight.detach().clone(), torch.randn(4, blocks * b_in, dtype=torch.float64)
    model, delta = adapted(host, graft.ETHERPlus(blocks=blocks, one_sided=one_sided), seed)

    def relaxed(pair):
        eye = torch.eye(pair.shape[-1], dtype=torch.float64)
        made = [eye - outer(u) + outer(v) for u, v in zip(*pair)]
        assert all((m - eye).norm() <= 2 + 1e-9 for m in made)
        return torch.block_diag(*made)

    new = w @ relaxed(delta.inputs.detach())
    if not one_sided:
        new = relaxed(delta.outputs.detach()) @ new
    torch.testing.assert_close(model(x), x @ new.T + (host.bias if bias else 0))
    torch.testing.assert_close(delta.weight(w), new)


def test_the_strength_of_a_reflection_does_not_grow_with_the_step():
    host = linear(8, 8)
    w = host.weight.detach().clone()
    distances = []
    for size in (0.01, 1.0, 100.0):
        _, delta = adapted(linear(8, 8), graft.ETHER(blocks=2), size=size)
        distances.append((torch.linalg.solve(w, delta.weight(w)) - torch.eye(8)).norm())
    torch.testing.assert_close(torch.stack(distances), torch.full((3,), 8.0, dtype=torch.float64).sqrt())


@pytest.mark.parametrize(
    "recipe, message",
    [
        (graft.ETHER(blocks=3), "ether: blocks 3 must divide the input size 8 of 0"),
        (graft.ETHERPlus(blocks=4), "ether_plus: blocks 4 must divide the output size 6 of 0"),
    ],
)
def test_blocks_that_do_not_fit_are_refused(recipe, message):
    with pytest.raises(graft.GraftError, match=message):
        adapted(linear(8, 6), recipe)


@settings(max_examples=15, deadline=None)
@given(bias=st.booleans(), tokens=st.sampled_from([1, 300]), **sizes)
def test_plus_makes_one_change_of_both_sides_for_many_tokens(blocks, b_in, b_out, seed, bias, tokens):
    model = adapted(linear(blocks * b_in, blocks * b_out, bias, seed=seed), graft.ETHERPlus(blocks=blocks), seed)
    acts_as_its_weight(*model, tokens)
