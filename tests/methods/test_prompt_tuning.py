"""Prompt tuning: the tokens are seen as the base would see them after [P; tokens], in every kind of model."""

import pytest
import torch
import torch.nn.functional as F

import graft
from models import bert, gpt2, llama, move, tokens

transformers = pytest.importorskip("transformers")
P = 3


def t5(seed=0):
    torch.manual_seed(seed)
    config = transformers.T5Config(
        d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, vocab_size=50, decoder_start_token_id=0
    )
    return transformers.T5ForConditionalGeneration(config).eval()


def bart(seed=0):
    torch.manual_seed(seed)
    config = transformers.BartConfig(
        d_model=32, encoder_layers=2, decoder_layers=2, encoder_ffn_dim=48, decoder_ffn_dim=48, vocab_size=50,
        encoder_attention_heads=4, decoder_attention_heads=4, max_position_embeddings=64, forced_eos_token_id=None,
    )  # fmt: skip
    return transformers.BartForConditionalGeneration(config).eval()


DECODERS = [llama, gpt2]
SEQ2SEQ = [t5, bart]


def prompted(make, **hyper):
    model = make()
    adapter = move(graft.attach(model, "prompt_tuning", length=P, **hyper), 1.0)
    return model, adapter, next(iter(adapter.deltas.values()))


def joined(model, prompt, ids):
    """[P; embed(ids)], made without the delta."""
    x = model.get_input_embeddings()(ids)
    return torch.cat([prompt.detach().expand(len(ids), -1, -1), x], 1)


@pytest.mark.parametrize("make", DECODERS)
def test_decoder_is_the_base_after_the_prompt(make):
    model, adapter, delta = prompted(make)
    ids = tokens()
    out = model(ids, output_hidden_states=True)
    from_embeddings = model(inputs_embeds=model.get_input_embeddings()(ids)).logits
    with adapter.disabled():
        ref = model(inputs_embeds=joined(model, delta.embedding, ids), output_hidden_states=True)
    torch.testing.assert_close(out.logits, ref.logits[:, P:])
    torch.testing.assert_close(from_embeddings, out.logits)
    for ours, theirs in zip(out.hidden_states, ref.hidden_states, strict=True):
        torch.testing.assert_close(ours, theirs[:, P:])
    assert torch.equal(model(ids, return_dict=False)[0], out.logits)
    torch.testing.assert_close(model(ids, logits_to_keep=2).logits, out.logits[:, -2:])


@pytest.mark.parametrize("make", DECODERS)
def test_loss_is_that_of_the_returned_logits(make):
    model, *_ = prompted(make)
    ids = tokens()
    out = model(ids, labels=ids)
    torch.testing.assert_close(out.loss, F.cross_entropy(out.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()))


@pytest.mark.parametrize("make", DECODERS)
def test_equals_peft(make):
    peft = pytest.importorskip("peft")
    model, _, delta = prompted(make)
    theirs = peft.get_peft_model(make(), peft.PromptTuningConfig(num_virtual_tokens=P, task_type="CAUSAL_LM")).eval()
    with torch.no_grad():
        theirs.prompt_encoder["default"].embedding.weight.copy_(delta.embedding)
    ids = tokens()
    mask = torch.ones_like(ids)
    mask[1, -3:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, 0] = -100  # the token which PEFT lets the prompt predict
    ours, ref = (m(input_ids=ids, attention_mask=mask, labels=labels) for m in (model, theirs))
    torch.testing.assert_close(ours.loss, ref.loss)
    torch.testing.assert_close(ours.logits, ref.logits[:, P:])
    ours.loss.backward(), ref.loss.backward()
    torch.testing.assert_close(delta.embedding.grad, theirs.prompt_encoder["default"].embedding.weight.grad)
    # With that token, PEFT's loss is the mean over one more token a row.
    all_labels = model(ids, labels=ids).loss, theirs(input_ids=ids, labels=ids)
    first = F.cross_entropy(all_labels[1].logits[:, P - 1], ids[:, 0])
    count = ids.shape[1]
    torch.testing.assert_close(all_labels[1].loss, (all_labels[0] * (count - 1) + first) / count)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("make", DECODERS)
