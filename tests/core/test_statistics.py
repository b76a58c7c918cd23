"""Statistics against dense computations over all batches at once."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers.pytorch_utils import Conv1D

import graft
from graft.core.site import site_for
from graft.core.statistics import Principal
from models import llama, tokens


@given(st.integers(0, 10**6), st.integers(2, 6), st.lists(st.integers(1, 9), min_size=1, max_size=4))
def test_components_brought_up_to_date_are_those_of_all_tokens(seed, width, sizes):
    generator = torch.Generator().manual_seed(seed)
    parts = [torch.randn(n, width, generator=generator, dtype=torch.float64) + 3 for n in sizes]
    stream = Principal(str(width))
    for part in parts:
        stream.add(part)
    found = stream.value()
    rows = torch.cat(parts)
    _, values, directions = torch.linalg.svd(rows - rows.mean(0), full_matrices=False)
    count = min(len(rows) - 1, width)  # centring takes one away
    torch.testing.assert_close(found.sizes[:count], values[:count])
    spread = values.square().sum()
    if spread > 1e-9:
        torch.testing.assert_close(found.shares[:count], (values.square() / spread)[:count].float())
    gaps = -values.square().diff()
    for i in range(count - 1):
        if gaps[: i + 1].min() > 1e-3 * spread:  # a direction is told by its gap to the next
            assert abs(abs(found.directions[i] @ directions[i]) - 1) < 1e-6
            assert found.directions[i, found.directions[i].abs().argmax()] > 0


def test_few_of_many_components_come_from_iterations_and_are_near():
    torch.manual_seed(0)
    mixing = torch.diag(0.5 ** torch.arange(64.0)) @ torch.linalg.qr(torch.randn(64, 64)).Q
    rows = torch.randn(600, 64) @ mixing
    stream, random = Principal("3"), torch.get_rng_state()
    for part in rows.split(150):
        stream.add(part)
    assert torch.equal(torch.get_rng_state(), random)
    _, values, directions = torch.linalg.svd(rows - rows.mean(0), full_matrices=False)
    found = stream.value()
    assert found.directions.shape == (3, 64)
    torch.testing.assert_close(found.sizes, values[:3], rtol=1e-3, atol=0)
    torch.testing.assert_close((found.directions @ directions[:3].T).abs(), torch.eye(3), rtol=0, atol=2e-2)


def inputs(model, path, batches, ids=lambda batch: batch):
    """The inputs [tokens, in] of a module, one tensor a batch."""
    seen = []
    handle = model.get_submodule(path).register_forward_hook(lambda m, args, out: seen.append(args[0].flatten(0, -2)))
    for batch in batches:
        model(ids(batch))
    handle.remove()
    return seen


@torch.no_grad()
def test_one_pass_gives_all_that_is_asked_of_all_modules():
    model, batches = llama().double(), [tokens(), tokens(seed=1)]
    path = "model.layers.1.mlp.down_proj"
    needs = ["input_gram", "input_covariance", "input_components:48", "width", "weight"]
    calls = []
    handle = model.register_forward_hook(lambda *_: calls.append(0))
    stats = graft.collect(model, batches, needs, "mlp", loss=lambda m, b: m(b).logits.mean())
    handle.remove()
    assert len(calls) == 2 and len(stats) == 6
    found, seen = stats[path], inputs(model, path, batches)
    rows = torch.cat(seen)
    torch.testing.assert_close(found["input_gram"], rows.T @ rows)
    torch.testing.assert_close(found["input_covariance"], sum(x.T @ x / x.max() ** 2 for x in seen) / 2)
    values = torch.linalg.svdvals(rows - rows.mean(0))
    torch.testing.assert_close(found["input_components:48"].sizes, values)
    assert found["width"] == 32
    assert torch.equal(found["weight"], model.get_submodule(path).weight)


@torch.no_grad()
def test_padding_does_not_count():
    model, ids = llama(), tokens()
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    path = "model.layers.0.self_attn.q_proj"
    run = lambda m, b: m(**b).logits.mean()
    stats = graft.collect(model, [{"input_ids": ids, "attention_mask": mask}], ["input_gram"], "q_proj", loss=run)
    (rows,) = inputs(model, path, [ids])
    rows = rows[mask.bool().flatten()]
    torch.testing.assert_close(stats[path]["input_gram"], rows.T @ rows)


@pytest.mark.parametrize("host", [Conv1D(4, 4), nn.Linear(4, 4), nn.Conv2d(4, 4, 2)])
def test_a_gradient_is_laid_out_as_the_matrix(host):
    model = nn.Sequential(host)
    x = torch.randn(3, 4, 5, 5) if isinstance(host, nn.Conv2d) else torch.randn(3, 4)
    loss = lambda model, x: model(x).sin().sum()
    grad = graft.collect(model, [x], ["weight_grad"], "0", loss=loss)["0"]["weight_grad"]
    site = site_for("0", host, ("linear", "conv"))
    w = site.weight.detach().requires_grad_()
    (expect,) = torch.autograd.grad(site.apply(x, w, site.bias).sin().sum(), [w])
    torch.testing.assert_close(grad, expect)


def test_the_matrix_of_another_model_needs_no_data():
    model = nn.Sequential(nn.Linear(3, 4))
    stats = graft.collect(model, (), ["weight"], "0")
    assert torch.equal(stats["0"]["weight"], model[0].weight)
    assert stats["0"]["weight"].data_ptr() != model[0].weight.data_ptr()


def test_what_cannot_be_collected_is_refused():
    model = llama()
    with pytest.raises(graft.GraftError, match="no statistic is called 'hessian'; there are weight_grad"):
        graft.collect(model, [tokens()], ["hessian"])
    with pytest.raises(
        graft.GraftError, match=r"input_covariance is defined for linear hosts; .*embed_tokens is a embedd"
    ):
        graft.collect(model, [tokens()], ["input_covariance"], "embed_tokens")
    with pytest.raises(graft.GraftError, match="no batch was given"):
        graft.collect(model, [], ["input_gram"])


def test_statistics_are_let_go_by_the_parts_of_a_delta_too():
    model = llama(layers=1)
    stats = graft.collect(
        model, [tokens()], ["weight_grad"], "q_proj", lambda m, batch: m(batch).logits.square().mean()
    )
    adapter = graft.attach(model, "rosa", "q_proj", stats=stats)
    deltas = [m for d in adapter.deltas.values() for m in d.modules() if isinstance(m, graft.Delta)]
    assert len(deltas) > 1 and not any(d.site.stats for d in deltas)
    assert all(stats.values())  # those of the user stay
