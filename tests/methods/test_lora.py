"""LoRA's bias: that it is PEFT's, in value, gradient and files."""

import pytest
import torch
from against_peft import both, fill, same
from torch import nn

import graft
from models import bert, llama, move, tokens

peft = pytest.importorskip("peft")


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("host", [nn.Linear(5, 7), nn.Linear(5, 7, bias=False), nn.Conv2d(3, 4, 2)])
def test_a_bias_is_that_of_peft(host, rslora):
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64) if isinstance(host, nn.Conv2d) else torch.randn(2, 5).double()
    config = peft.LoraConfig(r=3, lora_alpha=5, lora_bias=True, use_rslora=rslora)
    ours, delta, theirs = both(host, graft.LoRA(rank=3, alpha=5.0, bias=True, rslora=rslora), config)
    down, up = theirs.lora_A["default"], theirs.lora_B["default"]
    pairs = [(delta.A, down.weight), (delta.B, up.weight), (delta.c, up.bias)]
    fill(pairs)
    same(ours, theirs, pairs, x)
    if host.bias is not None:
        expect = ours(x)
        with graft.merge(ours):
            torch.testing.assert_close(ours(x), expect)


def test_a_bias_goes_to_peft_and_comes_back(tmp_path):
    model = bert().double()
    adapter = move(graft.attach(model, graft.LoRA(rank=2, bias=True), "query"))
    y = model(tokens()).logits
    adapter.save(tmp_path / "peft", format="peft")
    theirs = peft.PeftModel.from_pretrained(bert().double(), tmp_path / "peft")
    torch.testing.assert_close(theirs(tokens()).logits, y)
    again = bert().double()
    graft.load(again, tmp_path / "peft")
    torch.testing.assert_close(again(tokens()).logits, y)


def test_a_bias_is_refused_where_there_is_none():
    with pytest.raises(
        graft.GraftError, match=r"lora: bias must be False at model\.embed_tokens: an embedding has none"
    ):
        graft.attach(llama(), graft.LoRA(bias=True), "embed_tokens")
    model = llama()
    move(graft.attach(model, graft.LoRA(bias=True), "q_proj"))
    with pytest.raises(graft.GraftError, match=r"q_proj has no bias to take the one of lora"):
        graft.merged_state_dict(model)
