"""BitFit is training the real biases in place."""

import copy

import pytest
import torch
from torch import nn

import graft


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv1d(3, 6, 2), nn.Flatten(), nn.Linear(24, 8), nn.LayerNorm(8), nn.Linear(8, 4, bias=False)
    ).double()


def test_training_is_training_the_biases_in_place():
    model, full = network(), network()
    adapter = graft.attach(model, graft.BitFit(), ["0", "2", "3"])
    for name, p in full.named_parameters():
        p.requires_grad_(name.endswith("bias"))
    ours = torch.optim.AdamW(adapter.parameters(), 0.1, weight_decay=0)
    theirs = torch.optim.AdamW([p for p in full.parameters() if p.requires_grad], 0.1, weight_decay=0)
    x = torch.randn(5, 3, 5, dtype=torch.float64)
    for _ in range(3):
        for m, optimizer in ((model, ours), (full, theirs)):
            optimizer.zero_grad()
            m(x).sin().sum().backward()
            optimizer.step()
    torch.testing.assert_close(model(x), full(x))
    merged = graft.merged_state_dict(model)
    torch.testing.assert_close(merged, copy.deepcopy(full.state_dict()))
    for name, value in network().named_parameters():
        assert name.endswith("bias") or torch.equal(merged[name], value)


def test_a_host_without_a_bias_is_refused():
    with pytest.raises(graft.GraftError, match="bitfit cannot work at 4: it has no bias"):
        graft.attach(network(), graft.BitFit(), ["4"])


def test_goes_to_every_bias_outside_the_head_by_default():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=9, n_positions=8)
    model = transformers.GPT2LMHeadModel(config)
    biases = {n.removesuffix(".bias") for n, _ in model.named_parameters() if n.endswith(".bias")}
    assert graft.attach(model, "bitfit").deltas.keys() == biases
    llama = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(hidden_size=8, num_hidden_layers=1, intermediate_size=8, num_attention_heads=2,
                                 vocab_size=9, attention_bias=True)
    )  # fmt: skip
    assert {p.rpartition(".")[2] for p in graft.attach(llama, "bitfit").deltas} == {
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
    }
