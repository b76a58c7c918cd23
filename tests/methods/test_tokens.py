"""Trainable tokens: only the chosen rows change, tied heads follow, rows alone are saved; PEFT's TRAINABLE_TOKENS."""

import copy

import pytest
import torch
from torch import nn

import graft
import models

transformers = pytest.importorskip("transformers")
BOTH = ["embed_tokens", "lm_head"]
IDS = (2, 11, 5)


def llama(tied=True):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=8, num_hidden_layers=1, intermediate_size=12, num_attention_heads=2, vocab_size=12,
        tie_word_embeddings=tied,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).double().eval()


def batch():
    torch.manual_seed(1)
    return torch.randint(0, 12, (2, 9))


def moved(adapter):
    torch.manual_seed(2)
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(torch.randn_like(p))
    return adapter


def train_rows(model, parameters, rows_of=(), steps=3):
    """Adam on the parameters; of the whole matrices in `rows_of` only the chosen rows move."""
    optimizer = torch.optim.Adam(parameters, 0.1)
    others = [i for i in range(12) if i not in IDS]
    for _ in range(steps):
        optimizer.zero_grad()
        model(input_ids=batch(), labels=batch()).loss.backward()
        for w in rows_of:
            w.grad[others] = 0
        optimizer.step()


@pytest.mark.parametrize("tied", [True, False])
def test_training_is_training_the_rows_in_place(tied):
    model, full = llama(tied), llama(tied)
    adapter = graft.attach(model, graft.Tokens(tokens=IDS), BOTH)
    assert len(adapter.parameters()) == (1 if tied else 2)
    full.requires_grad_(False)
    tables = list({id(w): w for w in (full.model.embed_tokens.weight, full.lm_head.weight)}.values())
    for w in tables:
        w.requires_grad_(True)
    train_rows(model, adapter.parameters())
    train_rows(full, tables, rows_of=tables)
    torch.testing.assert_close(model(batch()).logits, full(batch()).logits)
    merged = graft.merged_state_dict(model)
    for name, value in full.state_dict().items():
        torch.testing.assert_close(merged[name], value)


def test_saves_rows_only_and_loads_them(tmp_path):
    model = llama()
    adapter = moved(graft.attach(model, graft.Tokens(tokens=IDS)))
    state = adapter.state_dict()
    assert {tuple(v.shape) for v in state.values()} == {(3, 8)}
    assert len({v.data_ptr() for v in state.values()}) == 1  # one parameter for the embedding and the tied head
    adapter.save(tmp_path / "adapter")
    again = llama()
    loaded = graft.load(again, tmp_path / "adapter")
    assert len(loaded.parameters()) == 1 and torch.equal(again(batch()).logits, model(batch()).logits)


@pytest.mark.parametrize("tied", [True, False])
def test_goes_to_the_embedding_and_a_tied_head_by_default(tied):
    expect = {"model.embed_tokens", "lm_head"} if tied else {"model.embed_tokens"}
    assert graft.attach(llama(tied), graft.Tokens(tokens=IDS)).deltas.keys() == expect


def test_untied_embedding_alone_leaves_the_head():
    model = llama(tied=False)
    head = model.lm_head.weight.clone()
    moved(graft.attach(model, graft.Tokens(tokens=IDS), "embed_tokens"))
    assert torch.equal(graft.merged_state_dict(model)["lm_head.weight"], head)


def test_rows_of_new_tokens_belong_to_the_adapter_not_to_the_base():
    model = llama()
    model.resize_token_embeddings(15, mean_resizing=False)
    adapter = moved(graft.attach(model, graft.Tokens(tokens=(12, 13, 14)), BOTH))
    x = torch.randint(0, 15, (2, 9))
    expect, state = model(x).logits, adapter.state_dict()
    again = llama()
    again.resize_token_embeddings(15, mean_resizing=False)
    with torch.no_grad():
        again.model.embed_tokens.weight[12:].normal_()  # other random rows than the first time
    fresh = graft.attach(again, graft.Tokens(tokens=(12, 13, 14)), BOTH)
    fresh.load_state_dict(state)
    torch.testing.assert_close(again(x).logits, expect)


