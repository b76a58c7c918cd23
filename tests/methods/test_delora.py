"""DeLoRA against PEFT, and the bound that is its point."""

import torch
from against_peft import both, fill, same
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import DeloraConfig
from peft_reference import Host
from torch import nn

import graft


def test_is_pefts_delora():
    torch.manual_seed(0)
    host, x = nn.Linear(8, 12), torch.randn(3, 5, 8, dtype=torch.float64)
    ours, delta, layer = both(host, graft.DeLoRA(rank=3, strength=2.0), DeloraConfig(r=3, delora_lambda=2))
    torch.testing.assert_close(delta.norms, layer.delora_w_norm["default"], rtol=1e-6, atol=0)
    delta.norms.copy_(layer.delora_w_norm["default"])
    pairs = [(getattr(delta, n), getattr(layer, f"delora_{m}")["default"]) for n, m in NAMES.items()]
    for mine, other in pairs:
        assert mine.shape == other.shape and mine.any() == other.any()
    assert torch.equal(delta.strength, layer.delora_lambda["default"])
    fill(pairs)
    same(ours, layer, pairs, x)


NAMES = {"A": "A", "B": "B", "strength": "lambda"}


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 6), st.floats(0.01, 100), st.floats(-3, 3), st.integers(0, 99))
def test_the_strength_bounds_the_change_whatever_the_angles(rank, strength, size, seed):
    torch.manual_seed(seed)
    model = Host(nn.Linear(9, 7).double())
    delta = graft.attach(model, graft.DeLoRA(rank=rank, strength=strength), "host").deltas["host"]
    with torch.no_grad():
        delta.B.normal_().mul_(10**size)
        delta.A.normal_().mul_(10**-size)
        relative = (delta.weight(model.host.weight) - model.host.weight) / model.host.weight.norm(dim=0)
    bound = delta.strength.item()
    assert relative.norm() <= bound * (1 + 1e-6)
    if rank == 1 and 10**-size > 1e-3 and 10**size > 1e-3:
        torch.testing.assert_close(relative.norm().item(), bound, rtol=1e-6, atol=0)


def test_only_what_is_trained_is_stored_and_the_norms_come_from_the_base(tmp_path):
    torch.manual_seed(0)
    host = nn.Linear(8, 12)
    model = Host(host)
    adapter = graft.attach(model, graft.DeLoRA(rank=1), "host")
    assert adapter.state_dict().keys() == {"host:A", "host:B", "host:strength"}
    torch.testing.assert_close(adapter.deltas["host"].norms, host.weight.detach().norm(dim=0))
