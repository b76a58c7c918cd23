"""Sparse deltas: gradients at their entries only, merging by scatter, sums that stay sparse."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import graft
from graft.core import files, selection, sparse
from graft.core.site import site_for
from models import llama, move, tokens

SPARSE = {"shira": dict(density=0.1), "apet": dict(parameters=300), "s2ft": dict(density=0.1)}


@settings(max_examples=25, deadline=None)
@given(out=st.integers(1, 9), width=st.integers(1, 9), rows=st.integers(1, 12), seed=st.integers(0, 99))
def test_gradients_in_pieces_are_those_of_the_dense_product(out, width, rows, seed):
    torch.manual_seed(seed)
    g, x = torch.randn(rows, out, dtype=torch.float64), torch.randn(rows, width, dtype=torch.float64)
    index = torch.randperm(out * width)[: 1 + out * width // 2].sort().values.int()
    before, sparse.BLOCK = sparse.BLOCK, width * 2  # two rows of dL/dW' at a time
    try:
        found = torch.ops.graft.sampled_product(g, x, index)
    finally:
        sparse.BLOCK = before
    torch.testing.assert_close(found, (g.T @ x).flatten()[index.long()])


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=5), st.data())
def test_the_best_of_all_are_those_of_one_long_vector(sizes, data):
    keep = data.draw(st.integers(1, sum(sizes)))
    torch.manual_seed(data.draw(st.integers(0, 99)))
    scores = [torch.rand(n) for n in sizes]
    found = selection.best_of_all(scores, keep)
    assert sum(map(len, found)) == keep
    least = min(s[i].min() for s, i in zip(scores, found) if len(i))
    for s, i in zip(scores, found):
        assert torch.equal(i, i.sort().values)
        rest = s.clone().index_fill_(0, i, -1)
        assert (rest <= least).all()


@pytest.mark.parametrize("score, needs", [(k, s.needs) for k, s in selection.SCORES.items()])
def test_scores_are_their_formulas(score, needs):
    torch.manual_seed(0)
    host = nn.Linear(5, 3)
    w, before = host.weight.detach().clone(), copy.deepcopy(host)
    batches = [torch.randn(4, 5) for _ in range(3)]
    stats = {"": {}}
    if needs:
        stats = graft.collect(nn.Sequential(host), batches, needs, "0", lambda m, b: m(b).square().mean())["0"]
    assert torch.equal(host.weight, before.weight) and host.weight.grad is None
    site = site_for("0", host, ("linear",), stats=stats)
    grads = []
    for x in batches:
        (g,) = torch.autograd.grad(before(x).square().mean(), before.weight)
        grads.append(g)
    grads, norms = torch.stack(grads), torch.cat(batches).norm(dim=0)
    tuner = torch.optim.AdamW(before.parameters(), 5e-5, weight_decay=0.0)
    before.bias.requires_grad_(False)
    for x in batches:
        tuner.zero_grad()
        before(x).square().mean().backward()
        tuner.step()
    expected = {
        "magnitude": w.abs(),
        "gradient": grads.mean(0).abs(),
        "snip": (w * grads.mean(0)).abs(),
        "fisher": grads.square().mean(0),
        "activation": norms.expand(3, 5),
        "wanda": w.abs() * norms,
        "change": (before.weight.detach() - w).abs(),
    }
    found = selection.scores(score, site)
    assert found.shape == (3, 5)
    if score != "random":
        torch.testing.assert_close(found, expected[score], rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("method", SPARSE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merging_writes_the_entries_in_place_and_undoing_restores_the_bits(method, dtype):
    model = llama(dtype)
    move(graft.attach(model, method, **SPARSE[method]), 0.5)
    own = {n: (p, p.detach().clone()) for n, p in model.named_parameters() if ".deltas." not in n}
    dense = graft.merged_state_dict(model)
    with graft.merge(model):
        now = dict(model.named_parameters())
        for name, (p, _) in own.items():
            assert now[name] is p and torch.equal(p, dense[name])
        assert any(not torch.equal(p, value) for p, value in own.values())
    assert all(torch.equal(p, value) for p, value in own.values())


def test_a_tied_matrix_is_not_written_in_place():
    model = llama(tie_word_embeddings=True)
    move(graft.attach(model, "shira", "lm_head", density=0.1), 0.5)
    table = model.get_input_embeddings().weight.detach().clone()
    expect = model(tokens()).logits
    with graft.merge(model):
        assert torch.equal(model.get_input_embeddings().weight, table)
        torch.testing.assert_close(model(tokens()).logits, expect)


def test_sparse_changes_of_different_methods_add_up_to_a_sparse_one():
    model = llama()
    parts = {m: move(graft.attach(model, m, name=m, **SPARSE[m]), 0.5, seed=i) for i, m in enumerate(SPARSE)}
    expect = graft.merged_state_dict(model)
    done = graft.combine(model, dict.fromkeys(parts, 1.0))
    assert done.exact and done.adapter.recipe.method.name == "shira"
    found = graft.merged_state_dict(model)
    for key, value in expect.items():
        torch.testing.assert_close(found[key], value)
    most = sum(len(d.entries()[0]) for a in parts.values() for d in a.deltas.values())
    assert sum(len(d.value) for d in done.adapter.deltas.values()) <= most


def test_random_choices_overlap_by_the_square_of_their_density():
    host = nn.Sequential(nn.Linear(200, 300))
    picks = [graft.attach(copy.deepcopy(host), "shira", "0", density=0.1, seed=s).deltas["0"].index for s in (0, 1)]
    both = torch.isin(*picks).sum().item() / 60_000
    assert abs(both - 0.01) < 4 * (0.01 * 0.99 / 60_000) ** 0.5


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 40), st.data(), st.sampled_from([torch.float64, torch.float32, torch.bfloat16]))
def test_a_bound_is_exceeded_by_as_many_as_asked_where_none_are_equal(size, data, dtype):
    values = torch.randperm(size, generator=torch.Generator().manual_seed(size)).to(dtype).view(1, -1)
    count = data.draw(st.integers(0, size))
    bound = sparse.exceeded_by(values, torch.tensor(count))
    assert bound.dtype == dtype and (values > bound).sum() == count
    assert count == size or bound in values


@pytest.mark.parametrize("method", ["shira", "apet"])
def test_drawn_positions_are_not_saved_and_come_back(method, tmp_path):
    model = nn.Sequential(nn.Linear(300, 500), nn.Linear(500, 300))
    adapter = move(graft.attach(model, method, ["0", "1"], seed=7), 0.5)
    x, places = torch.randn(3, 300), {path: d.index for path, d in adapter.deltas.items()}
    y, trained = model(x), sum(d.value.nbytes for d in adapter.deltas.values())
    adapter.save(tmp_path / "adapter")
    assert (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size < 1.1 * trained
    adapter.detach()
    again = graft.load(model, tmp_path / "adapter")
    assert all(torch.equal(d.index, places[path]) for path, d in again.deltas.items())
    assert torch.equal(model(x), y)
    assert len({*map(tuple, (d.index.tolist() for d in again.deltas.values()))}) == 2  # each site has its own


@pytest.mark.parametrize("method", ["shira", "apet"])
def test_positions_that_a_file_holds_are_kept(method):
    model = nn.Sequential(nn.Linear(6, 5))
    adapter = move(graft.attach(model, method, "0", **SPARSE[method] | ({"parameters": 3} if method == "apet" else {})))
    saved = files.content(adapter)
    saved.tensors["0:index"] = torch.arange(len(saved.tensors["0:value"]))
    built = files.build(model, saved, "other")
    built.load_state_dict(saved.tensors)
    assert torch.equal(built.deltas["0"].index, saved.tensors["0:index"].int())
    assert files.content(built).tensors.keys() == saved.tensors.keys()
