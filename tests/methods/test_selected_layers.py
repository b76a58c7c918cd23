"""Methods that choose layers or tensors: which, that the others cost nothing, and what the optimizer holds."""

from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import graft
from graft.methods.selection.greentrainer import best_backward
from graft.training import optimizers
from models import bert, llama, tokens

LOSS = lambda model, batch: model(batch).logits.square().mean()


def test_surgical_trains_the_layers_with_the_largest_fisher_information_and_leaves_the_others():
    model, data = llama(layers=4), [tokens(seed=i) for i in range(3)]
    expect = []
    for block in model.model.layers:
        grads = [torch.autograd.grad(LOSS(model, x), [*block.parameters()]) for x in data]
        expect.append(sum(torch.stack(of).square().mean(0).norm().item() for of in zip(*grads)))
    stats = graft.collect(model, data, ("fisher",), "blocks", LOSS)
    found = [stats[f"model.layers.{i}"]["fisher"] for i in range(4)]
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expect), rtol=1e-4, atol=0)
    adapter = graft.attach(model, graft.Surgical(layers=2), stats=stats)
    best = sorted(range(4), key=lambda i: -expect[i])[:2]
    assert [*adapter.deltas] == [f"model.layers.{i}" for i in sorted(best)]
    LOSS(model, tokens()).backward()
    with_gradient = {n for n, p in model.named_parameters() if p.grad is not None}
    assert with_gradient and all(".deltas.default." in n for n in with_gradient)


def test_hft_trains_half_of_each_category():
    model = llama(layers=4, tie_word_embeddings=False)
    counts, richer = {}, set()
    for seed in range(8):
        adapter = graft.attach(model, graft.HFT(), ["all-linear", "norms", "embeddings", "head"], seed=seed)
        assert {"model.embed_tokens", "model.norm", "lm_head"} < {*adapter.deltas}
        for i in range(4):
            of = lambda part, i=i, adapter=adapter: sum(
                p.startswith(f"model.layers.{i}.{part}") for p in adapter.deltas
            )
            assert of("self_attn.") == 2 and of("mlp.") in (1, 2) and of("input_layernorm") + of("post_attention") == 1
        of = [sum(p.startswith(f"model.layers.{i}.mlp.") for p in adapter.deltas) for i in range(4)]
        assert sorted(of) == [1, 1, 2, 2]
        richer.add(tuple(of))
        counts[seed] = {*adapter.deltas}
        adapter.detach()
    assert counts[0] != counts[1] and len(richer) > 2  # which blocks train two of three is drawn


def test_hft_takes_an_attention_together_that_is_divided_among_modules():
    adapter = graft.attach(bert(), graft.HFT())
    for i in range(2):
        inside = [p.partition(f"layer.{i}.")[2] for p in adapter.deltas if f"layer.{i}." in p]
        assert sum("attention" in p and "LayerNorm" not in p for p in inside) == 2
        assert sum(p in ("intermediate.dense", "output.dense") for p in inside) == 1


@settings(max_examples=20, deadline=None)
@given(st.floats(0.01, 1), st.integers(0, 50))
def test_gmt_moves_the_entries_with_the_largest_gradients(density, seed):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(7, 5))
    adapter = graft.attach(model, graft.GMT(density=density), "0")
    copy = adapter.deltas["0"].copy
    (model(torch.randn(4, 7)) ** 2).sum().backward()
    dense, before = copy.weight.grad.clone(), copy.weight.detach().clone()
    adapter.step(0.1)
    torch.optim.SGD(adapter.parameters(), 0.1).step()
    moved = copy.weight.detach() != before
    assert moved.sum() == max(1, round(density * 35))
    assert moved.all() or dense.abs()[moved].min() >= dense.abs()[~moved].max()
    torch.testing.assert_close(copy.weight.detach(), before - 0.1 * dense * moved)


