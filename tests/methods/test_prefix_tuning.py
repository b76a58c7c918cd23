"""Prefix tuning: attention over [K; k], against a dense product, a cache which holds the prefix, and PEFT."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F

import graft
from models import bert, gpt2, llama, move, picture, tokens

transformers = pytest.importorskip("transformers")
P = 3
V5 = int(transformers.__version__.split(".")[0]) >= 5
IMPLEMENTATIONS = ["eager", "sdpa"]


def prefixed(model, **hyper):
    return model, move(graft.attach(model, "prefix_tuning", length=P, **hyper), 0.3)


def with_cache(model, adapter, ids, mask=None, **kwargs):
    """The base with the prefix in its cache and the tokens at positions 0, 1, ...: needs no attention of our own."""
    cache = transformers.DynamicCache()
    for i, delta in enumerate(adapter.deltas.values()):
        cache.update(*(t.detach().expand(len(ids), -1, -1, -1).clone() for t in delta.prefix()), i)
    positions = torch.arange(ids.shape[1]).expand_as(ids)
    full = None if mask is None else F.pad(mask, (P, 0), value=1)
    with adapter.disabled():
        return model(ids, past_key_values=cache, position_ids=positions, attention_mask=full, **kwargs)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("make", [llama, gpt2])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("hyper", [{}, dict(reparameterize=True, hidden=7)], ids=["kv", "network"])
def test_equals_a_prefix_in_the_cache(make, implementation, padded, hyper):
    model, adapter = prefixed(make(attn_implementation=implementation), **hyper)
    ids, mask = tokens(), None
    if padded:
        mask = torch.ones_like(ids)
        mask[1, 6:] = 0
    out = model(ids, attention_mask=mask).logits
    ref = with_cache(model, adapter, ids, mask).logits
    real = slice(None) if mask is None else mask.bool()
    torch.testing.assert_close(out[real], ref[real])


def rotate(x, cos, sin):
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat([-b, a], -1) * sin


def test_equals_peft_on_rotary_positions_with_its_keys_turned_back():
    """PEFT puts the tokens at length, length + 1, ...: a query turned P further sees K as ours sees K turned P back."""
    peft = pytest.importorskip("peft")
    model, adapter = prefixed(llama())
    base = llama()
    theirs = peft.get_peft_model(base, peft.PrefixTuningConfig(num_virtual_tokens=P, task_type="CAUSAL_LM")).eval()
    cos, sin = model.model.rotary_emb(torch.zeros(1), torch.tensor([[P]]))
    flat = theirs.prompt_encoder["default"].embedding.weight
    kv = [t for d in adapter.deltas.values() for t in (rotate(d.keys, cos[0], sin[0]), d.values)]
    with torch.no_grad():  # [length, layers * 2 * kv heads * size]
        flat.copy_(torch.stack(kv).permute(2, 0, 1, 3).flatten(1))
    ids = tokens()
    mask = torch.ones_like(ids)
    mask[1, -3:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    ours = model(input_ids=ids, attention_mask=mask, labels=labels)
    ref = theirs(input_ids=ids, attention_mask=mask, labels=labels)
    torch.testing.assert_close(ours.loss, ref.loss)
    torch.testing.assert_close(ours.logits[mask.bool()], ref.logits[mask.bool()])


def dense(q, k, v, K, V, bias, scale):
    """softmax(q [K; k]^T scale + bias) [V; v], heads repeated by hand."""
    k, v = torch.cat([K.expand(len(k), -1, -1, -1), k], 2), torch.cat([V.expand(len(v), -1, -1, -1), v], 2)
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    return ((q @ k.mT * scale + F.pad(bias, (K.shape[1], 0))).softmax(-1) @ v).transpose(1, 2)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("kind", ["none", "bool", "float"])
@pytest.mark.parametrize("queries", [1, 4])
def test_the_product_is_the_dense_one_for_every_mask(implementation, kind, queries):
    model, adapter = prefixed(llama(attn_implementation=implementation))
    if implementation == "eager" and kind == "bool":
        pytest.skip("eager attention adds its mask")
    path, delta = next(iter(adapter.deltas.items()))
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 4, queries, 8), torch.randn(2, 2, 4, 8), torch.randn(2, 2, 4, 8)
    allowed = torch.ones(queries, 4, dtype=torch.bool).tril(4 - queries)[None, None].repeat(2, 1, 1, 1)
    if kind != "none":
        allowed[1, ..., :1] = False
    bias = torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)
    mask = dict(none=None, bool=allowed, float=bias)[kind]
    if implementation == "eager" and kind == "none":
        bias = torch.zeros_like(bias)  # without a mask, eager attention is not causal
    out, _ = model.get_submodule(path).product(q, k, v, mask, scaling=0.3, dropout=0.0)
    torch.testing.assert_close(out, dense(q, k, v, *delta.prefix(), bias, 0.3))


def test_an_encoder_sees_the_prefix_from_every_token():
    if not V5:
        with pytest.raises(graft.GraftError, match="by name"):
            graft.attach(bert(), "prefix_tuning", length=P)
        return
    model, adapter = prefixed(bert())
    ids = tokens()
    mask = torch.ones_like(ids)
    mask[0, 5:] = 0
    alone = model(ids[:1, :5]).logits
    torch.testing.assert_close(model(ids, attention_mask=mask).logits[:1], alone)
    attention = model.bert.encoder.layer[0].attention.self
    x = torch.randn(2, 4, 32)
    q, k, v = (f(x).view(2, 4, 4, 8).transpose(1, 2) for f in (attention.query, attention.key, attention.value))
    delta = next(iter(adapter.deltas.values()))
    expect = dense(q, k, v, *delta.prefix(), torch.zeros(1, 1, 4, 4), 8**-0.5).flatten(2)
    torch.testing.assert_close(attention(x)[0], expect)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_position_biases_do_not_fall_on_the_prefix(implementation):
    torch.manual_seed(0)
    config = transformers.T5Config(
        d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, vocab_size=50, decoder_start_token_id=0
    )
    if V5:
        config._attn_implementation = implementation
    model = transformers.T5ForConditionalGeneration(config).eval()
    if not V5:
        with pytest.raises(graft.GraftError, match="by name"):
            graft.attach(model, "prefix_tuning")
        return
    model, adapter = prefixed(model)
    assert len(adapter.deltas) == 4  # self-attention of encoder and decoder; presets leave cross attention out
    ids = tokens(2, 5)
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad.abs().sum() > 0 for p in adapter.parameters())
    text = model.generate(ids, max_new_tokens=6, do_sample=False)
    assert torch.equal(model.generate(ids, max_new_tokens=6, do_sample=False, use_cache=False), text)
    for stack in ("encoder", "decoder"):
        path = f"{stack}.block.0.layer.0.SelfAttention"
        attention, delta = model.get_submodule(path), adapter.deltas[path]
        x = torch.randn(2, 4, 32)
        q, k, v = (f(x).view(2, 4, 4, 8).transpose(1, 2) for f in (attention.q, attention.k, attention.v))
        bias = attention.compute_bias(4, 4)
        mask = None
        if stack == "decoder":
            mask = torch.full((4, 4), torch.finfo(torch.float32).min).triu(1)[None, None]
            bias = bias + mask
        expect = attention.o(dense(q, k, v, *delta.prefix(), bias, 1.0).flatten(2))
        torch.testing.assert_close(attention(x, mask=mask)[0], expect)
    with pytest.raises(graft.GraftError, match="cross attention"):
        graft.attach(model, "prefix_tuning", r".*EncDecAttention", name="cross")


@pytest.mark.parametrize("make", [llama, gpt2])
@pytest.mark.parametrize("beams", [1, 3])
def test_generation(make, beams):
    model, _ = prefixed(make(initializer_range=0.3))
    ids = tokens(2, 6)
    mask = torch.ones_like(ids)
    mask[1, :2] = 0
    options = dict(max_new_tokens=6, pad_token_id=0, eos_token_id=None, num_beams=beams, do_sample=False)
    text = model.generate(ids, attention_mask=mask, **options)
    assert torch.equal(model.generate(ids, attention_mask=mask, use_cache=False, **options), text)
    assert torch.equal(model.generate(ids[1:, 2:], **options)[0, 4:], text[1, 6:])
    torch.manual_seed(0)
    sampled = model.generate(ids, attention_mask=mask, **(options | dict(num_beams=1, do_sample=True)))
    torch.manual_seed(0)
    again = model.generate(ids, attention_mask=mask, use_cache=False, **(options | dict(num_beams=1, do_sample=True)))
    assert torch.equal(sampled, again)


def test_a_static_cache_gives_the_same_text():
    model, _ = prefixed(llama(initializer_range=0.3))
    ids = tokens(2, 5)
    options = dict(max_new_tokens=6, pad_token_id=0, eos_token_id=None, do_sample=False, disable_compile=True)
    expect = model.generate(ids, **options)
    assert torch.equal(model.generate(ids, cache_implementation="static", **options), expect)


def test_network_is_the_originals_one_network():
    """Two layers' [K, V] are what one network gives whose last matrix has the rows of both."""
    _, adapter = prefixed(llama(), reparameterize=True, hidden=7)
    shared, deltas = adapter.shared, list(adapter.deltas.values())
    up = torch.cat([d.up.weight for d in deltas]), torch.cat([d.up.bias for d in deltas])
    all_layers = F.linear(torch.tanh(shared.embedding @ shared.down.weight.T + shared.down.bias), *up)
    kv = all_layers.view(P, 2, 2, 2, 8).permute(1, 2, 3, 0, 4)  # [layer, K or V, heads, length, size]
    for layer, delta in enumerate(deltas):
        for ours, theirs in zip(delta.prefix(), kv[layer]):
            torch.testing.assert_close(ours, theirs)


