"""LLaMA-Adapter: against PEFT, and against a dense product on other attentions."""

import pytest
import torch

import graft
from models import gpt2, llama, move, tokens

transformers = pytest.importorskip("transformers")


def test_starts_as_the_base_and_leaves_the_first_layers_alone():
    model, ids = llama(layers=3), tokens()
    base = model(ids).logits
    adapter = graft.attach(model, "llama_adapter", length=4, layers=2)
    assert torch.equal(model(ids).logits, base)
    assert {path.split(".")[2] for path in adapter.state_dict()} == {"1", "2"}
    move(adapter)
    states = model(ids, output_hidden_states=True).hidden_states
    with adapter.disabled():
        expect = model(ids, output_hidden_states=True).hidden_states
    assert torch.equal(states[1], expect[1]) and not torch.allclose(states[2], expect[2])


@pytest.mark.parametrize("padded", [False, True])
def test_equals_peft_whose_one_gate_is_not_squashed(padded):
    peft = pytest.importorskip("peft")
    model = llama()
    adapter = move(graft.attach(model, "llama_adapter", length=4, layers=2), 0.3)
    config = peft.AdaptionPromptConfig(adapter_len=4, adapter_layers=2, task_type="CAUSAL_LM")
    theirs = peft.get_peft_model(llama(), config).eval()
    with torch.no_grad():
        for i, delta in enumerate(adapter.deltas.values()):
            home = theirs.get_submodule(f"base_model.model.model.layers.{i}.self_attn")
            delta.gate.fill_(0.4 + 0.3 * i)
            home.adaption_prompt.copy_(delta.prompt[None])
            home.adaption_gate.copy_(delta.gate[0].tanh())
    ids = tokens()
    mask = torch.ones_like(ids)
    if padded:
        mask[1, :3] = 0
    ours, ref = (m(input_ids=ids, attention_mask=mask).logits for m in (model, theirs))
    torch.testing.assert_close(ours[mask.bool()], ref[mask.bool()])


def neox():
    torch.manual_seed(0)
    config = transformers.GPTNeoXConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, vocab_size=50
    )
    return transformers.GPTNeoXForCausalLM(config).eval()


def phi3():
    torch.manual_seed(0)
    config = transformers.Phi3Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=48,
        vocab_size=50, pad_token_id=0,
    )  # fmt: skip
    return transformers.Phi3ForCausalLM(config).eval()


def opt():
    torch.manual_seed(0)
    config = transformers.OPTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, ffn_dim=48, vocab_size=50, word_embed_proj_dim=32,
        max_position_embeddings=64,
    )  # fmt: skip
    return transformers.OPTForCausalLM(config).eval()


@pytest.mark.parametrize("make", [llama, gpt2, neox, phi3, opt])
def test_keys_and_values_are_those_the_module_gives_its_attention(make):
    """With one state and its positions taken out, K and V are what the product is called with."""
    model = make()
    adapter = graft.attach(model, "llama_adapter", length=4)
    seen = {}
    for path, delta in adapter.deltas.items():
        plain = delta.site.plain

        def spy(q, k, v, mask, *, path=path, plain=plain, **kwargs):
            seen[path] = k, v
            return plain(q, k, v, mask, **kwargs)

        inner = model.get_submodule(path).product
        inner.inner.call = spy
    states = {}
    for path in adapter.deltas:
        module = model.get_submodule(path)
        module.register_forward_pre_hook(
            lambda m, args, kwargs, path=path: states.update({path: kwargs.get("hidden_states", *args[:1])}),
            with_kwargs=True,
        )
    model(tokens(1, 1))  # at position 0, where rotary positions turn nothing
    assert len(seen) == 2
    for path, delta in adapter.deltas.items():
        for ours, theirs in zip(delta.site.keys_values(states[path][0]), seen[path]):
            torch.testing.assert_close(ours, theirs[0])


@pytest.mark.parametrize("make", [llama, gpt2])
def test_generation_with_and_without_a_cache(make):
    model = make(initializer_range=0.3)
    move(graft.attach(model, "llama_adapter", length=4), 1.0)
    ids = tokens(2, 5)
    options = dict(max_new_tokens=6, pad_token_id=0, eos_token_id=None, do_sample=False)
    text = model.generate(ids, **options)
    assert torch.equal(model.generate(ids, use_cache=False, **options), text)
    with graft.disabled(model):
        assert not torch.equal(model.generate(ids, **options), text)


@pytest.mark.parametrize("make", [llama, gpt2])
def test_is_the_dense_formula(make):
    model = make()
    adapter = move(graft.attach(model, "llama_adapter", length=4), 0.5)
    path, delta = next(iter(adapter.deltas.items()))
    heads, size = model.config.num_attention_heads, delta.site.kv_shape[1]
    torch.manual_seed(0)
    q, k, v = torch.randn(2, heads, 3, size), *torch.randn(2, 2, delta.site.kv_shape[0], 3, size)
    out = model.get_submodule(path).product(q, k, v, None, scaling=0.3)[0]
    K, V = (t.repeat_interleave(heads // len(t), 0) for t in delta.site.keys_values(delta.prompt))
    extra = ((q @ K.mT * 0.3).softmax(-1) @ V) * delta.gate.tanh()[:, None, None]
    plain = delta.site.plain(q, k, v, None, scaling=0.3)[0]
    torch.testing.assert_close(out, plain + extra.transpose(1, 2))
