"""VB-LoRA against PEFT, and its bank."""

import pytest
import torch
from against_peft import both, fill, same
from peft import VBLoRAConfig
from torch import nn
from transformers.pytorch_utils import Conv1D

import graft
from models import llama


@pytest.mark.parametrize("layer", [nn.Linear, Conv1D])
@pytest.mark.parametrize("topk", [1, 2, 5])
def test_is_pefts_vblora(layer, topk):
    torch.manual_seed(0)
    host = nn.Linear(8, 12) if layer is nn.Linear else Conv1D(12, 8)
    config = VBLoRAConfig(r=3, num_vectors=5, vector_length=4, topk=topk, fan_in_fan_out=layer is Conv1D)
    ours, delta, theirs = both(host, graft.VBLoRA(rank=3, count=5, length=4, topk=topk), config)
    pairs = [
        (delta.logits_A, theirs.vblora_logits_A["default"]),
        (delta.logits_B, theirs.vblora_logits_B["default"]),
        (delta.shared.bank, theirs.vblora_vector_bank["default"]),
    ]
    for mine, other in pairs:
        assert mine.shape == other.shape
    fill(pairs)
    same(ours, theirs, pairs[2:] if topk == 1 else pairs, torch.randn(3, 5, 8, dtype=torch.float64))


def test_starts_near_the_base_as_in_the_paper():
    adapter = graft.attach(llama(), graft.VBLoRA(length=8))
    logits = torch.cat([d.logits_B.flatten() for d in adapter.deltas.values()])
    torch.testing.assert_close(logits.std().item(), 0.1, rtol=0.05, atol=0)
    assert 0.019 < adapter.shared.bank.abs().max() <= 0.02


def test_every_piece_of_every_site_is_a_mixture_of_few_vectors_of_one_bank():
    adapter = graft.attach(llama(), graft.VBLoRA(rank=2, count=6, length=8))
    bank = adapter.shared.bank.detach()
    for delta in adapter.deltas.values():
        A, B = (t.detach() for t in delta.factors())
        for piece in torch.cat([A.reshape(-1, 8), B.T.reshape(-1, 8)]):
            weights = torch.linalg.lstsq(bank.T.double(), piece.double()[:, None], driver="gelsd").solution.flatten()
            torch.testing.assert_close(bank.T.double() @ weights, piece.double(), rtol=1e-4, atol=1e-6)
            assert (weights.abs() > 1e-4).sum() == 2 and weights.sum().item() == pytest.approx(1, abs=1e-3)
    assert sum(p.data_ptr() == adapter.shared.bank.data_ptr() for p in adapter.parameters()) == 1


@pytest.mark.parametrize(
    "hyper, message",
    [
        ({"length": 5}, "length 5 must divide both sizes of model.layers.0.self_attn.q_proj, 32 and 32"),
        ({"length": 4, "count": 3, "topk": 4}, "topk 4 is more than the 3 vectors of the bank"),
        ({"length": 4, "count": {".*q_proj": 3, "*": 4}}, "count and length must be the same at all sites"),
    ],
)
def test_what_does_not_fit_is_refused(hyper, message):
    with pytest.raises(graft.GraftError, match=message):
        graft.attach(llama(), graft.VBLoRA(**hyper))