def test_weights_of_eager_attention_include_the_prefix_and_sum_to_one():
    model, _ = prefixed(llama(attn_implementation="eager"))
    attentions = model(tokens(2, 5), output_attentions=True).attentions
    assert all(a.shape == (2, 4, 5, 5 + P) for a in attentions)
    torch.testing.assert_close(attentions[0].sum(-1), torch.ones(2, 4, 5))


def test_dropout_reaches_the_prefix_in_training():
    model, _ = prefixed(llama(attention_dropout=0.9))
    ids = tokens()
    assert torch.equal(model(ids).logits, model(ids).logits)
    model.train()
    assert not torch.equal(model(ids).logits, model(ids).logits)


def test_two_prefixes_stack_and_leave_in_any_order():
    model = llama()
    ids, before, config = tokens(), picture(model), model.config
    base = model(ids).logits
    one = move(graft.attach(model, "prefix_tuning", length=P, name="one"), 0.3)
    two = move(graft.attach(model, "prefix_tuning", length=2, name="two"), 0.3, seed=5)
    both = model(ids).logits
    joined = llama()
    long = graft.attach(joined, "prefix_tuning", length=P + 2)
    with torch.no_grad():
        for path, delta in long.deltas.items():
            delta.keys.copy_(torch.cat([one.deltas[path].keys, two.deltas[path].keys], 1))
            delta.values.copy_(torch.cat([one.deltas[path].values, two.deltas[path].values], 1))
    torch.testing.assert_close(both, joined(ids).logits)
    one.detach()
    alone = model(ids).logits
    assert not torch.allclose(alone, both)
    with two.disabled():
        assert torch.equal(model(ids).logits, base)
    assert torch.equal(model(ids).logits, alone)
    two.detach()
    assert all(m.config is config for m in model.modules() if hasattr(m, "config"))
    assert config._attn_implementation == "sdpa" and picture(model) == before


