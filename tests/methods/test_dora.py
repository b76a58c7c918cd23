"""DoRA against PEFT, against the dense formula, and the closed form of its norms."""

import copy

import pytest
import torch
import torch.nn.functional as F
from against_peft import both, fill, same
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from peft_reference import Host
from sizes import largest
from torch import nn

import graft

transformers = pytest.importorskip("transformers")


def linear(bias=True):
    torch.manual_seed(0)
    return nn.Linear(8, 12, bias=bias), torch.randn(3, 5, 8, dtype=torch.float64)


HOSTS = {
    "linear": (lambda: nn.Linear(8, 12), lambda: torch.randn(3, 5, 8)),
    "without-bias": (lambda: nn.Linear(8, 12, bias=False), lambda: torch.randn(3, 8)),
    "conv1d": (lambda: transformers.pytorch_utils.Conv1D(12, 8), lambda: torch.randn(3, 5, 8)),
    "conv2d": (lambda: nn.Conv2d(4, 12, 3, stride=2, padding=1), lambda: torch.randn(2, 4, 7, 7)),
    "embedding": (lambda: nn.Embedding(16, 12), lambda: torch.randint(0, 16, (3, 5))),
}


@pytest.mark.parametrize("kind", HOSTS)
@pytest.mark.parametrize("rslora", [False, True])
def test_is_pefts_dora(kind, rslora):
    torch.manual_seed(0)
    host, x = HOSTS[kind][0](), HOSTS[kind][1]()
    x = x.double() if x.is_floating_point() else x
    config = LoraConfig(r=3, lora_alpha=5, use_dora=True, use_rslora=rslora,
                        fan_in_fan_out=kind == "conv1d")  # fmt: skip
    ours, delta, layer = both(host, graft.DoRA(rank=3, alpha=5.0, rslora=rslora), config)
    magnitude = layer.lora_magnitude_vector["default"].weight
    torch.testing.assert_close(delta.m, magnitude.flatten())
    if kind == "embedding":
        a, b = layer.lora_embedding_A["default"], layer.lora_embedding_B["default"]
    else:
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    pairs = [(delta.low.A, a), (delta.low.B, b), (delta.m, magnitude)]
    fill(pairs)
    same(ours, layer, pairs, x)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 5), st.floats(0.1, 9))
def test_norms_in_closed_form(d_in, d_out, rank, alpha):
    model = Host(nn.Linear(d_in, d_out).double())
    delta = graft.attach(model, graft.DoRA(rank=rank, alpha=alpha), "host").deltas["host"]
    with torch.no_grad():
        delta.low.B.normal_()
    dense = model.host.weight + alpha / rank * delta.low.B @ delta.low.A
    torch.testing.assert_close(delta.low.row_norms(model.host.weight), dense.norm(dim=1))


def test_norms_are_constants_for_the_gradient():
    host, x = linear()
    model = Host(copy.deepcopy(host).double())
    delta = graft.attach(model, graft.DoRA(rank=2), "host").deltas["host"]
    with torch.no_grad():
        delta.low.B.normal_()
        delta.m.mul_(1.5)
    V = model.host.weight + 8.0 * delta.low.B @ delta.low.A
    ref = F.linear(x, (delta.m / V.detach().norm(dim=1))[:, None] * V, model.host.bias)
    inputs = [delta.m, delta.low.A, delta.low.B]
    for ours, theirs in zip(
        torch.autograd.grad(model(x).sin().sum(), inputs), torch.autograd.grad(ref.sin().sum(), inputs)
    ):
        torch.testing.assert_close(ours, theirs)


def test_no_matrix_of_full_size_is_made():
    model = Host(nn.Linear(256, 256))
    graft.attach(model, graft.DoRA(rank=2), "host")
    x = torch.randn(4, 256)
    assert largest(lambda: model(x).sum().backward()) < 256 * 256


def test_output_is_kept_instead_of_its_parts():
    model = Host(nn.Linear(8, 12))
    graft.attach(model, graft.DoRA(rank=2), "host")
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = model(torch.randn(100, 8))
    wide = {t.data_ptr() for t in kept if t.numel() >= y.numel()}
    assert wide == {y.data_ptr()}


def test_starts_as_the_model_it_finds():
    host, x = linear()
    model = Host(host.double())
    inner = graft.attach(model, graft.LoRA(rank=2), "host", name="inner")
    with torch.no_grad():
        inner.deltas["host"].B.normal_()
    before = model(x)
    graft.attach(model, graft.DoRA(rank=2), "host", name="outer")
    torch.testing.assert_close(model(x), before)
    merged = Host(nn.Linear(8, 12).double())
    merged.load_state_dict(graft.merged_state_dict(model))
    torch.testing.assert_close(merged(x), before)


def test_dropout_falls_on_the_input_of_the_update():
    host, x = linear()
    model = Host(host.double()).train()
    delta = graft.attach(model, graft.DoRA(rank=2, dropout=0.4), "host").deltas["host"]
    with torch.no_grad():
        delta.low.B.normal_()
        delta.m.mul_(1.5)
    torch.manual_seed(3)
    y = model(x)
    torch.manual_seed(3)
    z = F.dropout(x, 0.4)
    low = delta.low
    gain = delta.m / (host.weight + 8.0 * low.B @ low.A).norm(dim=1)
    torch.testing.assert_close(y, gain * (x @ host.weight.T + 8.0 * z @ low.A.T @ low.B.T) + host.bias)


def test_rows_of_zeros_stay_finite():
    host, x = linear()
    with torch.no_grad():
        host.weight[3] = 0
    model = Host(host.double())
    adapter = graft.attach(model, graft.DoRA(rank=2), "host")
    y = model(x)
    y.square().sum().backward()
    torch.testing.assert_close(y, host.weight.new_tensor(F.linear(x, host.weight, host.bias).tolist()))
    assert all(p.grad.isfinite().all() for p in adapter.parameters())
