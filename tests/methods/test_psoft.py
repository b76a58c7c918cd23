"""PSOFT: principal components are turned among themselves; PEFT's layer."""

import peft
import pytest
import torch
from one_layer import adapted, linear
from peft_reference import peft_layer

import graft


@pytest.mark.parametrize("scales", [True, False])
def test_equals_peft(scales):
    host = linear(9, 12).float()
    config = peft.PsoftConfig(r=4, psoft_alpha=4, psoft_mag_a=scales, psoft_mag_b=scales)
    theirs = peft_layer(host, config)
    ours, delta = adapted(host, graft.PSOFT(rank=4, scales=scales))
    A, _ = theirs._get_psoft_ab_cache_buffers("default")
    sign = (A * delta.V).sum(1).sign()  # PEFT takes the vectors as its decomposition gives them
    torch.testing.assert_close(A, sign[:, None] * delta.V, rtol=1e-5, atol=1e-5)
    R, upper = theirs.psoft_R["default"], delta.upper
    with torch.no_grad():
        R.weight.copy_(delta.triangle * (sign[:, None] * sign)[upper[0], upper[1]])
        if scales:
            R.vector_a.copy_(delta.a)
            R.vector_b.copy_(delta.b)
    x = torch.randn(3, 5, 9)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-5)


def test_without_scales_the_angles_in_the_principal_space_stay():
    host = linear(10, 7)
    w = host.weight.detach().clone()
    _, delta = adapted(host, graft.PSOFT(rank=3, scales=False))
    new, basis = delta.weight(w), delta.V.double()
    assert (new - w).norm() > 0.1
    left = delta.U.double()
    before, after = left.T @ w @ basis.T, left.T @ new @ basis.T
    torch.testing.assert_close(after @ after.T, before @ before.T, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(new - new @ basis.T @ basis, w - w @ basis.T @ basis, rtol=1e-5, atol=1e-5)


def test_one_triplet_cannot_be_turned():
    with pytest.raises(graft.GraftError, match="psoft: 0 has one singular triplet"):
        adapted(linear(5, 1), graft.PSOFT())
