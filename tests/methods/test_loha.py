"""LoHa against PEFT, LyCORIS and the dense formula, in both of its forms."""

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from against_peft import both, fill, same
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoHaConfig
from peft_reference import Host
from sizes import largest
from torch import nn
from torch.func import functional_call, vmap

import graft

NAMES = {"B1": "hada_w1_a", "A1": "hada_w1_b", "B2": "hada_w2_a", "A2": "hada_w2_b"}


@pytest.mark.parametrize("rank", [1, 2, 5])  # the last one forms the matrix
@pytest.mark.parametrize("kind", ["linear", "conv2d"])
def test_is_pefts_loha(kind, rank):
    torch.manual_seed(0)
    if kind == "linear":
        host, x = nn.Linear(16, 24), torch.randn(3, 5, 16, dtype=torch.float64)
    else:
        host, x = nn.Conv2d(4, 12, 3, stride=2, padding=1), torch.randn(2, 4, 7, 7, dtype=torch.float64)
    config = LoHaConfig(r=rank, alpha=3)
    ours, delta, layer = both(host, graft.LoHa(rank=rank, alpha=3.0), config)
    assert delta.dense == (rank == 5)
    pairs = [(getattr(delta, mine), getattr(layer, other)["default"]) for mine, other in NAMES.items()]
    fill(pairs)
    same(ours, layer, pairs, x)


@pytest.mark.parametrize("rank", [2, 5])
def test_is_lycoris(rank):
    lycoris = pytest.importorskip("lycoris.modules.loha")
    torch.manual_seed(0)
    host, x = nn.Linear(16, 24).double(), torch.randn(5, 16, dtype=torch.float64)
    theirs = lycoris.LohaModule("host", host, lora_dim=rank, alpha=3).double()
    model = Host(host)
    delta = graft.attach(model, graft.LoHa(rank=rank, alpha=3.0), "host").deltas["host"]
    fill([(getattr(delta, mine), getattr(theirs, other)) for mine, other in NAMES.items()])
    W = host.weight + theirs.get_weight(host.weight.shape)
    torch.testing.assert_close(delta.weight(host.weight), W)
    torch.testing.assert_close(model(x), F.linear(x, W, host.bias))


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 12), st.integers(2, 12), st.integers(1, 4))
def test_khatri_rao_form_is_the_hadamard_product(d_in, d_out, rank):
    model = Host(nn.Linear(d_in, d_out).double())
    delta = graft.attach(model, graft.LoHa(rank=rank), "host").deltas["host"]
    with torch.no_grad():
        delta.B2.normal_()
    x = torch.randn(5, d_in, dtype=torch.float64)
    results = []
    for delta.dense in (False, True):
        y = model(x)
        results.append((y, *torch.autograd.grad(y.sin().sum(), list(delta.parameters()))))
    for a, b in zip(*results):
        torch.testing.assert_close(a, b)
    W = model.host.weight + 8 / rank * (delta.B1 @ delta.A1) * (delta.B2 @ delta.A2)
    torch.testing.assert_close(results[0][0], F.linear(x, W, model.host.bias))


def test_rank_is_the_square():
    model = Host(nn.Linear(64, 64).double())
    delta = graft.attach(model, graft.LoHa(rank=3), "host").deltas["host"]
    with torch.no_grad():
        delta.B2.normal_()
    assert torch.linalg.matrix_rank(delta.weight(0)) == 9


def test_low_rank_form_makes_no_matrix_of_full_size():
    model = Host(nn.Linear(256, 256))
    graft.attach(model, graft.LoHa(rank=4), "host")
    x = torch.randn(4, 256)
    assert largest(lambda: model(x).sum().backward()) < 256 * 256


@pytest.fixture
def dense():
    torch.manual_seed(0)
    model = Host(nn.Linear(16, 24))
    adapter = graft.attach(model, graft.LoHa(rank=6), "host")
    with torch.no_grad():
        adapter.deltas["host"].B2.normal_()
    assert adapter.deltas["host"].dense
    return model, adapter.deltas["host"]


def test_matrix_is_not_kept_for_backward(dense):
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        dense[0](torch.randn(3, 16))
    assert max(kept) < 16 * 24


def test_matrix_form_compiles_to_one_graph(dense):
    model, _ = dense
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    x = torch.randn(3, 16)
    compiled(x).sum().backward()
    torch.testing.assert_close(compiled(x), model(x))
    assert counter.frame_count == 1


def test_matrix_form_serves_rows_of_a_batch(dense):
    model, delta = dense
    inner, x = model.host.chain.inner, torch.randn(3, 5, 16)
    rows = {k: torch.stack([i * v for i in (1, 2, 3)]) for k, v in delta.state_dict().items()}
    out = vmap(lambda p, row: functional_call(delta, p, (inner, row)))(rows, x)
    for i in range(3):
        expect = functional_call(delta, {k: v[i] for k, v in rows.items()}, (inner, x[i]))
        torch.testing.assert_close(out[i], expect)
