"""LN tuning is training the real gains and biases of the norms in place."""

import pytest
import torch
from torch import nn

import graft


class GemmaNorm(nn.Module):
    """Keeps g - 1."""

    def __init__(self, dim):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(dim))

    def forward(self, x):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * (1 + self.weight)


def llama_norm(dim):
    return pytest.importorskip("transformers.models.llama.modeling_llama").LlamaRMSNorm(dim)


@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm, GemmaNorm, llama_norm])
def test_training_is_training_the_norms_in_place(norm):
    def network():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 6), norm(6), nn.Linear(6, 6), norm(6)).double()
        with torch.no_grad():
            model[1].weight.add_(0.1 * torch.randn(6))
        return model

    model, full = network(), network()
    adapter = graft.attach(model, graft.LNTuning(), ["1", "3"])
    for path in ("0", "2"):
        full.get_submodule(path).requires_grad_(False)
    trained = [p for p in full.parameters() if p.requires_grad]
    assert sum(p.numel() for p in trained) == sum(p.numel() for p in adapter.parameters())
    ours = torch.optim.AdamW(adapter.parameters(), 0.1, weight_decay=0)
    theirs = torch.optim.AdamW(trained, 0.1, weight_decay=0)
    x = torch.randn(5, 4, dtype=torch.float64)
    for _ in range(3):
        for m, optimizer in ((model, ours), (full, theirs)):
            optimizer.zero_grad()
            m(x).sin().sum().backward()
            optimizer.step()
    torch.testing.assert_close(model(x), full(x), rtol=1e-6, atol=1e-6)  # Llama's norm computes in float32
    for name, value in graft.merged_state_dict(model).items():
        torch.testing.assert_close(value, full.state_dict()[name], rtol=1e-6, atol=1e-6)
