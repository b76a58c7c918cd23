"""Adapters on whole models: chains, switching, freezing, heads, awkward hosts."""

import copy
import inspect
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import graft
from graft.core.delta import METHODS
from graft.core.host import Adapted
from graft.core.sites.quantised import QuantisedSite
from models import bert, gpt2, llama, move, picture, tokens

IDS = tokens()


def logits(model):
    return model(IDS).logits


@settings(max_examples=15, deadline=None)
@given(st.permutations(["a", "b", "c"]), st.lists(st.sampled_from(["a", "b", "c"]), max_size=6))
def test_any_order_of_attaching_switching_and_detaching_comes_back_to_the_base(order, switches):
    model = llama()
    before, y = picture(model), logits(model)
    made = {}
    for i, name in enumerate(order):
        made[name] = move(graft.attach(model, "lora", ["q_proj", "down_proj"], name=name, rank=2), seed=i)
    assert list(graft.adapters(model)) == list(order)
    for name in switches:
        made[name].disable() if made[name].active else made[name].enable()
    with graft.disabled(model):
        assert torch.equal(logits(model), y)
    for name in "abc":
        made[name].detach()
    assert picture(model) == before
    assert torch.equal(logits(model), y)


def test_a_chain_computes_the_product_of_its_changes_in_order():
    model = llama(torch.float64)
    first = move(graft.attach(model, "lora", "q_proj", name="first", rank=2))
    second = move(graft.attach(model, "lora", "q_proj", name="second", rank=3), seed=2)
    host = model.model.layers[0].self_attn.q_proj
    x = torch.randn(4, 32, dtype=torch.float64)
    path = "model.layers.0.self_attn.q_proj"
    w = host.weight
    for adapter in (first, second):
        w = adapter.deltas[path].weight(w)
    torch.testing.assert_close(host(x), F.linear(x, w))
    both = logits(model)
    graft.activate(model, "second")
    only = logits(model)
    first.detach()
    assert torch.equal(logits(model), only) and not torch.equal(only, both)


def test_switched_off_and_on_again_keeps_the_place_in_the_chain():
    model = llama()
    for i, name in enumerate("abc"):
        move(graft.attach(model, "lora", "q_proj", name=name), seed=i)
    y = logits(model)
    a, b, c = graft.adapters(model).values()
    for adapter in (b, a, c):
        adapter.disable()
    for adapter in (c, a, b):
        adapter.enable()
    assert torch.equal(logits(model), y)
    assert model.model.layers[0].self_attn.q_proj.linked == ("a", "b", "c")


def test_each_adapter_is_trained_or_frozen_on_its_own():
    model = llama()
    a = move(graft.attach(model, "lora", name="a"))
    b = move(graft.attach(model, "lora", name="b"))
    a.requires_grad_(False)
    logits(model).sum().backward()
    assert all(p.grad is None for p in a.parameters())
    assert all(p.grad is not None for p in b.parameters())
    trainable = {id(p) for p in model.parameters() if p.requires_grad}
    assert trainable == {id(p) for p in b.parameters()}


def test_flags_come_back_when_adapters_leave_in_any_order():
    model = llama()
    model.model.embed_tokens.requires_grad_(False)
    before = picture(model)
    a, b = graft.attach(model, "lora", name="a"), graft.attach(model, "lora", name="b")
    a.detach()
    assert not any(p.requires_grad for n, p in model.named_parameters() if "deltas" not in n)
    b.detach()
    assert picture(model) == before


def test_two_adapters_have_a_head_of_their_own():
    model = bert()
    before, y = picture(model), logits(model)
    a = graft.attach(model, "lora", "query", heads="classifier", name="a")
    assert torch.equal(logits(model), y)  # a head starts as the base's
    move(a)
    ya = logits(model)
    a.disable()
    b = move(graft.attach(model, "lora", "value", heads="classifier", name="b"), seed=2)
    yb = logits(model)
    graft.activate(model, "a")
    assert torch.equal(logits(model), ya) and not torch.equal(ya, yb)
    graft.activate(model, "b")
    assert torch.equal(logits(model), yb)
    assert any(k.startswith("classifier:") for k in b.state_dict())
    a.detach()
    b.detach()
    assert picture(model) == before


def test_a_target_that_is_a_head_too_is_refused():
    with pytest.raises(graft.GraftError, match="classifier"):
        graft.attach(bert(), "lora", ["query", "classifier"], heads="classifier")


