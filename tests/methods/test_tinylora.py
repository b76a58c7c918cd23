"""TinyLoRA against PEFT, its groups, and what is found again."""

import pytest
import torch
from against_peft import both, same
from peft import TinyLoraConfig, get_peft_model
from torch import nn

import graft
from models import llama, move, tokens


def test_is_pefts_tinylora():
    torch.manual_seed(0)
    host, x = nn.Linear(8, 12), torch.randn(3, 5, 8, dtype=torch.float64)
    ours, delta, layer = both(host, graft.TinyLoRA(rank=3, count=4), TinyLoraConfig(r=3, u=4))
    V, U = layer.tinylora_A["default"], layer.tinylora_B["default"]
    torch.testing.assert_close(delta.U @ delta.V, U @ V, rtol=1e-5, atol=1e-6)  # the same singular triplets
    torch.testing.assert_close(delta.P, layer.tinylora_P["default"], rtol=1e-6, atol=1e-7)  # the same random numbers
    for mine, other in ((delta.U, U), (delta.V, V), (delta.P, layer.tinylora_P["default"])):
        mine.copy_(other)
    v = layer.tinylora_v["default"]["0"]
    with torch.no_grad():
        delta.shared.v.copy_(torch.randn(1, 4))
        v.copy_(delta.shared.v[0])
    same(ours, layer, [(delta.shared.v, v)], x)


def test_the_change_stays_in_the_span_of_the_largest_singular_vectors():
    model = nn.Sequential(nn.Linear(9, 7)).double()
    adapter = graft.attach(model, graft.TinyLoRA(rank=2, count=5), "0")
    move(adapter)
    left, _, right = torch.linalg.svd(model[0].weight.detach())
    change = adapter.deltas["0"].weight(torch.zeros(7, 9, dtype=torch.float64))
    inside = left[:, :2].T @ change @ right[:2].T
    torch.testing.assert_close(inside.norm(), change.norm(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("tying", [0.0, 0.3, 0.5, 0.9, 1.0])
def test_groups_are_pefts(tying):
    adapter = graft.attach(llama(), graft.TinyLoRA(count=2, tying=tying))
    config = TinyLoraConfig(u=2, weight_tying=tying, target_modules=list(adapter.deltas))
    theirs = get_peft_model(llama(), config)
    for path, delta in adapter.deltas.items():
        layer = theirs.base_model.model.get_submodule(path)
        assert layer._tinylora_v_key["default"] == str(delta.group)
        torch.testing.assert_close(delta.P, layer.tinylora_P["default"], rtol=1e-6, atol=1e-7)
    assert sum(p.numel() for p in adapter.parameters()) == 2 * len(theirs.base_model.tinylora_v["default"])


def test_thirteen_numbers_are_all_that_is_stored(tmp_path):
    model = llama()
    adapter = move(graft.attach(model, graft.TinyLoRA(count=13, tying=1.0)))
    assert {k: v.shape for k, v in adapter.state_dict().items()} == {"*:v": (1, 13)}
    adapter.save(tmp_path / "a")
    again = llama()
    graft.load(again, tmp_path / "a")
    assert torch.equal(again(tokens()).logits, model(tokens()).logits)
    assert not torch.equal(again(tokens()).logits, llama()(tokens()).logits)


def test_one_length_for_all():
    with pytest.raises(graft.GraftError, match="count and tying must be the same at all sites"):
        graft.attach(llama(), graft.TinyLoRA(count={".*q_proj": 3, "*": 4}))
