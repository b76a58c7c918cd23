"""qGOFT: the tree of planes is the product of the rotations, level by level; strict ones keep angles; the penalty."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from one_layer import adapted, linear
from sizes import largest

import graft


def dense(planes, d):
    """P_L ... P_1: every plane is one matrix, the features 2^l k and 2^l k + 2^(l-1) of level l in turn."""
    R, given = torch.eye(d, dtype=planes.dtype), iter(planes)
    step = 1
    while step < d:
        for low in range(0, d, 2 * step):
            if low + step < d:
                P = torch.eye(d, dtype=planes.dtype)
                at = torch.tensor([low, low + step])
                P[at[:, None], at] = next(given)
                R = P @ R
        step *= 2
    assert next(given, None) is None
    return R


@settings(max_examples=40, deadline=None)
@given(
    d=st.integers(2, 21) | st.sampled_from([24, 64, 96, 160]),
    d_out=st.integers(1, 6),
    strict=st.booleans(),
    seed=st.integers(0, 99),
)
def test_turns_the_inputs_by_all_planes(d, d_out, strict, seed):
    host = linear(d, d_out, seed=seed)
    w, x = host.weight.detach().clone(), torch.randn(4, d, dtype=torch.float64)
    model, delta = adapted(host, graft.QGOFT(strict=strict), seed)
    planes = delta.planes
    if strict:
        c, s = delta.angles.cos(), delta.angles.sin()
        planes = torch.stack([torch.stack([c, -s], -1), torch.stack([s, c], -1)], -2)
    R = dense(planes.detach(), d)
    torch.testing.assert_close(model(x), (x @ R) @ w.T + host.bias)
    new = delta.weight(w)
    torch.testing.assert_close(new, w @ R.T)
    if strict:
        torch.testing.assert_close(R @ R.T, torch.eye(d, dtype=R.dtype))
        torch.testing.assert_close(new @ new.T, w @ w.T)  # lengths of the rows, and angles between them


def test_as_many_parameters_as_planes():
    assert sum(p.numel() for p in adapted(linear(16, 3), graft.QGOFT(strict=True))[1].parameters()) == 15
    assert sum(p.numel() for p in adapted(linear(16, 3), graft.QGOFT())[1].parameters()) == 4 * 15


def test_the_tree_never_forms_a_matrix_of_the_inputs():
    model, _ = adapted(linear(1024, 2), graft.QGOFT())
    x = torch.randn(3, 1024, dtype=torch.float64)
    assert largest(lambda: model(x).sum().backward()) < 1024 * 1024 / 16


def test_the_penalty_is_that_of_the_products_of_the_columns():
    model = torch.nn.Sequential(linear(6, 5), linear(5, 3))
    adapter = graft.attach(model, graft.QGOFT(gamma=0.5))
    deltas = list(adapter.deltas.values())
    assert graft.QGOFT.penalty(deltas) == 0
    torch.manual_seed(0)
    expect = 0.0
    for d in deltas:
        with torch.no_grad():
            d.planes.normal_()
        expect += sum((P[:, 0] @ P[:, 1]).item() ** 2 for P in d.planes.detach())
    torch.testing.assert_close(graft.QGOFT.penalty(deltas).item(), 0.5 * expect)


def test_strict_rotations_need_no_penalty():
    adapter = graft.attach(torch.nn.Sequential(linear(6, 5)), graft.QGOFT(strict=True))
    assert graft.QGOFT.penalty(list(adapter.deltas.values())) is None


def test_one_input_has_no_plane():
    with pytest.raises(graft.GraftError, match="one input, which leaves no plane"):
        adapted(linear(1, 4), graft.QGOFT())