def test_hyperparameters_may_depend_on_the_site():
    model = llama()
    adapter = graft.attach(model, "lora", ["q_proj", "v_proj"], rank={r"layers\.0\..*": 2, "v_proj": 3, "*": 5})
    ranks = {path: d.A.shape[0] for path, d in adapter.deltas.items()}
    assert ranks == {
        "model.layers.0.self_attn.q_proj": 2,
        "model.layers.0.self_attn.v_proj": 2,
        "model.layers.1.self_attn.q_proj": 5,
        "model.layers.1.self_attn.v_proj": 3,
    }
    other = graft.attach(model, "lora", "q_proj", name="b", rank=lambda site: 1 + site.index)
    assert [d.A.shape[0] for d in other.deltas.values()] == [1, 2]
    with pytest.raises(graft.GraftError, match="rank must be int, at least 1, not 0"):
        graft.attach(model, "lora", "q_proj", name="c", rank={"q_proj": 0})


def test_the_seed_decides_the_start_and_leaves_the_generator_alone():
    state = torch.get_rng_state()
    one, same, other = (graft.attach(llama(), "lora", seed=s).state_dict() for s in (1, 1, 2))
    torch.manual_seed(0)
    llama()
    assert all(torch.equal(one[k], same[k]) for k in one)
    assert not all(torch.equal(one[k], other[k]) for k in one)
    torch.set_rng_state(state)
    model = llama()
    state = torch.get_rng_state()
    graft.attach(model, "lora")
    assert torch.equal(torch.get_rng_state(), state)


def test_a_module_that_occurs_twice_is_adapted_once_and_works_at_both_places():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.one = nn.Linear(6, 6)
            self.two = self.one

        def forward(self, x):
            return self.two(torch.tanh(self.one(x)))

    model, x = Twice(), torch.randn(2, 6)
    adapter = move(graft.attach(model, "lora", "two", rank=2))
    delta = next(iter(adapter.deltas.values()))
    w = delta.weight(model.one.weight)
    torch.testing.assert_close(model(x), F.linear(torch.tanh(F.linear(x, w, model.one.bias)), w, model.one.bias))
    plain = Twice()
    plain.load_state_dict(graft.merged_state_dict(model))
    torch.testing.assert_close(plain(x), model(x))


