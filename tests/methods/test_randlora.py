"""RandLoRA against PEFT, both ways to compute it, and its rank."""

import pytest
import torch
from against_peft import both, fill, same
from peft import RandLoraConfig
from peft_reference import Host
from sizes import largest
from torch import nn
from transformers.pytorch_utils import Conv1D

import graft


@pytest.mark.parametrize("sizes", [(8, 12), (12, 8), (8, 8), (7, 10)])
@pytest.mark.parametrize("layer", [nn.Linear, Conv1D])
@pytest.mark.parametrize("tokens", [1, 15])
def test_is_pefts_randlora(sizes, layer, tokens):
    torch.manual_seed(0)
    host = nn.Linear(*sizes) if layer is nn.Linear else Conv1D(*reversed(sizes))
    config = RandLoraConfig(r=3, randlora_alpha=5, fan_in_fan_out=layer is Conv1D)
    ours, delta, theirs = both(host, graft.RandLoRA(rank=3, alpha=5.0), config)
    for mine, other in ((delta.shared.A, theirs.randlora_A["default"]), (delta.shared.B, theirs.randlora_B["default"])):
        assert mine.shape == other.shape
        torch.testing.assert_close(mine.std(), other.std().to(mine), rtol=0.3, atol=0)
        mine.copy_(other)
    theirs.randlora_A["default"], theirs.randlora_B["default"] = delta.shared.A, delta.shared.B  # theirs are rounded
    pairs = [(delta.lam, theirs.randlora_lambda["default"]), (delta.gamma, theirs.randlora_gamma["default"])]
    for mine, other in pairs:
        torch.testing.assert_close(mine, other)
    fill(pairs)
    same(ours, theirs, pairs, torch.randn(tokens, sizes[0], dtype=torch.float64))


@pytest.mark.parametrize("rank", [1, 5, 16])
def test_the_change_has_full_rank_and_is_the_sum_of_the_formula(rank):
    model = Host(nn.Linear(16, 24).double())
    delta = graft.attach(model, graft.RandLoRA(rank=rank, alpha=2.0), "host").deltas["host"]
    with torch.no_grad():
        delta.lam.normal_()
        delta.gamma.normal_()
    change = delta.weight(torch.zeros(24, 16, dtype=torch.float64))
    assert torch.linalg.matrix_rank(change) == 16
    n = delta.lam.shape[1]
    stacked_A = [delta.lam[r, j] * delta.shared.A[r, 0] * delta.gamma[j] for r in range(rank) for j in range(n)]
    stacked_B = [delta.shared.B[:, j, r] for j in range(n) for r in range(rank)]
    torch.testing.assert_close(change, 2.0 / rank * sum(torch.outer(b, a) for a, b in zip(stacked_A, stacked_B)))


def test_bases_are_not_stored_and_drawn_again_unless_asked_for():
    def make(seed, **kw):
        return graft.attach(nn.Sequential(nn.Linear(5, 9)), graft.RandLoRA(rank=2, **kw), "0", seed=seed)

    full, light = make(1, save_projection=True), make(1)
    assert {"*:A", "*:B"} == full.state_dict().keys() - light.state_dict().keys()
    assert torch.equal(full.shared.A, light.shared.A) and torch.equal(full.shared.B, light.shared.B)
    assert not torch.equal(light.shared.A, make(2).shared.A)


def test_for_few_tokens_the_matrix_is_not_formed():
    model = Host(nn.Linear(256, 512))
    graft.attach(model, graft.RandLoRA(rank=64), "host")
    assert largest(lambda: model(torch.randn(4, 256))) < 256 * 512
