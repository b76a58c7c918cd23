"""SHiRA: which entries are trained, and that training them is training these entries of W in place; PEFT's layer."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft_reference import peft_layer
from sizes import Sizes
from torch import nn

import graft


def adapted(host, stats=None, **hyper):
    model = nn.Sequential(host)
    return model, graft.attach(model, graft.SHiRA(**hyper), "0", stats=stats).deltas["0"]


def mask_of(delta, w):
    return torch.zeros(w.numel(), dtype=torch.bool).index_fill(0, delta.index.long(), True).view(w.shape)


@settings(max_examples=25, deadline=None)
@given(
    d_in=st.integers(1, 9),
    d_out=st.integers(1, 9),
    density=st.floats(0.01, 1),
    mask=st.sampled_from(["random", "magnitude", "gradient", "snip", "structured"]),
)
def test_trains_the_best_entries(d_in, d_out, density, mask):
    host = nn.Linear(d_in, d_out, dtype=torch.float64)
    w, grad = host.weight.detach(), torch.randn(d_out, d_in, dtype=torch.float64)
    _, delta = adapted(host, {"0": {"weight_grad": grad}}, density=density, mask=mask)
    chosen = mask_of(delta, w)
    keep = max(1, round(density * d_out * d_in))
    assert len(delta.value) == keep == chosen.sum()
    score = {"magnitude": w.abs(), "gradient": grad.abs(), "snip": (w * grad).abs()}.get(mask)
    if score is not None and keep < w.numel():
        assert score[chosen].min() >= score[~chosen].max()
    if mask == "structured":
        diagonal = min(d_in, d_out)
        assert chosen.diagonal().sum() == min(keep, diagonal)
        beside = chosen.clone().fill_diagonal_(False)
        partial = [row for row in beside if 0 < row.sum() < d_in - 1]
        assert len(partial) <= 1  # whole rows, but for the one where the budget ends


def test_random_entries_differ_between_seeds_and_agree_within_one():
    picks = []
    for seed in (0, 0, 1):
        adapter = graft.attach(nn.Sequential(nn.Linear(30, 30)), graft.SHiRA(density=0.1), "0", seed=seed)
        picks.append(adapter.deltas["0"].index)
    assert torch.equal(picks[0], picks[1]) and not torch.equal(picks[0], picks[2])


def test_a_mask_from_gradients_needs_them():
    with pytest.raises(graft.GraftError, match="mask='snip'\\) needs the statistic weight_grad at 0"):
        adapted(nn.Linear(4, 4), mask="snip")


@pytest.mark.parametrize("host", [nn.Linear(7, 5), nn.Conv2d(2, 4, 3)])
def test_training_is_training_the_entries_in_place(host):
    host = host.double()
    x = torch.randn(6, 7) if isinstance(host, nn.Linear) else torch.randn(2, 2, 5, 5)
    x = x.double()
    full = copy.deepcopy(host)
    model, delta = adapted(host, density=0.3, mask="magnitude")
    chosen = mask_of(delta, host.weight.flatten(1)).view(host.weight.shape)
    ours = torch.optim.Adam([delta.value], 0.1)
    theirs = torch.optim.Adam([full.weight], 0.1)
    for _ in range(3):
        for m, optimizer in ((model, ours), (full, theirs)):
            optimizer.zero_grad()
            m(x).sin().sum().backward()
            if m is full:
                full.weight.grad *= chosen
            optimizer.step()
    torch.testing.assert_close(model(x), full(x))
    merged = graft.merged_state_dict(model)["0.weight"]
    torch.testing.assert_close(merged, full.weight.detach())
    assert torch.equal(merged[~chosen], host.weight[~chosen])


def test_equals_peft():
    peft = pytest.importorskip("peft")
    host = nn.Linear(8, 12).double()
    reference = peft_layer(host, peft.ShiraConfig(r=1, random_seed=0))
    model, delta = adapted(host, density=20 / 96)
    with torch.no_grad():
        delta.value.normal_()
        reference.shira_indices["default"] = torch.stack([delta.index // 8, delta.index % 8])
        reference.shira_weight["default"].copy_(delta.value)
    x = torch.randn(3, 5, 8, dtype=torch.float64)
    torch.testing.assert_close(model(x), reference(x))


def test_positions_chosen_by_gradients_load_without_them(tmp_path):
    host = nn.Linear(6, 5)
    stats = {"0": {"weight_grad": torch.randn(5, 6)}}
    model, delta = adapted(copy.deepcopy(host), stats, density=0.2, mask="gradient")
    with torch.no_grad():
        delta.value.normal_()
    graft.adapters(model)["default"].save(tmp_path / "adapter")
    again = nn.Sequential(host)
    graft.load(again, tmp_path / "adapter")
    x = torch.randn(3, 6)
    assert torch.equal(again(x), model(x))


def few_of_many(dtype=torch.float64, seed=0):
    """So few entries that their gradient is computed at them alone."""
    torch.manual_seed(seed)
    model, delta = adapted(nn.Linear(40, 30), density=0.02)
    with torch.no_grad():
        delta.value.normal_()
    model.to(dtype)
    delta.value.data = delta.value.data.to(torch.promote_types(dtype, torch.float32))
    return model, delta


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_gradients_of_few_entries_are_those_of_the_dense_product(dtype):
    model, delta = few_of_many(dtype)
    x, g = torch.randn(3, 5, 40, dtype=dtype, requires_grad=True), torch.randn(3, 5, 30, dtype=dtype)
    to_value, to_x = torch.autograd.grad(model(x), [delta.value, x], g)
    exact = (g.double().flatten(0, 1).T @ x.detach().double().flatten(0, 1)).flatten()[delta.index]
    tolerance = dict(rtol=1e-5, atol=1e-5) if dtype != torch.float64 else {}
    torch.testing.assert_close(to_value.double(), exact, **tolerance)
    torch.testing.assert_close(to_x, g @ graft.merged_state_dict(model)["0.weight"])


@pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="sampled products on the CPU need MKL")
def test_few_entries_compile_to_one_graph():
    model, delta = few_of_many()
    x = torch.randn(3, 40, dtype=torch.float64)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    grads = []
    for run in (model, compiled):
        y = run(x).sin().sum()
        with Sizes() as sizes:
            grads.append(torch.autograd.grad(y, delta.value)[0])
        assert 30 * 40 not in sizes.made  # neither W' nor dL/dW'
    torch.testing.assert_close(*grads)


def test_few_entries_in_a_batch_of_deltas():
    model, delta = few_of_many()
    values = torch.randn(4, *delta.value.shape, dtype=torch.float64, requires_grad=True)
    x = torch.randn(4, 3, 40, dtype=torch.float64)

    def run(value, x):
        return torch.func.functional_call(model, {"0.deltas.default.value": value}, (x,)).sin()

    each = torch.stack([run(v, row) for v, row in zip(values, x)])
    batch = torch.func.vmap(run)(values, x)
    torch.testing.assert_close(batch, each)
    grads = [torch.autograd.grad(y.sum(), values)[0] for y in (batch, each)]
    torch.testing.assert_close(*grads)


def test_few_entries_have_second_derivatives():
    model, delta = few_of_many()
    x = torch.randn(3, 40, dtype=torch.float64, requires_grad=True)

    def run(value, x):
        return torch.func.functional_call(model, {"0.deltas.default.value": value}, (x,)).sin()

    assert torch.autograd.gradgradcheck(run, (delta.value.detach().requires_grad_(), x))


def test_positions_that_do_not_rise_are_refused_where_their_order_counts():
    g, x = torch.randn(3, 4), torch.randn(3, 10)
    rising = torch.tensor([1, 7, 19])
    sampled = torch.ops.graft.sampled_product
    torch.testing.assert_close(sampled(g, x, rising), (g.T @ x).flatten()[rising])
    with pytest.raises(RuntimeError):
        sampled(g, x, torch.tensor([2, 1, 19]))
