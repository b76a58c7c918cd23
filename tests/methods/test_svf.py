"""SVF: the singular values are scaled, and nothing else; experts mix linearly; as the authors' code composes it."""

import copy

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from one_layer import adapted, linear
from torch import nn

import graft


@settings(max_examples=25, deadline=None)
@given(d_in=st.integers(1, 8), d_out=st.integers(1, 8), seed=st.integers(0, 99))
def test_scales_the_singular_values(d_in, d_out, seed):
    host = linear(d_in, d_out, seed=seed)
    w, x = host.weight.detach().clone(), torch.randn(4, d_in, dtype=torch.float64)
    model, delta = adapted(host, graft.SVF(), seed)
    U, s, V = torch.linalg.svd(w, full_matrices=False)
    new = (U * (s * delta.z.detach())) @ V
    assert len(delta.z) == min(d_in, d_out)
    torch.testing.assert_close(delta.weight(w), new, rtol=1e-5, atol=1e-5)  # U and V are kept in float32
    torch.testing.assert_close(model(x), x @ new.T + host.bias, rtol=1e-5, atol=1e-5)


def test_the_sum_of_the_singular_values_can_stay():
    host = linear(7, 5)
    w = host.weight.detach().clone()
    _, delta = adapted(host, graft.SVF(keep_sum=True), size=0.2)
    U, s, V = torch.linalg.svd(w, full_matrices=False)
    moved = s * delta.z.detach()
    new = delta.weight(w)
    torch.testing.assert_close(new, (U * moved) @ V * (s.sum() / moved.sum()), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(torch.linalg.svdvals(new).sum(), s.sum(), rtol=1e-5, atol=1e-5)


def test_experts_mix_by_mixing_their_vectors():
    host, x = linear(6, 6), torch.randn(3, 6, dtype=torch.float64)
    one, first = adapted(copy.deepcopy(host), graft.SVF(), 1)
    two, second = adapted(copy.deepcopy(host), graft.SVF(), 2)
    mixed, delta = adapted(copy.deepcopy(host), graft.SVF())
    with torch.no_grad():
        delta.z.copy_(0.3 * first.z + 0.7 * second.z)
    torch.testing.assert_close(mixed(x), 0.3 * one(x) + 0.7 * two(x))


def test_only_the_vector_is_saved(tmp_path):
    model = nn.Sequential(nn.Linear(64, 64))
    adapter = graft.attach(model, graft.SVF(), "0")
    adapter.save(tmp_path / "a")
    assert set(adapter.state_dict()) == {"0:z"}
    assert sum(f.stat().st_size for f in (tmp_path / "a").glob("*.safetensors")) < 4 * 64 + 300


def test_vectors_add_up_unless_the_sum_is_kept():
    for keep_sum in (False, True):
        model, x, changes = nn.Sequential(linear(6, 5)), torch.randn(3, 6, dtype=torch.float64), []
        for name in "ab":
            adapter = graft.attach(model, graft.SVF(keep_sum=keep_sum), "0", name=name)
            with torch.no_grad():
                adapter.deltas["0"].z.uniform_(0.5, 2)
            changes.append(adapter.deltas["0"].weight(model[0].weight) - model[0].weight)
        mixed = graft.combine(model, {"a": 0.3, "b": 0.7}).adapter
        assert (mixed.recipe.method is graft.SVF) is not keep_sum
        graft.activate(model, "combined")
        new = model[0].weight + 0.3 * changes[0] + 0.7 * changes[1]
        torch.testing.assert_close(model(x), x @ new.T + model[0].bias, rtol=1e-5, atol=1e-5)
