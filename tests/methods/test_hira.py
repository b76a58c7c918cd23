"""HiRA against PEFT; the rank and the pattern of its change; what half precision keeps of it."""

import pytest
import torch
from against_peft import both, fill, same
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import graft
from models import move

peft = pytest.importorskip("peft")


@pytest.mark.parametrize("host", [nn.Linear(5, 7), nn.Conv2d(3, 4, 2), nn.Embedding(9, 6)])
def test_is_pefts_layer(host):
    kinds = {nn.Linear: torch.randn(2, 5).double(), nn.Conv2d: torch.randn(2, 3, 6, 6).double()}
    x = kinds.get(type(host), torch.randint(0, 9, (2, 5)))
    ours, delta, theirs = both(host, graft.HiRA(rank=3), peft.HiraConfig(r=3))
    A, B = (
        (theirs.hira_embedding_A, theirs.hira_embedding_B)
        if isinstance(host, nn.Embedding)
        else (theirs.hira_A, theirs.hira_B)
    )
    pairs = [(delta.A, A["default"]), (delta.B, B["default"])]
    fill(pairs)
    same(ours, theirs, pairs, x)


@settings(max_examples=20, deadline=None)
@given(d_in=st.integers(6, 12), d_out=st.integers(6, 12), rank=st.integers(1, 2))
def test_the_change_has_a_high_rank_and_the_zeros_of_w(d_in, d_out, rank):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(d_in, d_out)).double()
    w = model[0].weight
    with torch.no_grad():
        w[0] = w[:, 1] = 0
    move(graft.attach(model, graft.HiRA(rank=rank), "0"))
    change = graft.merged_state_dict(model)["0.weight"] - w.detach()
    assert not change[0].any() and not change[:, 1].any()
    assert torch.linalg.matrix_rank(change) == min(d_in, d_out) - 1 > rank


def test_half_precision_keeps_a_change_below_its_resolution():
    """Of entries of W + 0.001 W in bfloat16 nothing would be left: half of its last place is 0.002."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32, bias=False)).to(torch.bfloat16)
    delta = graft.attach(model, graft.HiRA(rank=1), "0").deltas["0"]
    x = torch.randn(50, 64, dtype=torch.bfloat16)
    with torch.no_grad():
        delta.A.fill_(1)
        delta.B.fill_(0.001)
        exact = x.float() @ (0.001 * model[0].weight.float()).T
        y = torch.zeros(50, 32, dtype=torch.bfloat16)
        seen = delta.forward(Nothing(model[0], y), x)
    torch.testing.assert_close(seen.float(), exact, rtol=0.02, atol=1e-5)


class Nothing:
    """A host which computes zero, with the matrix of a layer."""

    def __init__(self, layer, y):
        self.weight, self.bias, self.y = layer.weight, None, y

    def __call__(self, x):
        return self.y


def test_dropout_at_an_embedding_is_refused():
    with pytest.raises(graft.GraftError, match=r"hira: dropout must be 0 at 0, not 0\.5"):
        graft.attach(nn.Sequential(nn.Embedding(5, 4)), graft.HiRA(dropout=0.5), "0")
