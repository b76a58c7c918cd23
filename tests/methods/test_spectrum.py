"""The singular triplets which several methods share do not depend on the signs that a decomposition happens to give."""

import torch
from one_layer import linear
from torch import nn

from graft.core.site import site_for
from graft.methods.weight.spectrum import Spectral


def at(weight, **kw):
    host = nn.Linear(*weight.T.shape, bias=False)
    host.weight = nn.Parameter(weight)
    return Spectral(site_for("host", host, ("linear",)), **kw)


def test_one_matrix_has_one_basis(monkeypatch):
    w = linear(9, 6).weight.detach()
    plain, svd = at(w), torch.linalg.svd

    def flipped(*args, **kwargs):
        left, values, right = svd(*args, **kwargs)
        sign = torch.tensor([1, -1, -1, 1, -1, 1], dtype=left.dtype)
        return left * sign, values, right * sign[:, None]

    monkeypatch.setattr(torch.linalg, "svd", flipped)
    other = at(w)
    for name in ("U", "s", "V"):
        assert torch.equal(getattr(plain, name), getattr(other, name))
    torch.testing.assert_close((plain.U * plain.s) @ plain.V, w.float())


def test_the_largest_triplets_but_the_first():
    w = linear(9, 6).weight.detach()
    some, U = at(w, count=2, first=1), at(w)
    assert torch.equal(some.s, U.s[1:3]) and torch.equal(some.U, U.U[:, 1:3]) and torch.equal(some.V, U.V[1:3])
    assert len(at(w, count=50).s) == 6
