"""SVFT: a sparse matrix between the singular vectors, whose places are those of its pattern."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from one_layer import adapted, linear
from torch import nn

import graft


def places(pattern, d, U, V):
    """Where M is trained, as zeros and ones; random ones are the delta's own."""
    k = U.shape[1]
    i, j = torch.arange(k)[:, None], torch.arange(k)
    if pattern in ("plain", "banded"):
        return ((i - j).abs() <= (d if pattern == "banded" else 0)).double()
    count = sum(int(abs(a - b) <= d) for a in range(k) for b in range(k))
    alignment = (U.T @ V.T).abs()
    bound = alignment.flatten().sort(descending=True).values[count - 1]
    return (alignment >= bound).double()


@settings(max_examples=40, deadline=None)
@given(
    d_in=st.integers(1, 8), d_out=st.integers(1, 8), d=st.integers(0, 3),
    pattern=st.sampled_from(["plain", "banded", "random", "top_k"]), seed=st.integers(0, 99),
)  # fmt: skip
def test_combines_singular_vectors_at_the_places_of_the_pattern(d_in, d_out, d, pattern, seed):
    d_out = d_in if pattern == "top_k" else d_out
    host = linear(d_in, d_out, seed=seed)
    w, x = host.weight.detach().clone(), torch.randn(4, d_in, dtype=torch.float64)
    model, delta = adapted(host, graft.SVFT(pattern=pattern, off_diagonals=d), seed)
    U, V = delta.U.double(), delta.V.double()
    change = delta.weight(w).detach() - w
    M = U.T @ change @ V.T
    torch.testing.assert_close(U @ M @ V, change, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model(x), x @ (w + change).T + host.bias, rtol=1e-5, atol=1e-5)
    trained = (M.abs() > 1e-5).double()
    assert trained.sum() == len(delta.value)
    k = min(d_in, d_out)
    e = min(d, k - 1) if pattern != "plain" else 0
    assert len(delta.value) == k * (2 * e + 1) - e * (e + 1)
    if pattern != "random":
        assert torch.equal(trained, places(pattern, e, U, V))


@pytest.mark.parametrize("pattern", ["banded", "random"])
def test_all_places_reach_any_change(pattern):
    host = linear(6, 6)
    w, goal = host.weight.detach().clone(), torch.randn(6, 6, dtype=torch.float64)
    _, delta = adapted(host, graft.SVFT(pattern=pattern, off_diagonals=5))
    M = delta.U.double().T @ (goal - w) @ delta.V.double().T
    if pattern == "random":
        values = M.flatten()[delta.index]
    else:
        values = torch.cat([M.diagonal(o) for o in delta.offsets])
    with torch.no_grad():
        delta.value.copy_(values)
    torch.testing.assert_close(delta.weight(w), goal, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("pattern", ["plain", "banded", "random", "top_k"])
def test_gradients_are_those_of_the_dense_product(pattern):
    host, x = linear(7, 7), torch.randn(5, 7, dtype=torch.float64, requires_grad=True)
    model, delta = adapted(host, graft.SVFT(pattern=pattern))
    dense = nn.functional.linear(x, delta.weight(host.weight), host.bias)
    ours = torch.autograd.grad(model(x).sin().sum(), [x, delta.value])
    for a, b in zip(ours, torch.autograd.grad(dense.sin().sum(), [x, delta.value])):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("pattern", ["banded", "random", "top_k"])
def test_only_the_coefficients_are_saved_and_the_places_found_again(pattern, tmp_path):
    model = nn.Sequential(nn.Linear(32, 32))
    adapter = graft.attach(model, graft.SVFT(pattern=pattern), "0", seed=5)
    with torch.no_grad():
        adapter.deltas["0"].value.normal_()
    x = torch.randn(3, 32)
    y = model(x)
    adapter.save(tmp_path / "a")
    assert set(adapter.state_dict()) == {"0:value"}
    adapter.detach()
    graft.load(model, tmp_path / "a", trainable=True)
    assert torch.equal(model(x), y)


def test_alignment_needs_a_square_matrix():
    with pytest.raises(graft.GraftError, match=r"svft: the pattern top_k .* \[4, 6\]; choose banded or random"):
        adapted(linear(6, 4), graft.SVFT(pattern="top_k"))


def test_adapters_with_places_of_their_own_are_not_added_by_their_coefficients():
    model, x = nn.Sequential(linear(6, 5)), torch.randn(3, 6, dtype=torch.float64)
    changes = []
    for name, seed in (("a", 1), ("b", 2)):
        adapter = graft.attach(model, graft.SVFT(pattern="random", off_diagonals=1), "0", name=name, seed=seed)
        with torch.no_grad():
            adapter.deltas["0"].value.normal_()
        changes.append(adapter.deltas["0"].weight(model[0].weight) - model[0].weight)
    for weights in ({"a": 0.5, "b": -1.0}, {"a": 0.5}):
        graft.combine(model, weights)
        graft.activate(model, "combined")
        new = model[0].weight + sum(w * c for w, c in zip(weights.values(), changes))
        torch.testing.assert_close(model(x), x @ new.T + model[0].bias, rtol=1e-5, atol=1e-5)
        graft.adapters(model)["combined"].detach()


@pytest.mark.parametrize("pattern", ["banded", "random"])
def test_rows_of_one_batch_have_places_of_their_own(pattern):
    model, x = nn.Sequential(linear(6, 5)), torch.randn(3, 4, 6, dtype=torch.float64)
    for name, seed in (("a", 1), ("b", 2)):
        adapter = graft.attach(model, graft.SVFT(pattern=pattern, off_diagonals=1), "0", name=name, seed=seed)
        with torch.no_grad():
            adapter.deltas["0"].value.normal_()
    for gradients in (True, False):
        with torch.set_grad_enabled(gradients), graft.route(model, ["b", "a", "b"]):
            y = model(x)
        for i, name in enumerate(["b", "a", "b"]):
            graft.activate(model, name)
            torch.testing.assert_close(y[i], model(x[i]))
