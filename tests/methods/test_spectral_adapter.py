"""Spectral Adapter: twice the rank of LoRA for its parameters; rotations keep the spectrum; no collision."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from one_layer import adapted, linear

import graft


@settings(max_examples=25, deadline=None)
@given(
    d_in=st.integers(2, 9), d_out=st.integers(2, 9), rank=st.integers(2, 4), first=st.integers(0, 2),
    rotational=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_tunes_the_chosen_triplets(d_in, d_out, rank, first, rotational, seed):
    if min(d_in, d_out) - first < 1 + rotational:
        return
    host = linear(d_in, d_out, seed=seed)
    w, x = host.weight.detach().clone(), torch.randn(4, d_in, dtype=torch.float64)
    mode = "rotational" if rotational else "additive"
    model, delta = adapted(host, graft.SpectralAdapter(rank=rank, mode=mode, first=first), seed)
    U, s, V = (t.double() for t in (delta.U, delta.s, delta.V))
    if rotational:
        left, right = (delta.rotation(t).detach() for t in (delta.left, delta.right))
        torch.testing.assert_close(left @ left.T, torch.eye(len(s), dtype=left.dtype))
        moved = (U @ left * s) @ (right.T @ V)
    else:
        moved = ((U + delta.P.detach()) * s) @ (V + delta.Q.detach())
    new = w - (U * s) @ V + moved
    torch.testing.assert_close(delta.weight(w), new, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model(x), x @ new.T + host.bias, rtol=1e-5, atol=1e-5)
    if rotational:
        torch.testing.assert_close(torch.linalg.svdvals(new), torch.linalg.svdvals(w), rtol=1e-5, atol=1e-5)


def test_the_change_has_twice_the_rank_of_lora_with_as_many_parameters():
    host = linear(20, 16)
    w = host.weight.detach().clone()
    _, spectral = adapted(copy.deepcopy(host), graft.SpectralAdapter(rank=3))
    _, lora = adapted(copy.deepcopy(host), graft.LoRA(rank=3))
    count = lambda d: sum(p.numel() for p in d.parameters())
    assert count(spectral) == count(lora)
    rank = lambda d: int(torch.linalg.matrix_rank(d.weight(w) - w, atol=1e-6))
    assert (rank(spectral), rank(lora)) == (6, 3)


def test_rotations_of_different_triplets_do_not_meet():
    host = linear(10, 10)
    w = host.weight.detach().clone()
    changes = [
        adapted(copy.deepcopy(host), graft.SpectralAdapter(rank=3, mode="rotational", first=i))[1].weight(w) - w
        for i in (0, 3)
    ]
    assert min(c.norm() for c in changes) > 0.1
    for a, b in ((changes[0].T, changes[1]), (changes[0], changes[1].T)):
        torch.testing.assert_close(a @ b, torch.zeros(10, 10, dtype=torch.float64), rtol=0, atol=1e-6)


@pytest.mark.parametrize("first, mode", [(6, "additive"), (5, "rotational")])
def test_triplets_that_are_not_there_are_refused(first, mode):
    with pytest.raises(graft.GraftError, match=f"spectral_adapter: first {first} .* leave too few of the 6"):
        adapted(linear(8, 6), graft.SpectralAdapter(first=first, mode=mode))
