"""LoKr against PEFT, LyCORIS and the dense Kronecker product."""

import pytest
import torch
import torch.nn.functional as F
from against_peft import both, fill, same
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoKrConfig
from peft.tuners.lokr.layer import factorization
from peft_reference import Host
from sizes import largest
from torch import nn

import graft
from graft.core.site import site_for
from graft.methods.weight.lokr import factorize

transformers = pytest.importorskip("transformers")

NAMES = {"W1": "lokr_w1", "B1": "lokr_w1_a", "A1": "lokr_w1_b", "W2": "lokr_w2", "B2": "lokr_w2_a", "A2": "lokr_w2_b"}


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 3000), st.sampled_from([-1, 1, 2, 3, 4, 8, 12, 16, 64]))
def test_factorization_is_pefts(size, factor):
    assert factorize(size, factor) == factorization(size, factor)


@pytest.mark.parametrize("kind", ["linear", "conv2d"])
@pytest.mark.parametrize("rank, both_low, factor", [(1, False, -1), (1, True, -1), (2, False, 2), (9, True, 4)])
def test_is_pefts_lokr(kind, rank, both_low, factor):
    torch.manual_seed(0)
    if kind == "linear":
        host, x = nn.Linear(16, 24), torch.randn(3, 5, 16, dtype=torch.float64)
    else:
        host, x = nn.Conv2d(6, 12, 3, stride=2, padding=1), torch.randn(2, 6, 7, 7, dtype=torch.float64)
    config = LoKrConfig(r=rank, alpha=3, decompose_both=both_low, decompose_factor=factor)
    recipe = graft.LoKr(rank=rank, alpha=3.0, decompose_both=both_low, factor=factor)
    ours, delta, layer = both(host, recipe, config)
    found = {mine: dict(getattr(layer, other)).get("default") for mine, other in NAMES.items()}
    assert {k for k, v in found.items() if v is not None} == set(dict(delta.named_parameters()))
    pairs = [(getattr(delta, k), v) for k, v in found.items() if v is not None]
    fill(pairs)
    same(ours, layer, pairs, x)


@pytest.mark.parametrize("rank, both_low", [(1, True), (2, False)])
def test_is_lycoris(rank, both_low):
    lycoris = pytest.importorskip("lycoris.modules.lokr")
    torch.manual_seed(0)
    host, x = nn.Linear(16, 24).double(), torch.randn(5, 16, dtype=torch.float64)
    theirs = lycoris.LokrModule("host", host, lora_dim=rank, alpha=3, decompose_both=both_low).double()
    model = Host(host)
    delta = graft.attach(model, graft.LoKr(rank=rank, alpha=3.0, decompose_both=both_low), "host").deltas["host"]
    pairs = [(getattr(delta, k), getattr(theirs, v)) for k, v in NAMES.items() if getattr(delta, k) is not None]
    for mine, other in pairs:
        assert mine.any() == other.any()  # both start with a zero in the same place
    fill(pairs)
    torch.testing.assert_close(model(x), F.linear(x, host.weight + theirs.get_weight(host.weight.shape), host.bias))


HOSTS = {
    "linear": lambda i, o: (nn.Linear(i, o), torch.randn(2, 3, i)),
    "conv1d-of-gpt2": lambda i, o: (transformers.pytorch_utils.Conv1D(o, i), torch.randn(2, 3, i)),
    "embedding": lambda i, o: (nn.Embedding(i, o), torch.randint(0, i, (2, 3))),
    "conv1d": lambda i, o: (nn.Conv1d(i, o, 3, padding=1), torch.randn(2, i, 6)),
    "conv2d": lambda i, o: (nn.Conv2d(i, o, (2, 3), (1, 2), 1, padding_mode="circular"), torch.randn(2, i, 5, 6)),
    "conv2d-one-image": lambda i, o: (nn.Conv2d(i, o, 2), torch.randn(i, 5, 6)),
    "conv2d-grouped": lambda i, o: (nn.Conv2d(2 * i, 2 * o, 2, groups=2), torch.randn(2, 2 * i, 5, 6)),
}  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(list(HOSTS)), *[st.integers(1, 4)] * 4, st.sampled_from([None, 1, 3]))
def test_kronecker_map_of_every_host(kind, a, b, c, d, rank):
    host, x = HOSTS[kind](c * d, a * b)
    x = x.double() if x.is_floating_point() else x
    site = site_for("host", host.double(), ("linear", "conv", "embedding"))
    rows = a * (2 if "grouped" in kind else 1)
    left = torch.randn(rows, c, dtype=torch.float64)
    inner = torch.randn(rank or b, d * site.taps, dtype=torch.float64)
    right = (inner,) if rank is None else (inner, torch.randn(b, rank, dtype=torch.float64))
    dense = torch.kron(left, right[0] if rank is None else right[1] @ right[0])
    torch.testing.assert_close(site.kron(x, left, right), site.apply(x, dense))


def test_an_embeddings_scale_is_applied_once():
    class Scaled(nn.Embedding):  # as in Gemma 3
        embed_scale = torch.tensor(3.0)

        def forward(self, x):
            return super().forward(x) * self.embed_scale

    model = Host(Scaled(16, 12).double())
    adapter = graft.attach(model, graft.LoKr(rank=1), "host")
    with torch.no_grad():
        for p in adapter.parameters():
            p.normal_()
    x = torch.randint(0, 16, (2, 5))
    dense = adapter.deltas["host"].weight(model.host.weight.T)
    torch.testing.assert_close(model(x), 3 * dense.T[x])


@pytest.mark.parametrize("rank", [2, 64])
def test_no_matrix_of_full_size_is_made(rank):
    model = Host(nn.Linear(256, 256))
    graft.attach(model, graft.LoKr(rank=rank), "host")
    x = torch.randn(4, 256)
    assert largest(lambda: model(x).sum().backward()) < 256 * 256