def test_a_prefix_at_a_module_that_carries_another_delta_already():
    ids = tokens()
    outputs = []
    for first, second in (("prefix_tuning", "houlsby"), ("houlsby", "prefix_tuning")):
        model = llama()
        for name in (first, second):
            hyper = dict(length=P) if name == "prefix_tuning" else dict(size=4)
            move(graft.attach(model, name, r"self_attn", name=name, **hyper), 0.3)
        outputs.append(model(ids).logits)
        graft.adapters(model)["houlsby"].detach()
        torch.testing.assert_close(
            model(ids).logits, with_cache(model, graft.adapters(model)["prefix_tuning"], ids).logits
        )
        graft.adapters(model)["prefix_tuning"].detach()
        assert torch.equal(model(ids).logits, llama()(ids).logits)
    assert torch.equal(*outputs)


def test_models_that_share_a_configuration_do_not_share_prefixes():
    first = llama()
    second = transformers.LlamaForCausalLM(first.config).eval()
    ids = tokens()
    base = second(ids).logits
    _, adapter = prefixed(first)
    changed = first(ids).logits
    assert torch.equal(second(ids).logits, base)
    other = move(graft.attach(second, "prefix_tuning", length=2), 0.3, seed=4)
    assert torch.equal(first(ids).logits, changed)
    adapter.detach()
    assert not torch.allclose(second(ids).logits, base)
    other.detach()
    assert torch.equal(second(ids).logits, base)


def test_the_implementation_may_change_while_the_prefix_is_on():
    model, adapter = prefixed(llama())
    ids = tokens()
    before = model(ids).logits
    model.set_attn_implementation("eager")
    torch.testing.assert_close(model(ids).logits, before)
    model.config._attn_implementation = "flex_attention"
    with pytest.raises(graft.GraftError, match="sdpa"):
        model.get_submodule(next(iter(adapter.deltas))).product(*[torch.zeros(1, 4, 2, 8)] * 3, None)


def test_copies_pickles_and_checkpointing():
    model, adapter = prefixed(llama())
    ids = tokens()
    y = model(ids).logits
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(ids).logits, y)
        assert twin.model.layers[0].self_attn.config is not twin.config
        graft.adapters(twin)["default"].detach()
        assert twin.model.layers[0].self_attn.config is twin.config
        assert not torch.allclose(twin(ids).logits, y)
    loss = model(ids, labels=ids).loss
    plain = torch.autograd.grad(loss, adapter.parameters())
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    for ours, theirs in zip(torch.autograd.grad(model(ids, labels=ids).loss, adapter.parameters()), plain):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("method", ["prefix_tuning", "llama_adapter"])
def test_compiles_to_one_graph(method):
    import torch._dynamo.testing

    model = llama(use_cache=False)
    move(graft.attach(model, method, length=P), 0.3)
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    ids = tokens()
    for _ in range(2):
        torch.testing.assert_close(compiled(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-5)
    assert counter.frame_count == 1


def test_other_modules_are_refused():
    with pytest.raises(graft.GraftError):
        graft.attach(llama(), "prefix_tuning", r"layers\.0\.mlp")