def test_tied_head_is_adapted_apart_from_the_embedding():
    model = llama(tie_word_embeddings=True)
    y = logits(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    adapter = move(graft.attach(model, "lora", "lm_head"))
    expect = logits(model)
    hidden = model.model(IDS).last_hidden_state
    w = adapter.deltas["lm_head"].weight(model.lm_head.weight)
    torch.testing.assert_close(expect, F.linear(hidden, w))
    with graft.merge(model):
        assert model.lm_head.weight is not model.model.embed_tokens.weight
        torch.testing.assert_close(logits(model), expect)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    plain = llama(tie_word_embeddings=False)
    plain.load_state_dict(graft.merged_state_dict(model))
    torch.testing.assert_close(logits(plain), expect)
    adapter.detach()
    assert torch.equal(logits(model), y)


def test_fused_projection_of_gpt2_is_one_matrix():
    model = gpt2()
    y = logits(model)
    adapter = move(graft.attach(model, "lora", "c_attn", rank=2))
    delta = adapter.deltas["transformer.h.0.attn.c_attn"]
    assert delta.B.shape == (96, 2) and delta.A.shape == (2, 32)
    expect = logits(model)
    plain = gpt2()
    plain.load_state_dict(graft.merged_state_dict(model))
    torch.testing.assert_close(logits(plain), expect)
    adapter.detach()
    assert torch.equal(logits(model), y)


def test_fused_experts_are_refused_by_name():
    transformers = pytest.importorskip("transformers")
    config = transformers.Qwen3MoeConfig(
        hidden_size=32, num_hidden_layers=1, intermediate_size=32, moe_intermediate_size=16, num_attention_heads=2,
        num_key_value_heads=2, num_experts=4, num_experts_per_tok=2, vocab_size=50, head_dim=16, decoder_sparse_step=1,
    )  # fmt: skip
    model = transformers.Qwen3MoeForCausalLM(config)
    experts = model.model.layers[0].mlp.experts
    if isinstance(experts, nn.ModuleList):
        pytest.skip("this version of transformers keeps experts as modules")
    before = picture(model)
    with pytest.raises((graft.GraftError, TypeError), match=r"model\.layers\.0\.mlp\.experts"):
        graft.attach(model, "lora", "experts")
    assert picture(model) == before


def test_instance_forward_of_accelerate_is_kept():
    from accelerate.hooks import ModelHook, add_hook_to_module

    class Count(ModelHook):
        calls = 0

        def pre_forward(self, module, *args, **kwargs):
            Count.calls += 1
            return args, kwargs

    model = llama()
    host = model.model.layers[0].self_attn.q_proj
    add_hook_to_module(host, Count())
    own, y = host.__dict__["forward"], logits(model)
    adapter = move(graft.attach(model, "lora", "q_proj"))
    before = Count.calls
    changed = logits(model)
    assert Count.calls == before + 1 and not torch.equal(changed, y)
    adapter.detach()
    assert torch.equal(logits(model), y) and host.__dict__["forward"] is own


def test_a_class_changed_after_us_is_not_taken_apart():
    class Half(nn.Module):
        def forward(self, w):
            return w / 2

    model = llama()
    adapter = graft.attach(model, "lora", "q_proj")
    nn.utils.parametrize.register_parametrization(model.model.layers[0].self_attn.q_proj, "weight", Half())
    with pytest.raises(graft.GraftError, match="its class became ParametrizedLinear"):
        adapter.detach()


def test_a_host_with_an_attribute_of_our_name_is_refused_and_nothing_stays():
    class Odd(nn.Linear):
        chain = 3

    model = nn.Sequential(nn.Linear(4, 4), Odd(4, 4))
    before = picture(model)
    with pytest.raises(graft.GraftError, match="'chain' of its own"):
        graft.attach(model, "lora", ["0", "1"], rank=2)
    assert picture(model) == before


class Int8Linear(nn.Module):
    def __init__(self, linear):
        super().__init__()
        self.in_features, self.out_features, self.bias = linear.in_features, linear.out_features, linear.bias
        scales = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("code", (linear.weight.detach() / scales).round().to(torch.int8))
        self.register_buffer("scales", scales)

    def forward(self, x):
        return F.linear(x, self.code.to(x.dtype)) * self.scales.T


class Int8Site(QuantisedSite, hosts=(Int8Linear,)):
    decoded = 0

    def decode(self):
        Int8Site.decoded += 1
        return self.module.code.to(self.module.scales.dtype) * self.module.scales


def test_quantised_hosts_are_not_decoded_on_the_activation_path():
    model = llama()
    for path, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and "lm_head" not in path:
            parent, _, child = path.rpartition(".")
            setattr(model.get_submodule(parent), child, Int8Linear(module))
    y = logits(model)
    move(graft.attach(model, "lora", "q_proj"))
    Int8Site.decoded = 0
    assert not torch.equal(logits(model), y)
    assert Int8Site.decoded == 0
    with pytest.raises(graft.GraftError, match="quantised"):
        graft.merged_state_dict(model)


def test_float32_masters_beside_a_bfloat16_base_keep_no_activation_twice():
    """What autograd keeps for LoRA's backward: the input once, in bfloat16, and rank-sized features."""
    host = nn.Linear(64, 64, bias=False, dtype=torch.bfloat16)
    model = nn.Sequential(host)
    adapter = graft.attach(model, "lora", "0", rank=4)
    x = torch.randn(32, 64, dtype=torch.bfloat16, requires_grad=True)
    kept = {}

    def pack(t):
        kept[t.untyped_storage().data_ptr()] = t
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = model(x)
    y.sum().backward()
    assert {p.dtype for p in adapter.parameters()} == {torch.float32}
    base = {host.weight.untyped_storage().data_ptr(), x.untyped_storage().data_ptr()}
    extra = sum(t.numel() * t.element_size() for k, t in kept.items() if k not in base)
    assert all(t.dtype == torch.bfloat16 for t in kept.values())
    assert extra <= 2 * (2 * 32 * 4 + 2 * 64 * 4)  # two rank-sized activations, A and B in bfloat16


def test_adapted_classes_look_like_their_hosts():

    model = llama()
    host = model.model.layers[0].self_attn.q_proj
    plain = (type(host).__name__, inspect.signature(type(host).forward), repr(host))
    graft.attach(model, "lora")
    assert isinstance(host, nn.Linear) and isinstance(host, Adapted)
    assert (type(host).__name__, inspect.signature(type(host).forward)) == plain[:2]


def test_names_and_unknown_adapters():
    model = llama()
    with pytest.raises(graft.GraftError, match="letters, digits"):
        graft.attach(model, "lora", name="../a")
    for name in ("update", "train", "training", "keys"):
        with pytest.raises(graft.GraftError, match=f"cannot be called '{name}'.* say {name}-1"):
            graft.attach(model, "lora", name=name)
        graft.attach(model, "lora", name=f"{name}-1").detach()
    graft.attach(model, "lora", name="a")
    with pytest.raises(graft.GraftError, match="has an adapter called 'a' already"):
        graft.attach(model, "lora", name="a")
    with pytest.raises(graft.GraftError, match="no adapter is called 'b'; the model has a"):
        graft.activate(model, "b")
    with pytest.raises(graft.GraftError, match=r"did you mean .*lora"):
        graft.attach(model, "loar", name="c")


def test_state_of_another_shape_is_refused_whole():
    model = llama()
    adapter = graft.attach(model, "lora", "q_proj", rank=2)
    before = {k: v.clone() for k, v in adapter.state_dict().items()}
    wrong = {k: torch.ones_like(v) for k, v in before.items()}
    key = list(wrong)[-1]
    for bad, words in [
        (wrong | {key: torch.ones(3, 3)}, "has shape"),
        ({k: v for k, v in wrong.items() if k != key}, "missing"),
        (wrong | {"x:y": torch.ones(1)}, "do not belong"),
    ]:
        with pytest.raises(graft.GraftError, match=words):
            adapter.load_state_dict(bad)
        assert all(torch.equal(v, before[k]) for k, v in adapter.state_dict().items())


def test_deep_copy_of_a_model_with_a_chain():
    model = llama()
    for i, name in enumerate("ab"):
        move(graft.attach(model, "lora", "q_proj", name=name), seed=i)
    twin = copy.deepcopy(model)
    y = logits(model)
    graft.adapters(twin)["a"].detach()
    assert torch.equal(logits(model), y) and not torch.equal(logits(twin), y)
    assert list(graft.adapters(twin)) == ["b"]


def test_the_core_needs_torch_and_safetensors_only():
    code = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("transformers", "accelerate", "datasets", "typer", "rich", "numpy_", "peft"):
            raise ImportError(f"{name} is blocked")
sys.meta_path.insert(0, Block())
import torch, tempfile, graft
model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))
x = torch.randn(3, 4)
adapter = graft.attach(model, graft.LoRA(rank=2))
torch.nn.init.normal_(adapter.parameters()[1])
y = model(x)
folder = tempfile.mkdtemp() + "/a"
adapter.save(folder)
adapter.detach()
graft.load(model, folder)
assert torch.equal(model(x), y)
merged = graft.merged_state_dict(model)
assert "transformers" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_table_without_an_entry_for_a_site_needs_a_default():
    class Sized(graft.Delta, name="sized"):
        def __init__(self, site, *, size: int, other: int = 3):
            super().__init__(site)
            self.gain = nn.Parameter(torch.full((size,), float(other)))

        def weight(self, w):
            return w * self.gain.mean()

    try:
        model = llama()
        with pytest.raises(graft.GraftError, match=r"sized: the table of size has no entry for .*k_proj, and size no"):
            graft.attach(model, "sized", ["q_proj", "k_proj"], size={"q_proj": 2})
        adapter = graft.attach(model, "sized", ["q_proj", "k_proj"], size={"q_proj": 2, "*": 4}, other={"q_proj": 1})
        assert [len(d.gain) for d in adapter.deltas.values()] == [2, 4, 2, 4]
        assert [d.gain[0].item() for d in adapter.deltas.values()] == [1, 3, 1, 3]
    finally:
        del METHODS["sized"]


