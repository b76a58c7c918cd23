"""Merging: exact, reversible to the bit, honest about what rounding loses."""

import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import graft
from graft.core.merge import rounding_loss
from models import bert, llama, move, picture, tokens

IDS = tokens()


def test_undo_brings_the_bits_back_in_bfloat16():
    model = llama(torch.bfloat16)
    move(graft.attach(model, "lora", rank=4))
    before, y = picture(model), model(IDS).logits
    done = graft.merge(model)
    merged = model(IDS).logits
    assert not torch.equal(merged, y) and (merged - y).abs().max() < 0.1
    done.undo()
    assert picture(model) == before
    assert torch.equal(model(IDS).logits, y)


def test_peft_unmerge_does_not_bring_the_bits_back():
    """Why a merge keeps the base here: adding and subtracting in bfloat16 is not the identity."""
    peft = pytest.importorskip("peft")
    base = llama(torch.bfloat16)
    model = peft.get_peft_model(llama(torch.bfloat16), peft.LoraConfig(r=4, target_modules=["q_proj"]))
    for n, p in model.named_parameters():
        if "lora_B" in n:
            torch.nn.init.normal_(p, std=0.1)
    model.merge_adapter()
    model.unmerge_adapter()
    w = model.base_model.model.model.layers[0].self_attn.q_proj.base_layer.weight
    assert not torch.equal(w, base.model.layers[0].self_attn.q_proj.weight)


def test_a_small_change_in_bfloat16_is_warned_about():
    model = llama(torch.bfloat16)
    adapter = graft.attach(model, "lora", "q_proj", rank=4)
    move(adapter, 2e-5)
    with pytest.warns(UserWarning, match=r"bfloat16 loses \d+% of the change at model\.layers"):
        done = graft.merge(model)
    assert all(v > 0.5 for v in done.lost.values())
    wide = llama(torch.float32)
    wide_adapter = graft.attach(wide, "lora", "q_proj", rank=4)
    wide_adapter.load_state_dict(adapter.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        graft.merge(wide)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 1000), st.floats(1e-4, 1.0))
def test_rounding_loss_is_the_share_of_the_change_that_is_lost(seed, size):
    g = torch.Generator().manual_seed(seed)
    w = torch.randn(16, 16, generator=g).bfloat16()
    exact = w.double() + size * torch.randn(16, 16, generator=g, dtype=torch.float64)
    stored = exact.to(torch.bfloat16).double()
    expect = (stored - exact).norm() / (exact - w.double()).norm()
    assert rounding_loss(exact, w, torch.bfloat16) == pytest.approx(expect.item())
    assert rounding_loss(w.double(), w, torch.bfloat16) == 0


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_infinity_are_refused_before_anything_is_written(bad):
    model = llama()
    adapter = move(graft.attach(model, "lora"))
    with torch.no_grad():
        list(adapter.deltas.values())[-1].B[0, 0] = bad
    before = picture(model)
    for act in (graft.merge, graft.merged_state_dict):
        with pytest.raises(graft.GraftError, match="NaN or infinity"):
            act(model)
    assert picture(model) == before


def test_only_what_runs_is_merged():
    model = llama(torch.float64)
    a = move(graft.attach(model, "lora", name="a"))
    move(graft.attach(model, "lora", name="b"), seed=2)
    a.disable()
    expect = model(IDS).logits
    plain = llama(torch.float64)
    plain.load_state_dict(graft.merged_state_dict(model))
    torch.testing.assert_close(plain(IDS).logits, expect)


def test_heads_are_merged_with_their_adapter():
    model = bert()
    move(graft.attach(model, "lora", "query", heads="classifier"))
    plain = bert(seed=0)
    plain.load_state_dict(graft.merged_state_dict(model))
    torch.testing.assert_close(plain(IDS).logits, model(IDS).logits)


def test_merged_state_has_exactly_the_keys_of_the_base():
    model = bert()
    keys = set(model.state_dict())
    move(graft.attach(model, "lora", heads="classifier"))
    assert set(graft.merged_state_dict(model)) == keys


def test_a_merge_in_place_is_not_applied_twice_nor_taken_for_the_base(tmp_path):
    model = llama()
    a = move(graft.attach(model, "lora", name="a"))
    a.save(tmp_path / "a")
    y = model(IDS).logits
    done = graft.merge(model)
    merged = model(IDS).logits
    acts = {
        "enable": a.enable,
        "disable": a.disable,
        "activate": lambda: graft.activate(model, "a"),
        "disabled": lambda: graft.disabled(model).__enter__(),
        "attach": lambda: graft.attach(model, "lora", name="b"),
        "load": lambda: graft.load(model, tmp_path / "a", name="b"),
        "save": lambda: a.save(tmp_path / "b"),
        "merge": lambda: graft.merge(model),
        "detach": a.detach,
    }
    for act in acts.values():
        with pytest.raises(graft.GraftError, match="adapter 'a' is merged into the base: undo the merge first"):
            act()
        assert torch.equal(model(IDS).logits, merged)
    assert list(graft.adapters(model)) == ["a"] and not (tmp_path / "b").exists()
    done.undo()
    done.undo()
    assert torch.equal(model(IDS).logits, y)
    a.save(tmp_path / "b")
    a.detach()
    graft.load(model, tmp_path / "b")
    assert torch.equal(model(IDS).logits, y)


def test_a_merge_that_is_kept_leaves_a_plain_model():
    model, plain = llama(torch.float64), llama(torch.float64)
    for m in (model, plain):
        m.model.norm.requires_grad_(False)
    move(graft.attach(model, "lora", name="a"))
    move(graft.attach(model, "lora", "q_proj", name="b"), seed=2).disable()
    y, state = model(IDS).logits, graft.merged_state_dict(model)
    done = graft.merge(model)
    done.keep()
    assert not graft.adapters(model)
    torch.testing.assert_close(model(IDS).logits, y)
    plain.load_state_dict(state)
    shape = lambda m: [(p, t, a, c, f, [(n, g, b) for n, _, g, b in own]) for p, t, a, c, f, own in picture(m)]
    assert shape(model) == shape(plain)
    with pytest.raises(graft.GraftError, match="undone or kept before"):
        done.keep()
    done.undo()
    torch.testing.assert_close(model(IDS).logits, y)


def test_a_kept_merge_of_a_tied_head_survives_saving(tmp_path):
    model = llama(torch.float64, tie_word_embeddings=True)
    move(graft.attach(model, "lora", "lm_head"))
    y = model(IDS).logits
    graft.merge(model).keep()
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path, dtype=torch.float64)
    torch.testing.assert_close(again(IDS).logits, y)