def test_scaled_embedding_of_gemma():
    config = transformers.Gemma3TextConfig(
        hidden_size=8, num_hidden_layers=1, intermediate_size=12, num_attention_heads=2, num_key_value_heads=1,
        head_dim=4, vocab_size=12, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.Gemma3ForCausalLM(config).eval()
    moved(graft.attach(model, graft.Tokens(tokens=IDS), BOTH))
    expect = model(batch()).logits
    plain = copy.deepcopy(model)
    graft.adapters(plain)["default"].detach()
    with torch.no_grad():
        rows = graft.adapters(model)["default"].parameters()[0]
        plain.model.embed_tokens.weight[sorted(IDS)] = rows
    torch.testing.assert_close(expect, plain(batch()).logits)
    with graft.merge(model):
        torch.testing.assert_close(model(batch()).logits, expect)


@pytest.mark.parametrize("tied", [True, False])
def test_equals_peft(tied):
    peft = pytest.importorskip("peft")
    model = llama(tied)
    config = peft.TrainableTokensConfig(token_indices=sorted(IDS), target_modules=["embed_tokens"])
    theirs = peft.get_peft_model(copy.deepcopy(model), config).double()
    adapter = moved(graft.attach(model, graft.Tokens(tokens=IDS), BOTH if tied else "embed_tokens"))
    with torch.no_grad():
        theirs.get_input_embeddings().trainable_tokens_delta["default"].copy_(adapter.parameters()[0])
    ours, reference = model(input_ids=batch(), labels=batch()), theirs(input_ids=batch(), labels=batch())
    torch.testing.assert_close(ours.logits, reference.logits)
    ours.loss.backward()
    reference.loss.backward()
    grad = theirs.get_input_embeddings().trainable_tokens_delta["default"].grad
    torch.testing.assert_close(adapter.parameters()[0].grad, grad)


def test_a_head_with_a_bias_keeps_it():
    host = nn.Linear(4, 6, dtype=torch.float64)
    model = nn.Sequential(host)
    delta = graft.attach(model, graft.Tokens(tokens=(1, 4)), "0").deltas["0"]
    with torch.no_grad():
        delta.rows.normal_()
    x = torch.randn(3, 4, dtype=torch.float64)
    torch.testing.assert_close(model(x), x @ delta.weight(host.weight).T + host.bias)


@pytest.mark.parametrize("tokens", [(), (3, 3), (-1,), (12,), ("a",)])
def test_ids_that_are_no_rows_are_refused(tokens):
    with pytest.raises(graft.GraftError, match=r"tokens must be different ids below 12 at model.embed_tokens"):
        graft.attach(llama(), graft.Tokens(tokens=tokens), "embed_tokens")


def test_new_tokens_load_onto_a_base_resized_anew(tmp_path):
    """The new rows are random at each resize, and replaced: they are no part of what tells the base."""

    def resized(seed):
        model = models.llama(tie_word_embeddings=True)
        torch.manual_seed(seed)
        model.resize_token_embeddings(53, mean_resizing=False)
        return model

    ids = torch.tensor([[1, 50, 2, 52, 51]])
    model = resized(3)
    models.move(graft.attach(model, graft.Tokens(tokens=(50, 51, 52)), name="words"))
    models.move(graft.attach(model, "lora", "q_proj", name="style"))
    for name, adapter in graft.adapters(model).items():
        adapter.save(tmp_path / name)
    for order in (["words", "style"], ["style", "words"]):
        again = resized(9)
        for name in order:
            graft.load(again, tmp_path / name)
        assert torch.equal(again(ids).logits, model(ids).logits)
    with pytest.raises(graft.GraftError, match="has other weights"):
        graft.load(models.llama(tie_word_embeddings=True, seed=1), tmp_path / "style")
