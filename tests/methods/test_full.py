"""Full fine-tuning of modules: the same as training them in place, beside a base that keeps its values."""

import copy

import pytest
import torch
from torch import nn

import graft


class Head(nn.Module):
    """A classifier of two layers, tied if asked."""

    def __init__(self, tied=False):
        super().__init__()
        self.dense, self.out = nn.Linear(6, 6), nn.Linear(6, 6)
        if tied:
            self.out.weight = self.dense.weight

    def forward(self, hidden_states):
        return self.out(torch.tanh(self.dense(hidden_states)))


class Net(nn.Module):
    def __init__(self, tied=False):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.norm, self.top = nn.Linear(4, 6), nn.LayerNorm(6), Head(tied)
        self.double()

    def forward(self, x):
        return self.top(self.norm(self.body(x)))


X = torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def train(model, parameters):
    optimizer = torch.optim.Adam(parameters, 0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(X).sin().sum().backward()
        optimizer.step()


def moved(adapter, seed=0):
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(0.5 * torch.randn_like(p))
    return adapter


def check_merge(model):
    """Merged as a state and in place computes the same; undone, the base's very tensors are back."""
    expect, before = model(X), dict(model.named_parameters(remove_duplicate=False))
    plain = Net()
    plain.load_state_dict(graft.merged_state_dict(model))
    torch.testing.assert_close(plain(X), expect)
    with graft.merge(model):
        torch.testing.assert_close(model(X), expect)
    assert all(p is before[n] for n, p in model.named_parameters(remove_duplicate=False))
    assert torch.equal(model(X), expect)


@pytest.mark.parametrize("targets", [["body"], ["norm"], ["top"], ["norm", "top"]])
@pytest.mark.parametrize("tied", [False, True])
def test_training_is_training_in_place(targets, tied):
    model, full = Net(tied), Net(tied)
    adapter = graft.attach(model, "full", targets)
    trained = [p for t in targets for p in full.get_submodule(t).parameters()]
    assert [tuple(p.shape) for p in adapter.parameters()] == [tuple(p.shape) for p in trained]
    train(model, adapter.parameters())
    train(full, trained)
    torch.testing.assert_close(model(X), full(X))
    for name, value in graft.merged_state_dict(model).items():
        torch.testing.assert_close(value, full.state_dict()[name])
    check_merge(model)
    adapter.detach()
    assert torch.equal(model(X), Net(tied)(X))


def test_two_adapters_have_a_head_each():
    model, outputs = Net(), {}
    for i, name in enumerate(("first", "second")):
        adapter = moved(graft.attach(model, graft.LoRA(rank=2), "body", heads=["top"], name=name), i)
        graft.activate(model, name)
        outputs[name] = model(X)
        assert len(adapter.deltas) == 2
    assert not torch.allclose(outputs["first"], outputs["second"])
    for name in ("first", "second", "first"):
        graft.activate(model, name)
        assert torch.equal(model(X), outputs[name])
        check_merge(model)
    graft.activate(model)
    assert torch.equal(model(X), Net()(X))


def test_order_of_the_chain():
    outside, inside = Net(), Net()
    moved(graft.attach(outside, "full", "body", name="a"), 1)
    lora = moved(graft.attach(outside, graft.LoRA(rank=2), "body", name="b"), 2)
    full, low = outside.body.deltas["a"].copy, lora.deltas["body"]
    w = full.weight + low.scaling * low.B @ low.A
    torch.testing.assert_close(outside.body(X), X @ w.T + full.bias)
    check_merge(outside)
    moved(graft.attach(inside, graft.LoRA(rank=2), "body", name="b"), 2)
    moved(graft.attach(inside, "full", "body", name="a"), 1)  # replaces what is inside
    torch.testing.assert_close(
        inside.body(X), X @ inside.body.deltas["a"].copy.weight.T + inside.body.deltas["a"].copy.bias
    )
    check_merge(inside)


@pytest.mark.parametrize("before", [True, False])
def test_deltas_on_modules_inside_the_host_rest(before):
    model = Net()
    orders = [(graft.LoRA(rank=2), "top.dense", "inner"), ("full", "top", "outer")]
    for i, (method, targets, name) in enumerate(orders if before else reversed(orders)):
        moved(graft.attach(model, method, targets, name=name), i)
    own = copy.deepcopy(model.top.deltas["outer"].copy)
    torch.testing.assert_close(model(X), own(model.norm(model.body(X))))
    check_merge(model)
    graft.adapters(model)["outer"].disable()
    low = model.top.dense.deltas["inner"]
    w = model.top.dense.weight + low.scaling * low.B @ low.A
    hidden = model.norm(model.body(X)) @ w.T + Net().top.dense.bias
    torch.testing.assert_close(model(X), torch.tanh(hidden) @ model.top.out.weight.T + model.top.out.bias)
    check_merge(model)


def test_a_head_inside_a_module_that_carries_a_delta():
    model = Net()
    outer = moved(graft.attach(model, "full", "top", name="outer"))
    moved(graft.attach(model, "full", "top.out", name="inner"))
    expect = outer.deltas["top"].copy(model.norm(model.body(X)))
    torch.testing.assert_close(model(X), expect)
    outer.disable()
    out = model.top.out.deltas["inner"].copy
    torch.testing.assert_close(model(X), out(torch.tanh(model.top.dense(model.norm(model.body(X))))))


def test_a_tied_output_head_leaves_the_embedding():
    embedding, head = nn.Embedding(5, 3), nn.Linear(3, 5, bias=False)
    head.weight = embedding.weight
    model = nn.Sequential(embedding, head)
    ids = torch.arange(5)
    moved(graft.attach(model, "full", "1"))
    v = model[1].deltas["default"].copy.weight
    torch.testing.assert_close(model(ids), embedding.weight @ v.T)
    merged = graft.merged_state_dict(model)
    assert torch.equal(merged["0.weight"], embedding.weight) and torch.equal(merged["1.weight"], v)
    with graft.merge(model):
        assert torch.equal(model[0].weight, embedding.weight)
        torch.testing.assert_close(model(ids), embedding.weight @ v.T)
    assert head.weight is embedding.weight


def test_quantised_weights_are_refused():
    from graft.core.sites.quantised import QuantisedSite

    class Coded(nn.Linear):
        pass

    class CodedSite(QuantisedSite, hosts=(Coded,)):
        def decode(self):
            return self.module.weight

    with pytest.raises(graft.GraftError, match="full cannot work at 0: its weight is quantised"):
        graft.attach(nn.Sequential(Coded(3, 3)), "full", "0")
