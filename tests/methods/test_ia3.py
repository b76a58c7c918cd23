"""(IA)3: PEFT's layer on both sides, and the side that follows from the host."""

import pytest
import torch
from peft_reference import peft_layer
from torch import nn

import graft


@pytest.mark.parametrize("on", ["output", "input"])
@pytest.mark.parametrize(
    "make, shape", [(lambda: nn.Linear(8, 6), (3, 5, 8)), (lambda: nn.Conv2d(4, 6, 3), (3, 4, 5, 5))]
)
def test_equals_peft_and_merges(on, make, shape):
    peft = pytest.importorskip("peft")
    host, x = make().double(), torch.randn(shape, dtype=torch.float64)
    reference = peft_layer(
        host, peft.IA3Config(feedforward_modules=["host"] if on == "input" else [], target_modules=["host"])
    )
    model = nn.Sequential(host)
    delta = graft.attach(model, graft.IA3(on=on), "0").deltas["0"]
    with torch.no_grad():
        delta.l.normal_()
        reference.ia3_l["default"].copy_(delta.l.view(reference.ia3_l["default"].shape))
    expect = reference(x)
    torch.testing.assert_close(model(x), expect)
    with graft.merge(model):
        torch.testing.assert_close(model(x), expect)


def test_grouped_convolution_scales_each_input_channel():
    host = nn.Conv1d(4, 6, 3, groups=2, dtype=torch.float64)
    model = nn.Sequential(host)
    delta = graft.attach(model, graft.IA3(on="input"), "0").deltas["0"]
    with torch.no_grad():
        delta.l.normal_()
    x = torch.randn(2, 4, 7, dtype=torch.float64)
    expect = nn.functional.conv1d(x * delta.l[:, None], host.weight, host.bias, groups=2)
    torch.testing.assert_close(model(x), expect)
    with graft.merge(model):
        torch.testing.assert_close(model(x), expect)


def sides(model):
    adapter = graft.attach(model, graft.IA3())
    return {path: delta.on for path, delta in adapter.deltas.items()}


def test_default_sides_on_llama():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=16, num_hidden_layers=1, intermediate_size=24, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=9,
    )  # fmt: skip
    assert sides(transformers.LlamaForCausalLM(config)) == {
        "model.layers.0.self_attn.k_proj": "output",
        "model.layers.0.self_attn.v_proj": "output",
        "model.layers.0.mlp.down_proj": "input",
    }


def test_default_sides_on_bert_and_gpt2():
    transformers = pytest.importorskip("transformers")
    bert = transformers.BertConfig(
        hidden_size=8, num_hidden_layers=1, intermediate_size=12, num_attention_heads=2, vocab_size=9
    )
    assert sides(transformers.BertModel(bert)) == {
        "encoder.layer.0.attention.self.key": "output",
        "encoder.layer.0.attention.self.value": "output",
        "encoder.layer.0.output.dense": "input",
    }
    gpt2 = transformers.GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=9, n_positions=8)
    assert sides(transformers.GPT2Model(gpt2)) == {"h.0.attn.c_attn": "output", "h.0.mlp.c_proj": "input"}