def test_padding_does_not_matter(make, side):
    model, *_ = prompted(make)
    ids = tokens(2, 6)
    alone = model(ids[1:, :4]).logits[0]
    mask = torch.ones_like(ids)
    at = slice(2, 6) if side == "left" else slice(0, 4)
    batch = ids.clone()
    batch[1, at] = ids[1, :4]
    mask[1] = 0
    mask[1, at] = 1
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    torch.testing.assert_close(model(batch, attention_mask=mask, position_ids=positions).logits[1, at], alone)


MODES = dict(greedy={}, sampling=dict(do_sample=True, top_k=5), beams=dict(num_beams=3))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("make", DECODERS)
def test_generation_is_the_bases_after_the_prompt(make, mode):
    model, adapter, delta = prompted(lambda: make(initializer_range=0.3))
    ids = tokens(2, 5)
    options = dict(max_new_tokens=8, pad_token_id=0, eos_token_id=49, **MODES[mode])

    def generate(*args, **kwargs):
        torch.manual_seed(0)
        return model.generate(*args, **options, **kwargs)

    ours = generate(ids)
    assert torch.equal(ours[:, :5], ids) and ours.shape[1] > 5
    assert torch.equal(generate(ids, use_cache=False), ours)
    assert torch.equal(generate(inputs_embeds=model.get_input_embeddings()(ids)), ours[:, 5:])
    with adapter.disabled():
        assert torch.equal(generate(inputs_embeds=joined(model, delta.embedding, ids)), ours[:, 5:])
        assert not torch.equal(generate(ids), ours)


@pytest.mark.parametrize("beams", [1, 2])
@pytest.mark.parametrize("make", DECODERS)
def test_generation_with_padding_on_the_left(make, beams):
    model, *_ = prompted(make)
    ids = tokens(2, 6)
    mask = torch.ones_like(ids)
    mask[1, :2] = 0
    options = dict(max_new_tokens=6, pad_token_id=0, eos_token_id=None, num_beams=beams)
    ours = model.generate(ids, attention_mask=mask, **options)
    alone = model.generate(ids[1:, 2:], **options)
    assert torch.equal(ours[1, 6:], alone[0, 4:])
    assert torch.equal(model.generate(ids, attention_mask=mask, use_cache=False, **options), ours)


def test_manual_decoding_with_a_cache():
    model, *_ = prompted(llama)
    ids = tokens(2, 7)
    whole = model(ids).logits
    first = model(ids[:, :4], use_cache=True)
    then = model(ids[:, 4:], past_key_values=first.past_key_values, use_cache=True)
    torch.testing.assert_close(torch.cat([first.logits, then.logits], 1), whole)


def test_the_head_of_an_encoder_reads_the_real_first_token():
    model, adapter, delta = prompted(bert)
    ids = tokens()
    mask = torch.ones_like(ids)
    mask[0, 5:] = 0
    types = torch.ones_like(ids)
    ours = model(ids, attention_mask=mask, token_type_ids=types).logits
    with adapter.disabled():
        states = model.bert(
            inputs_embeds=joined(model, delta.embedding, ids),
            attention_mask=F.pad(mask, (P, 0), value=1),
            token_type_ids=F.pad(types, (P, 0)),
        ).last_hidden_state
        expect = model.classifier(model.bert.pooler(states[:, P:]))
    torch.testing.assert_close(ours, expect)


def test_roberta_reads_the_first_token_and_keeps_its_positions():
    torch.manual_seed(0)
    config = transformers.RobertaConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, vocab_size=50, pad_token_id=1
    )
    model, adapter, delta = prompted(lambda: transformers.RobertaForSequenceClassification(config).eval())
    ids = tokens().clamp(min=2)
    alone = model(ids[:1, :5]).logits
    mask = torch.ones_like(ids)
    mask[0, 5:] = 0
    torch.testing.assert_close(model(ids.masked_fill(mask == 0, 1), attention_mask=mask).logits[:1], alone)
    with adapter.disabled():
        states = model.roberta(inputs_embeds=joined(model, delta.embedding, ids)).last_hidden_state
        expect = model.classifier(states[:, P:])
    torch.testing.assert_close(model(ids).logits, expect)