def test_a_compiled_model_is_adapted_inside_and_runs_what_its_module_runs(tmp_path):
    model = llama()
    compiled = torch.compile(model, backend="eager")
    same = lambda: torch.equal(logits(compiled), logits(model))
    y = logits(compiled)
    lora = move(graft.attach(compiled, "lora", "q_proj"))
    assert not any("_orig_mod" in path for path in lora.deltas) and graft.adapters(compiled) == graft.adapters(model)
    on = logits(compiled)
    assert same() and not torch.equal(on, y)
    lora.save(tmp_path / "a")
    move(graft.attach(compiled, "prefix_tuning", length=3, name="prefix"))
    assert same() and not torch.equal(logits(compiled), on)
    graft.activate(compiled, "default")
    assert same() and torch.equal(logits(compiled), on)
    with graft.disabled(compiled):
        assert torch.equal(logits(compiled), y)
    with graft.merge(compiled):
        torch.testing.assert_close(logits(compiled), on)
    assert torch.equal(logits(compiled), on)
    for adapter in graft.adapters(compiled).values():
        adapter.detach()
    assert torch.equal(logits(compiled), y)
    graft.load(compiled, tmp_path / "a")
    assert torch.equal(logits(compiled), on)


def test_wrappers_that_shard_or_copy_are_refused():
    model = nn.DataParallel(llama())
    with pytest.raises(graft.GraftError, match="wrapped by DataParallel already: attach or load adapters before"):
        graft.attach(model, "lora", "q_proj")
    assert not graft.adapters(model.module)


