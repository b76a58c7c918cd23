"""What `verify` says of a forward is what the forward does, whatever way a model takes to a host's weight."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import graft
from graft import GraftError
from graft.core import host as hosting
from graft.core.delta import METHODS
from graft.methods import load as load_methods
from models import bert, gpt2, llama, move, picture, tokens

IDS = {"input_ids": tokens()}


# Ways to use a matrix, out of sight of the bytecode. Each reads the weight as a tensor, past the module's forward.
READS = {
    "F.linear": lambda m, x: F.linear(x, m.weight),
    "a transposed view": lambda m, x: x @ m.weight.T,
    "einsum": lambda m, x: torch.einsum("bi,oi->bo", x, m.weight),
    "a cast": lambda m, x: F.linear(x, m.weight.to(torch.float64).to(x.dtype)),
    "data": lambda m, x: F.linear(x, m.weight.data),
    "a part of it": lambda m, x: torch.cat([F.linear(x, w) for w in m.weight.chunk(2)], -1),
    "functional call": lambda m, x: torch.func.functional_call(nn.Linear(4, 4, bias=False), {"weight": m.weight}, x),
    "the class": lambda m, x: nn.Linear.forward(m, x),
    "out=": lambda m, x: torch.mm(x, m.weight.T, out=torch.empty(len(x), 4)) if not x.requires_grad else x @ m.weight.T,
}
# Ways that do not depend on its values.
LOOKS = {
    "dtype and device": lambda m, x: x.to(m.weight.dtype).to(m.weight.device),
    "shape": lambda m, x: x * m.weight.shape[0] / m.weight.T.size(1) + 0 * m.weight.numel(),
    "a tensor like it": lambda m, x: x + torch.zeros_like(m.weight).sum() + m.weight.new_zeros(1),
    "nothing": lambda m, x: x,
}


class Uses(nn.Module):
    """A stack of layers, each used in the ways that are listed for it."""

    def __init__(self, ways):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(4, 4, bias=False) for _ in ways)
        self.ways = ways

    def forward(self, x):
        for layer, ways in zip(self.layers, self.ways):
            for way in ways:
                x = layer(x) if way == "call" else (READS | LOOKS)[way](layer, x)
        return x


@settings(max_examples=60, deadline=None)
@given(
    ways=st.lists(st.lists(st.sampled_from(["call", *READS, *LOOKS]), min_size=1, max_size=3), min_size=1, max_size=4),
    train=st.booleans(),
)
def test_every_use_of_a_weight_is_found(ways, train):
    model = Uses(ways)
    move(graft.attach(model, "lora", r"layers\.\d", rank=2))
    found = graft.verify(model, torch.randn(3, 4), train=train)
    assert [d.path for d in found.deltas] == [f"layers.{i}" for i in range(len(ways))]
    for delta, own in zip(found.deltas, ways):
        assert delta.calls == own.count("call") and not delta.tied
        expected = {delta.path if way == "the class" else "the model" for way in own if way in READS}
        assert set(delta.past) == expected
        assert delta.gradient is (("call" in own) if train else None)
    missed = {f"layers.{i}" for i, own in enumerate(ways) if "call" not in own or {*own} & READS.keys()}
    assert {d.path for d in found.missed} == missed
    assert f"{len(ways) - len(missed)} of {len(ways)} deltas reached" in repr(found)
    assert repr(found).count("missed: ") == len(missed)
    if missed:
        with pytest.raises(
            GraftError, match=rf"^{len(missed)} of {len(ways)} deltas are missed: default at {min(missed)}: "
        ):
            found.check()
    else:
        found.check()


load_methods()


@pytest.mark.parametrize("name", sorted(METHODS))
def test_every_method_is_reached_where_it_goes_by_itself(name):
    cls = METHODS[name]
    model, batch = (bert(), IDS) if name in ("full", "bitfit") else (llama(), IDS)
    stats = None
    if needs := cls.asks({**graft.Recipe.of(name, **cls.small).hyper}):
        stats = graft.collect(model, [IDS | {"labels": IDS["input_ids"]}], needs, cls.targets)
    adapter = move(graft.attach(model, name, stats=stats, **cls.small), 0.1)
    for train in (False, True):
        found = graft.verify(model, batch, train=train)
        assert not found.missed and {d.path for d in found.deltas} == {*adapter.deltas}
        assert all(d.calls for d in found.deltas)
        assert {d.gradient for d in found.deltas} <= ({True, None} if train else {None})


def test_adapters_that_are_switched_off_are_not_asked_for():
    model = llama()
    for name, recipe in {"a": graft.LoRA(rank=2), "b": graft.PrefixTuning(length=2)}.items():
        graft.attach(model, recipe, name=name)
    graft.activate(model, "b")
    assert {d.adapter for d in graft.verify(model, IDS).deltas} == {"b"}
    graft.activate(model)
    with pytest.raises(GraftError, match="runs no adapter"):
        graft.verify(model, IDS)
    with pytest.raises(GraftError, match="runs no adapter"):
        graft.verify(gpt2(), IDS)


def test_rows_with_adapters_of_their_own_are_refused(monkeypatch):
    monkeypatch.setattr(hosting, "routed", hosting.routed)  # which stays set once a route was opened
    model = llama()
    for name in "ab":
        graft.attach(model, "lora", name=name, rank=2)
    with pytest.raises(GraftError, match="not one for each row"):
        graft.verify(model, IDS | {"adapters": ["a", "b", None]})
    with graft.route(model, ["a", "b", None]), pytest.raises(GraftError, match="not one for each row"):
        graft.verify(model, IDS)
    assert not graft.verify(model, IDS).missed


@pytest.mark.parametrize("targets, tied", [("embeddings", {"model.embed_tokens": ("lm_head",)}), ("tokens", {}),
                                           ("lm_head", {"lm_head": ("model.embed_tokens",)})])  # fmt: skip
def test_tied_weights_are_told_and_no_fault(targets, tied):
    model = llama(tie_word_embeddings=True)
    graft.attach(model, "lora", targets, rank=2)
    found = graft.verify(model, IDS)
    assert not found.missed and {d.path: d.tied for d in found.deltas if d.tied} == tied
    assert {d.path for d in found.tied} == {*tied}


def test_neighbours_in_one_storage_are_told_apart():
    model = Uses([["call"], ["F.linear"], ["call"]])
    flat = torch.randn(3, 4, 4)
    for layer, w in zip(model.layers, flat):
        layer.weight = nn.Parameter(w)
    assert len({layer.weight.untyped_storage().data_ptr() for layer in model.layers}) == 1
    graft.attach(model, "lora", r"layers\.[02]", rank=2)
    assert not graft.verify(model, torch.randn(2, 4)).missed


def test_the_fused_kernel_of_torch_is_seen_where_it_runs():
    """It runs in evaluation alone: there the deltas are bypassed, in training they are not."""
    layer = nn.Sequential(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True))
    x = torch.randn(1, 3, 16)
    enabled = torch.backends.mha.get_fastpath_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(False)  # otherwise refused
        move(graft.attach(layer, "lora", ["0.linear1", "0.linear2"], rank=2))
        assert not graft.verify(layer, x).missed
        torch.backends.mha.set_fastpath_enabled(True)
        assert [(d.calls, d.past) for d in graft.verify(layer, x).missed] == [(0, ("0",))] * 2
        assert not graft.verify(layer, x, train=True).missed
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

    def forward(self, x, chosen):
        return self.experts[chosen](x).detach() + self.experts[0](x)


def test_what_does_not_run_or_does_not_count_is_told():
    model = Experts()
    graft.attach(model, "lora", r"experts\.\d", rank=2)
    found = graft.verify(model, (torch.randn(2, 4), 1), train=True)
    assert [(d.calls, d.gradient) for d in found.deltas] == [(1, True), (1, False), (0, False)]
    assert ["did not run" in d.trouble for d in found.missed] == [False, True]
    found = graft.verify(model, {"x": torch.randn(2, 4), "chosen": 1})
    assert [d.path for d in found.missed] == ["experts.2"]
    found = graft.verify(model, torch.randn(2, 4), run=lambda m, x: [m(x, i) for i in range(3)])
    assert not found.missed and [d.calls for d in found.deltas] == [4, 1, 1]


def test_a_head_that_an_outer_adapter_replaces_gets_no_gradient():
    model = bert()
    a = graft.attach(model, "lora", "query", heads="classifier", name="a", rank=2)
    graft.attach(model, "lora", "value", heads="classifier", name="b", rank=2)
    a.requires_grad_(False)  # asked is whether one would get there
    missed = graft.verify(model, IDS, train=True).missed
    assert [(d.adapter, d.path, d.gradient) for d in missed] == [("a", "classifier", False)]
    assert not graft.verify(model, IDS).missed


@pytest.mark.parametrize("train", [False, True])
def test_nothing_of_it_stays(train):
    model = llama(attention_dropout=0.3)
    for name, recipe in {
        "a": graft.LoRA(rank=2, dropout=0.5),
        "b": graft.DoRA(rank=2),
        "c": graft.PrefixTuning(length=2),
    }.items():
        move(graft.attach(model, recipe, name=name))
    graft.adapters(model)["b"].requires_grad_(False)
    model.model.layers[0].train()
    y = model.eval()(**IDS).logits
    model.model.layers[0].train()
    before, state = picture(model), torch.get_rng_state()
    chains = [(m.chain, m.__dict__.get("product")) for m in model.modules() if hasattr(m, "host_class")]

    def fails(model, batch):
        model(**batch)
        raise ZeroDivisionError

    graft.verify(model, IDS, train=train)
    with pytest.raises(ZeroDivisionError):
        graft.verify(model, IDS, train=train, run=fails)
    assert picture(model) == before and torch.equal(torch.get_rng_state(), state)
    now = [(m.chain, m.__dict__.get("product")) for m in model.modules() if hasattr(m, "host_class")]
    assert all(a is c and b is d for (a, b), (c, d) in zip(chains, now, strict=True))
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(model.eval()(**IDS).logits, y)


def test_a_compiled_model_is_run_eagerly():
    model = Uses([["call"], ["F.linear"]])
    graft.attach(model, "lora", r"layers\.\d", rank=2)
    x = torch.randn(2, 4)
    expected = graft.verify(model, x)
    assert graft.verify(torch.compile(model, backend="aot_eager"), x) == expected
    model.compile(backend="aot_eager")
    model(x)
    assert graft.verify(model, x) == expected and [d.path for d in expected.missed] == ["layers.1"]


def test_checkpointing_and_autocast_change_nothing():
    model = llama()
    graft.attach(model, "lora", rank=2)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    with torch.autocast("cpu", torch.bfloat16):
        found = graft.verify(model, IDS, train=True)
    assert not found.missed and {d.calls for d in found.deltas} == {1}