def test_a_classifier_on_a_decoder_reads_the_last_real_token():
    def make():
        torch.manual_seed(0)
        return transformers.LlamaForSequenceClassification(llama(pad_token_id=0, num_labels=3).config).eval()

    model, *_ = prompted(make)
    ids = tokens().clamp(min=1)
    alone = model(ids[:1, :5]).logits
    ids[0, 5:] = 0
    torch.testing.assert_close(model(ids, attention_mask=(ids != 0).long()).logits[:1], alone)


@pytest.mark.parametrize("make", SEQ2SEQ)
def test_the_encoder_of_an_encoder_decoder_reads_the_prompt_and_the_decoder_sees_it(make):
    model, adapter, delta = prompted(make)
    ids, labels = tokens(2, 6), tokens(2, 4, seed=1)
    mask = torch.ones_like(ids)
    mask[0, 4:] = 0
    out = model(input_ids=ids, attention_mask=mask, labels=labels)
    options = dict(max_new_tokens=6, num_beams=2, do_sample=False)
    generated = model.generate(ids, attention_mask=mask, **options)
    assert torch.equal(model.generate(ids, attention_mask=mask, use_cache=False, **options), generated)
    out.loss.backward()
    assert delta.embedding.grad.abs().sum() > 0
    longer = dict(inputs_embeds=joined(model, delta.embedding, ids), attention_mask=F.pad(mask, (P, 0), value=1))
    with adapter.disabled():
        ref = model(**longer, labels=labels)
        assert torch.equal(model.generate(**longer, **options), generated)
    torch.testing.assert_close(out.logits, ref.logits)
    torch.testing.assert_close(out.loss, ref.loss)


def test_attention_weights_are_those_of_the_tokens():
    model, *_ = prompted(lambda: llama(attn_implementation="eager"))
    out = model(tokens(2, 5), output_attentions=True)
    assert all(a.shape == (2, 4, 5, 5 + P) for a in out.attentions) and len(out.attentions) == 2


def test_two_prompts_are_one_longer_prompt():
    model, one, inside = prompted(llama)
    two = move(graft.attach(model, "prompt_tuning", name="two", length=2), 1.0, seed=2)
    outside = next(iter(two.deltas.values()))
    ids = tokens()
    both, text = model(ids).logits, model.generate(ids, max_new_tokens=5, pad_token_id=0)
    with graft.disabled(model):
        x = joined(model, torch.cat([inside.embedding, outside.embedding]), ids)
        torch.testing.assert_close(both, model(inputs_embeds=x).logits[:, P + 2 :])
        assert torch.equal(model.generate(inputs_embeds=x, max_new_tokens=5, pad_token_id=0), text[:, 9:])
    one.detach()
    two.detach()


def test_starts_from_embeddings_of_tokens():
    model = llama()
    table = model.get_input_embeddings().weight
    given = graft.attach(model, "prompt_tuning", length=5, tokens=(7, 8), name="a").deltas["model"].embedding
    assert torch.equal(given, table[[7, 8, 7, 8, 7]])
    drawn = graft.attach(model, "prompt_tuning", length=5, name="b").deltas["model"].embedding
    assert all((table == row).all(1).any() for row in drawn)
    uniform = graft.attach(model, "prompt_tuning", length=50, init="uniform", name="c").deltas["model"].embedding
    assert uniform.min() < -0.4 and uniform.max() > 0.4 and uniform.abs().max() <= 0.5


def test_a_second_turn_with_the_cache_of_the_first():
    model, *_ = prompted(lambda: llama(initializer_range=0.3))
    turns = tokens(2, 5), tokens(2, 4, seed=1)
    ids, options = torch.cat(turns, 1), dict(max_new_tokens=4, pad_token_id=0)
    expect = model.generate(ids, **options)[:, ids.shape[1] :]
    mask = torch.ones_like(ids)
    cache = lambda: model(turns[0], use_cache=True).past_key_values
    first = model(turns[1], past_key_values=cache(), attention_mask=mask).logits[:, -1]
    assert torch.equal(first.argmax(-1), expect[:, 0])
    with pytest.raises(graft.GraftError, match="new tokens alone"):  # its length includes the prompt, so they are cut
        model.generate(ids, past_key_values=cache(), **options)


