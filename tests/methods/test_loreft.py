"""LoReFT: which tokens are edited, how, and that the rows stay orthonormal; against dense formulas and `adapters`."""

import pytest
import torch

import graft
from graft.methods.activation.loreft import moved
from models import bert, gpt2, llama, move, tokens

transformers = pytest.importorskip("transformers")


def edited(model, **hyper):
    return model, move(graft.attach(model, "loreft", **(dict(rank=2, first=2, last=1) | hyper)), 0.5)


def dense(subspace, h):
    R, W, b = subspace.basis(), subspace.source.weight, subspace.source.bias
    return h + (h @ W.T + b - h @ R.T) @ R


def spans(length, first, last):
    return list(range(first)), list(range(length - last, length))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("length", [7, 4])
def test_edits_the_first_and_the_last_tokens(tied, length):
    host = torch.nn.Sequential(torch.nn.Linear(6, 6), torch.nn.Tanh())
    model = torch.nn.ModuleDict({"host": host})
    adapter = move(graft.attach(model, "loreft", "host", rank=2, first=2, last=3, tied=tied), 0.5)
    x = torch.randn(2, length, 6)
    with adapter.disabled():
        h = host(x)
    delta = adapter.deltas["host"]
    front, back = spans(length, 2, 3)
    expect = h.clone()
    expect[:, front] = dense(delta.edits[0], h)[:, front]
    expect[:, back] = dense(delta.edits[-1], h)[:, back]
    torch.testing.assert_close(host(x), expect)


def test_rows_are_orthonormal_and_those_given_are_used_as_they_are():
    _, adapter = edited(llama())
    subspace = adapter.deltas["model.layers.0"].edits[0]
    R = subspace.basis()
    torch.testing.assert_close(R @ R.T, torch.eye(2))
    with torch.no_grad():
        subspace.rows.copy_(R)
    torch.testing.assert_close(subspace.basis(), R)
    # After the edit the state is W h + b in the subspace, and unchanged beside it.
    h = torch.randn(5, 32)
    new = moved(h, *subspace.prepare())
    torch.testing.assert_close(new @ R.T, subspace.source(h))
    torch.testing.assert_close(new - new @ R.T @ R, h - h @ R.T @ R)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("make", [llama, gpt2, bert])
def test_padding_is_not_counted(make, side, implementation):
    model, _ = edited(make(attn_implementation=implementation))
    body = model.base_model
    ids = tokens(2, 6)
    at = slice(2, 6) if side == "left" else slice(0, 4)
    mask = torch.ones_like(ids)
    mask[1] = 0
    mask[1, at] = 1
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    alone = body(ids[1:, at]).last_hidden_state[0]
    batch = body(ids, attention_mask=mask, position_ids=positions).last_hidden_state
    torch.testing.assert_close(batch[1, at], alone, rtol=1e-4, atol=1e-5)


def test_a_sliding_window_hides_no_token():
    model, adapter = edited(llama())
    delta = adapter.deltas["model.layers.0"]
    allowed = torch.ones(6, 6, dtype=torch.bool).tril().triu(-1)[None, None].repeat(2, 1, 1, 1)
    allowed[1, ..., :2] = False
    block, x = model.model.layers[0], torch.randn(2, 6, 32)
    rope = model.model.rotary_emb(x, torch.arange(6)[None])
    out = block(x, attention_mask=allowed, position_embeddings=rope)
    with adapter.disabled():
        base = block(x, attention_mask=allowed, position_embeddings=rope)
    out, base = (o[0] if isinstance(o, tuple) else o for o in (out, base))
    for row, start in ((0, 0), (1, 2)):
        at = [start, start + 1, 5]
        torch.testing.assert_close(out[row, at], dense(delta.edits[0], base[row, at]))
        rest = [i for i in range(start, 6) if i not in at]
        assert torch.equal(out[row, rest], base[row, rest])


@pytest.mark.parametrize("make", [llama, gpt2])
def test_generation_edits_the_prompt_alone(make):
    model, adapter = edited(make(initializer_range=0.3))
    ids = tokens(2, 5)
    mask = torch.ones_like(ids)
    mask[1, :2] = 0
    options = dict(max_new_tokens=5, pad_token_id=0, eos_token_id=None, do_sample=False)
    text = model.generate(ids, attention_mask=mask, **options)
    assert torch.equal(model.generate(ids[1:, 2:], **options)[0, 3:], text[1, 5:])
    ids = ids[:1]
    out = model(ids, use_cache=True)
    for step in range(5):
        token = out.logits[:, -1:].argmax(-1)
        assert token.item() == text[0, 5 + step]
        with adapter.disabled():
            out = model(token, past_key_values=out.past_key_values, use_cache=True)


def test_a_static_cache_gives_the_same_text():
    model, _ = edited(llama(initializer_range=0.3))
    ids = tokens(2, 5)
    mask = torch.ones_like(ids)
    mask[1, :2] = 0
    options = dict(max_new_tokens=5, pad_token_id=0, eos_token_id=None, do_sample=False, disable_compile=True)
    expect = model.generate(ids, attention_mask=mask, **options)
    assert torch.equal(model.generate(ids, attention_mask=mask, cache_implementation="static", **options), expect)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("tied", [True, False])
def test_equals_adapters(tied, side):
    adapters = pytest.importorskip("adapters")
    model, ours = edited(llama(), first=2, last=1, tied=tied)
    theirs = llama()
    adapters.init(theirs)
    config = adapters.LoReftConfig(r=2, prefix_positions=2, suffix_positions=1, tied_weights=tied)
    theirs.add_adapter("a", config=config)
    theirs.set_active_adapters("a")
    for i, delta in enumerate(ours.deltas.values()):
        units = theirs.model.layers[i].reft_layer.refts["a"].units
        for unit, subspace in zip(units, delta.edits, strict=True):
            with torch.no_grad():
                unit.projection.weight = subspace.basis()
                unit.learned_source.load_state_dict(subspace.source.state_dict())
    ids = tokens()
    mask = torch.ones_like(ids)
    mask[1, slice(0, 3) if side == "left" else slice(6, 9)] = 0
    expect = theirs.eval()(input_ids=ids, attention_mask=mask).logits
    torch.testing.assert_close(model(input_ids=ids, attention_mask=mask).logits[mask.bool()], expect[mask.bool()],
                               rtol=1e-4, atol=1e-5)  # fmt: skip


def test_a_rank_beyond_the_width_is_refused():
    with pytest.raises(graft.GraftError, match="rank must be at most the 32 features"):
        graft.attach(llama(), "loreft", rank=33)
