"""GraLoRA against PEFT, and against the dense matrix of its parts."""

import pytest
import torch
from against_peft import both, fill, same
from peft import GraloraConfig
from peft_reference import Host
from torch import nn
from transformers.pytorch_utils import Conv1D

import graft


@pytest.mark.parametrize("hybrid", [0, 3])
@pytest.mark.parametrize("blocks", [1, 2, 4])
@pytest.mark.parametrize("layer", [nn.Linear, Conv1D])
def test_is_pefts_gralora(blocks, hybrid, layer):
    torch.manual_seed(0)
    host = nn.Linear(8, 12) if layer is nn.Linear else Conv1D(12, 8)
    config = GraloraConfig(r=4, alpha=6, gralora_k=blocks, hybrid_r=hybrid, fan_in_fan_out=layer is Conv1D)
    ours, delta, theirs = both(host, graft.GraLoRA(rank=4, alpha=6.0, blocks=blocks, hybrid_rank=hybrid), config)
    pairs = [(delta.A, theirs.gralora_A["default"]), (delta.B, theirs.gralora_B["default"])]
    torch.testing.assert_close(delta.A.std(), pairs[0][1].std(), rtol=0.3, atol=0)  # the same distribution
    if hybrid:
        pairs += [
            (delta.A0, theirs.gralora_A_general["default"].weight),
            (delta.B0, theirs.gralora_B_general["default"].weight),
        ]
    fill(pairs)
    same(ours, theirs, pairs, torch.randn(3, 5, 8, dtype=torch.float64))


def test_has_blocks_times_the_rank_of_lora_with_as_many_parameters():
    model, plain = Host(nn.Linear(16, 24).double()), Host(nn.Linear(16, 24).double())
    delta = graft.attach(model, graft.GraLoRA(rank=4, blocks=4), "host").deltas["host"]
    lora = graft.attach(plain, graft.LoRA(rank=4), "host").deltas["host"]
    with torch.no_grad():
        delta.B.normal_()
    assert sum(p.numel() for p in delta.parameters()) == sum(p.numel() for p in lora.parameters())
    change = delta.weight(torch.zeros(24, 16))
    assert torch.linalg.matrix_rank(change) == 16
    parts = change.view(4, 6, 4, 4).transpose(1, 2)  # [j, n, out / blocks, in / blocks]
    assert (torch.linalg.matrix_rank(parts) == 1).all()


@pytest.mark.parametrize(
    "sizes, rank, what", [((8, 12), 3, "rank 3"), ((7, 12), 4, "the input size 7"), ((8, 9), 4, "the output size 9")]
)
def test_what_does_not_divide_is_refused(sizes, rank, what):
    with pytest.raises(graft.GraftError, match=f"blocks 2 must divide {what} at host"):
        graft.attach(Host(nn.Linear(*sizes)), graft.GraLoRA(rank=rank, blocks=2), "host")