def run_lisa(layers, interval=3, steps=12, blocks=5):
    model = llama(layers=blocks, tie_word_embeddings=False)
    adapter = graft.attach(model, graft.LISA(layers=layers, interval=interval))
    optimizer = torch.optim.AdamW(adapter.parameters(), 1e-3)
    size = {n: d for n, d in adapter.deltas.items() if d.site.kind == "module"}
    for step in range(1, steps + 1):
        LOSS(model, tokens(seed=step)).backward()
        learning = [n for n, d in size.items() if any(p.grad is not None for p in d.parameters())]
        assert all(p.grad is not None for n in learning for p in size[n].parameters())
        optimizers.forget(optimizer, adapter.step(step / steps))
        optimizer.step()
        optimizer.zero_grad()
        held = {id(p) for p in optimizer.state}
        yield model, adapter, learning, [n for n, d in size.items() if any(id(p) in held for p in d.parameters())], held


def test_lisa_has_gradients_and_optimizer_state_of_so_many_blocks_only():
    draws = []
    for _, adapter, learning, held, states in run_lisa(2):
        assert len(learning) == 2 and held == learning
        always = [p for d in adapter.deltas.values() if d.site.kind != "module" for p in d.parameters()]
        assert always and all(id(p) in states for p in always)
        draws.append(tuple(learning))
    assert len(draws) == 12 and all(len({*draws[i : i + 3]}) == 1 for i in range(0, 12, 3)) and len({*draws}) > 1


def test_lisa_of_all_blocks_keeps_the_state_of_all():
    for _, _, learning, held, _ in run_lisa(5, interval=1, steps=3):
        assert len(learning) == len(held) == 5


def test_lisa_draws_each_block_as_often():
    model = llama(layers=5)
    adapter = graft.attach(model, graft.LISA(layers=2, interval=1), "blocks")
    counts = torch.zeros(5)
    for step in range(500):
        adapter.step(step / 500)
        counts += torch.tensor([not d.resting for d in adapter.deltas.values()])
    expect = 500 * 2 / 5
    assert ((counts - expect).square() / (expect * (1 - 2 / 5))).sum() < 20


def test_a_loaded_lisa_rests_like_the_saved_one():
    *_, (_, adapter, *_) = run_lisa(2, steps=7)
    again = graft.attach(llama(layers=5, tie_word_embeddings=False), graft.LISA(layers=2, interval=3), seed=5)
    again.load_state_dict(adapter.state_dict())
    assert [d.resting for d in again.deltas.values()] == [d.resting for d in adapter.deltas.values()]


def test_lisa_refuses_more_blocks_than_there_are():
    with pytest.raises(graft.GraftError, match="layers must be at most the 2 blocks of the targets, not 3"):
        graft.attach(llama(), graft.LISA(layers=3), "blocks")


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 9), st.integers(1, 9), st.integers(0, 20)), min_size=1, max_size=7), st.data())
def test_greentrainer_finds_the_best_set_that_fits(tensors, data):
    t_dy, t_dw, gains = zip(*tensors)
    full = sum(t_dy) + sum(t_dw)
    scale = 1000 // full  # so that every cost is a whole number of units
    pad = 1000 - scale * full
    share = data.draw(st.floats(0, 1))
    t_dy, t_dw = [scale * t for t in t_dy], [scale * t for t in t_dw]
    t_dy[0] += pad

    def cost(chosen):
        return sum(t_dy[min(chosen) :]) + sum(t_dw[i] for i in chosen) if chosen else 0

    sets = [c for n in range(len(gains) + 1) for c in combinations(range(len(gains)), n)]
    limit = int(share * 1000)
    most = max(sum(gains[i] for i in c) for c in sets if cost(c) <= limit)
    found = best_backward(t_dy, t_dw, [float(g) for g in gains], share)
    assert found == sorted(found) and cost(found) <= limit
    assert sum(gains[i] for i in found) == most


def test_greentrainer_leaves_alone_what_does_not_fit():
    model = llama(layers=4)
    stats = graft.collect(model, [tokens()], ("weight_grad",), "all-linear", LOSS)
    low, high = (len(graft.attach(model, graft.GreenTrainer(rho=r), name=f"a{i}", stats=stats).deltas)
                 for i, r in enumerate((0.5, 0.99)))  # fmt: skip
    assert 0 < low < high
    with pytest.raises(graft.GraftError, match="rho is too low"):
        graft.attach(model, graft.GreenTrainer(rho=0.3335), name="none", stats=stats)