class Images(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)
        self.second, self.plain = nn.Conv2d(6, 6, 3), nn.BatchNorm2d(6, affine=False)
        self.out = nn.Linear(6, 4)

    def forward(self, x):
        return self.out(self.plain(self.second(self.norm(self.first(x)).relu())).mean((2, 3)))


@pytest.mark.parametrize("method, targets", [("lora", ["first", "second"]), ("ln_tuning", "norm"), ("ssf", "norm")])
@pytest.mark.parametrize("heads", [(), "out", "plain"])
@pytest.mark.parametrize("training", [False, True])
def test_running_statistics_of_the_base_stay_as_they_are(method, targets, heads, training):
    torch.manual_seed(0)
    model = Images().train(training)
    model(torch.randn(5, 3, 8, 8))
    model.plain.train(False)
    before, buffers = picture(model), {n: b.clone() for n, b in model.named_buffers()}
    unchanged = lambda: all(torch.equal(b, buffers[n]) for n, b in model.named_buffers() if "deltas" not in n)
    first = graft.attach(model, method, targets, heads=heads, name="first")
    second = graft.attach(model, "lora", "out" if heads != "out" else "first", name="second")
    optimizer = torch.optim.SGD([*first.parameters(), *second.parameters()], 0.1)
    for _ in range(3):
        model.train()
        model(torch.randn(5, 3, 8, 8) + 3).square().sum().backward()
        optimizer.step()
        model.eval()
        model(torch.randn(2, 3, 8, 8))
    assert unchanged()
    twin = copy.deepcopy(model).train()
    twin(torch.randn(5, 3, 8, 8))
    assert all(torch.equal(b, buffers[n]) for n, b in twin.named_buffers() if "deltas" not in n)
    first.detach()
    model.train(training)(torch.randn(5, 3, 8, 8))
    second.detach()
    assert unchanged()
    assert [(p, t, a, c, f) for p, t, a, c, f, _ in picture(model)] == [(p, t, a, c, f) for p, t, a, c, f, _ in before]
    model.train()(torch.randn(5, 3, 8, 8))
    assert not torch.equal(model.norm.running_mean, buffers["norm.running_mean"])


class OwnArgument(nn.Module):
    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(4, 4)

    def forward(self, x, adapters=None):
        return self.proj(x) if adapters is None else self.proj(x) + adapters


def test_a_model_keeps_an_argument_of_its_own_called_adapters():
    model, x = OwnArgument(), torch.randn(2, 4)
    expect = model(x, adapters=1.0)
    graft.attach(model, "lora", "proj")
    assert torch.equal(model(x, adapters=1.0), expect)


def test_generate_looks_as_before():
    model = llama()
    before, doc = inspect.signature(model.generate), model.generate.__doc__
    adapter = graft.attach(model, "lora")
    assert inspect.signature(model.generate) == before and model.generate.__doc__ == doc
    adapter.detach()
    assert "generate" not in model.__dict__


@pytest.mark.parametrize("lacking", [{"passes_x": False}, {"factors": graft.Delta.factors}])
def test_a_method_served_by_factors_must_pass_x_and_have_factors(lacking):
    sound = {"by_factors": True, "passes_x": True, "factors": lambda self: (self.A, self.B)}
    with pytest.raises(graft.GraftError, match="Loose: by_factors = True also needs passes_x = True and factors"):
        type("Loose", (graft.Delta,), sound | lacking, name="loose")
    assert "loose" not in METHODS


@pytest.mark.parametrize("outside", ["dora", "apet"])
@pytest.mark.parametrize("inside", ["loreft", "tangent"])
def test_what_needs_the_matrix_beside_what_takes_the_host_for_any_module(inside, outside):
    """Attached later, it finds the matrix; outside of what changes no weight it is refused by a sentence."""
    where, small = ["model.layers.0.mlp.gate_proj"], METHODS[outside].small
    model, alone = llama(), llama()
    first = graft.attach(model, inside, where, name="first", **METHODS[inside].small)
    first.disable()
    move(graft.attach(model, outside, where, name="second", seed=3, **small), seed=4)
    move(graft.attach(alone, outside, where, name="second", seed=3, **small), seed=4)
    assert torch.equal(logits(model), logits(alone))
    graft.activate(model, "second", "first")
    logits(model)
    graft.activate(model, "first", "second")
    with pytest.raises(graft.GraftError, match=f"{inside} at {where[0]} changes no weight"):
        logits(model)