def test_assisted_decoding_is_right_or_refused():
    model, *_ = prompted(lambda: llama(initializer_range=0.3))
    ids = tokens(1, 5)
    options = dict(max_new_tokens=12, pad_token_id=0, eos_token_id=49)
    assistant = llama(initializer_range=0.3)
    if transformers.__version__.startswith("4."):  # cuts the cache to the number of tokens it knows of
        with pytest.raises(graft.GraftError, match="assisted"):
            model.generate(ids, assistant_model=assistant, **options)
    else:
        expect = model.generate(ids, **options)
        assert torch.equal(model.generate(ids, assistant_model=assistant, **options), expect)


def test_what_cannot_carry_a_prompt_is_refused_by_name():
    model, *_ = prompted(llama)
    ids = tokens(2, 5)
    options = dict(max_new_tokens=4, pad_token_id=0)
    with pytest.raises(graft.GraftError, match="cache"):
        model.generate(ids, cache_implementation="static", **options)
    with pytest.raises(graft.GraftError, match="get_input_embeddings"):
        graft.attach(torch.nn.Sequential(torch.nn.Linear(2, 2)), "prompt_tuning")
    config = transformers.MambaConfig(hidden_size=8, num_hidden_layers=1, vocab_size=20, state_size=4)
    with pytest.raises(graft.GraftError, match="cache_params"):
        graft.attach(transformers.MambaForCausalLM(config), "prompt_tuning")
    config = transformers.AlbertConfig(
        hidden_size=8, embedding_size=8, num_attention_heads=2, num_hidden_layers=1, intermediate_size=8, vocab_size=20
    )
    with pytest.raises(graft.GraftError, match="pooler"):
        graft.attach(transformers.AlbertForSequenceClassification(config), "prompt_tuning")


def gemma():
    torch.manual_seed(0)
    config = transformers.GemmaConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        intermediate_size=48, vocab_size=50,
    )  # fmt: skip
    return transformers.GemmaForCausalLM(config).eval()


def test_embeddings_are_scaled_as_the_model_scales_them():
    model, adapter, delta = prompted(gemma, tokens=(5, 6, 7))
    ids = tokens(2, 4)
    with torch.no_grad():
        delta.embedding.copy_(model.get_input_embeddings()(torch.tensor([5, 6, 7])))
    ours = model(ids).logits
    with adapter.disabled():
        plain = model(torch.cat([torch.tensor([[5, 6, 7]]).expand(2, -1), ids], 1)).logits
    torch.testing.assert_close(ours, plain[:, 3:])


def backbone():
    return llama().model


@pytest.mark.parametrize("make", [llama, bert, t5, bart, backbone])
def test_saved_and_loaded(make, tmp_path):
    model, adapter, _ = prompted(make)
    adapter.save(tmp_path / "prompt")
    again = make()
    loaded = graft.load(again, tmp_path / "prompt")
    ids = tokens()
    inputs = dict(input_ids=ids, decoder_input_ids=ids) if make in SEQ2SEQ else dict(input_ids=ids)
    assert torch.equal(again(**inputs)[0], model(**inputs)[0])
    loaded.detach()
    assert torch.equal(again(**inputs)[0], make()(**inputs)[0])


@pytest.mark.parametrize(
    "make", [llama, lambda: gpt2(attn_pdrop=0, resid_pdrop=0, embd_pdrop=0)], ids=["llama", "gpt2"]
)
def test_gradient_checkpointing_of_the_model(make):
    model, adapter, _ = prompted(make)
    ids = tokens()
    plain = torch.autograd.grad(model(ids, labels=ids).loss, adapter.parameters())[0]
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    again = torch.autograd.grad(model(ids, labels=ids).loss, adapter.parameters())[0]
    torch.testing.assert_close(again, plain)
