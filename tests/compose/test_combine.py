"""The algebra of adapters: its laws hold for every mergeable method on every host, checked on merged weights."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import graft
from graft.compose.change import LowRank, size, svd
from graft.core.delta import METHODS
from models import bert, gpt2, llama, move, picture, tokens
from test_contract import CASES, NAMES, WITH_WEIGHT, adapt, hosts, run, statistics

IDS = tokens()
ONTO_LORA = [(n, h) for n, h in WITH_WEIGHT if h not in ("layernorm", "rmsnorm")]
each_case = pytest.mark.parametrize("name, host", CASES)
each_weight = pytest.mark.parametrize("name, host", WITH_WEIGHT)
each_matrix = pytest.mark.parametrize("name, host", ONTO_LORA)
NEUTRAL = [(n, h) for n, h in WITH_WEIGHT if METHODS[n].neutral]


def change(model, *names):
    """What the adapters `names` add to every tensor of the base, together: read off merged weights."""
    base = graft.core.host.bare_copy(model).state_dict()
    graft.activate(model, *names)
    merged = graft.merged_state_dict(model)
    return {k: merged[k] - base[k] for k in base}


def same(found, expected, **tolerance):
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, msg=lambda m, key=key: f"{key}: {m}", **tolerance)


def weighted(parts):
    """The sum of w * change over (w, change)."""
    return {k: sum(w * part[k] for w, part in parts) for k in parts[0][1]}


def norm(parts):
    return math.sqrt(sum(t.square().sum().item() for t in parts.values()))


def lost(found, asked):
    return norm(weighted([(1, asked), (-1, found)])) / norm(asked)


def pair(name, host, other=None):
    """A model with the adapters default, of method `name`, and other, both away from their start."""
    _, model, target, x = hosts()[host]
    other = other or name
    stats = statistics(other, model, target, x)
    model, _ = adapt(name, model, target, x)
    move(graft.attach(model, other, target, name="other", stats=stats, **METHODS[other].small), 0.3, seed=2)
    return model, x


# Laws, for every method


@each_case
def test_weight_one_is_the_same_function_to_the_bit(name, host):
    _, model, target, x = hosts()[host]
    model, adapter = adapt(name, model, target, x)
    adapter.requires_grad_(False)
    y = run(model, x)
    done = graft.combine(model, {"default": 1.0})
    assert done.exact and done.error == 0 and done.adapter.active and not adapter.active
    assert torch.equal(run(model, x), y)
    assert done.adapter.recipe.method is adapter.recipe.method
    move(adapter)  # a copy, not the same tensors
    assert torch.equal(run(model, x), y)


@each_weight
def test_merging_a_sum_is_the_sum_of_merged_differences(name, host):
    other = "lora" if (name, host) in ONTO_LORA else "ssf"
    for second in (name, other):
        model, _ = pair(name, host, second)
        expected = weighted([(0.7, change(model, "default")), (-1.3, change(model, "other"))])
        done = graft.combine(model, {"default": 0.7, "other": -1.3})
        assert done.exact
        same(change(model, "combined"), expected, rtol=1e-6, atol=1e-9)


@each_weight
def test_sums_commute_and_nest(name, host):
    model, _ = pair(name, host)
    graft.combine(model, {"default": 0.5, "other": 2.0}, name="one")
    graft.combine(model, {"other": 2.0, "default": 0.5}, name="two")
    one = change(model, "one")
    same(change(model, "two"), one)
    graft.combine(model, {"one": -2.0, "other": 1.0}, name="nested")
    same(change(model, "nested"), weighted([(-1, change(model, "default")), (-3, change(model, "other"))]))


@each_weight
def test_an_adapter_less_itself_is_the_base(name, host):
    model, x = pair(name, host)
    base = run(graft.core.host.bare_copy(model), x)
    graft.combine(model, {"default": 1.0}, name="again")
    graft.combine(model, {"default": 1.0, "again": -1.0}, name="nothing")
    graft.activate(model, "nothing")
    torch.testing.assert_close(run(model, x), base)


@each_matrix
def test_every_method_becomes_a_lora_and_says_what_is_lost(name, host):
    model, x = pair(name, host)
    asked = change(model, "default")
    y = run(model, x)
    whole = graft.convert(model, "default", name="whole")
    assert whole.exact and whole.adapter.recipe.method is graft.LoRA
    torch.testing.assert_close(run(model, x), y)
    poor = graft.convert(model, "default", rank=1, name="poor")
    found = change(model, "poor")
    assert poor.error == pytest.approx(lost(found, asked), abs=1e-9)
    matrix = asked["host.weight"].flatten(1)
    best = torch.linalg.svdvals(matrix)[1:].norm()
    assert (found["host.weight"] - asked["host.weight"]).norm().item() == pytest.approx(best.item(), abs=1e-8)
    if "host.bias" in asked:
        torch.testing.assert_close(found["host.bias"], asked["host.bias"])


@pytest.mark.parametrize("name, host", NEUTRAL)
def test_a_method_that_is_linear_in_its_tensors_keeps_itself(name, host):
    model, _ = pair(name, host)
    done = graft.combine(model, {"default": 0.7, "other": -1.3})
    assert done.adapter.recipe.method is METHODS[name]
    assert {k: v.shape for k, v in done.adapter.state_dict().items()} == {
        k: v.shape for k, v in graft.adapters(model)["other"].state_dict().items()
    }


@pytest.mark.parametrize("name", [n for n in NAMES if not METHODS[n].mergeable()])
def test_what_is_no_change_of_weights_is_refused(name):
    host = next(h for n, h in CASES if n == name)
    model, _ = pair(name, host)
    for weights in ({"default": 0.5, "other": 0.5}, {"default": 0.5}):
        with pytest.raises(graft.GraftError, match=f"'default' cannot be combined: {name} is no change of weights"):
            graft.combine(model, weights)
    with pytest.raises(graft.GraftError, match="cannot be combined"):
        graft.convert(model, "default", rank=2)
    assert [*graft.adapters(model)] == ["default", "other"]


# Sums of low rank


class Two(nn.Sequential):
    """Two layers of different sizes."""

    def __init__(self):
        torch.manual_seed(0)
        super().__init__(nn.Linear(9, 7), nn.Embedding(6, 5))
        self.double()


LORAS = st.lists(
    st.tuples(st.integers(1, 12), st.floats(-20, 20), st.booleans(), st.sampled_from(["0", "1", "all"])),
    min_size=1,
    max_size=4,
)


@settings(max_examples=30, deadline=None)
@given(LORAS, st.data())
def test_loras_of_any_rank_alpha_and_place_add_up_in_factored_form(loras, data):
    model, parts, ranks = Two(), [], {"0": 0, "1": 0}
    for i, (rank, alpha, rslora, where) in enumerate(loras):
        targets = ["0", "1"] if where == "all" else [where]
        recipe = graft.LoRA(rank=rank, alpha=alpha, rslora=rslora)
        move(graft.attach(model, recipe, targets, name=f"a{i}"), 0.5, seed=i)
        for path in targets:
            ranks[path] += rank
    weights = {f"a{i}": data.draw(st.floats(-3, 3)) for i in range(len(loras))}
    parts = [(w, change(model, name)) for name, w in weights.items()]
    done = graft.combine(model, weights, "cat")
    assert done.exact and done.error == 0
    same(change(model, "combined"), weighted(parts))
    for path, delta in done.adapter.deltas.items():
        assert len(delta.A) == ranks[path] and delta.scaling == 1
    assert {*done.adapter.deltas} == {path for path, rank in ranks.items() if rank}


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 12), st.integers(0, 1000))
def test_the_svd_of_factors_is_that_of_their_product(rows, columns, rank, seed):
    generator = torch.Generator().manual_seed(seed)
    A = torch.randn(rank, columns, generator=generator, dtype=torch.float64)
    B = torch.randn(rows, rank, generator=generator, dtype=torch.float64)
    U, S, V = svd(LowRank(A, B))
    torch.testing.assert_close((U * S) @ V, B @ A)
    expected = torch.linalg.svdvals(B @ A)
    torch.testing.assert_close(S, expected[: len(S)])
    assert size(LowRank(A, B)) == pytest.approx((B @ A).norm().item())


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 5), st.integers(1, 5), st.integers(1, 8))
def test_a_truncated_sum_is_the_nearest_of_its_rank(first, second, rank):
    model = Two()
    for i, own in enumerate((first, second)):
        move(graft.attach(model, graft.LoRA(rank=own), ["0", "1"], name=f"a{i}"), 0.5, seed=i)
    asked = weighted([(0.5, change(model, "a0")), (0.5, change(model, "a1"))])
    done = graft.combine(model, {"a0": 0.5, "a1": 0.5}, rank=rank)
    found = change(model, "combined")
    for path in "01":
        missing = torch.linalg.svdvals(asked[f"{path}.weight"])[rank:].norm().item()
        own = asked[f"{path}.weight"]
        assert done.errors[path] == pytest.approx(missing / own.norm().item(), abs=1e-9)
        assert (own - found[f"{path}.weight"]).norm().item() == pytest.approx(missing, abs=1e-9)
    assert done.error == pytest.approx(lost(found, asked), abs=1e-9)
    assert done.exact == (rank >= min(first + second, 7))


# Other combinations


@pytest.mark.parametrize("method", ["ties", "dare", "dare_ties", "magnitude"])
@pytest.mark.parametrize("into", [None, "shira"])
def test_entrywise_combinations_are_of_the_whole_change(method, into):
    """Of B A, not of A and B apart, which is another function."""
    model = llama(torch.float64)
    move(graft.attach(model, "lora", "attention", rank=2, name="a"))
    move(graft.attach(model, "dora", "all-linear", rank=3, name="b"), seed=2)
    parts = [(0.8, change(model, "a")), (-0.4, change(model, "b"))]
    done = graft.combine(model, dict(a=0.8, b=-0.4), method, into=into, density=0.3, seed=5)
    assert done.exact
    found = change(model, "combined")
    torch.manual_seed(5)
    function = graft.compose.entrywise.find(method)
    for path in done.adapter.deltas:
        own = [w * part[f"{path}.weight"] for w, part in parts if part[f"{path}.weight"].any()]
        torch.testing.assert_close(found[f"{path}.weight"], function(own, density=0.3))
    if into:
        for path, delta in done.adapter.deltas.items():
            assert len(delta.value) == (found[f"{path}.weight"] != 0).sum()


def test_ties_into_a_lora_reports_what_the_rank_loses():
    model = llama(torch.float64)
    for i, name in enumerate("ab"):
        move(graft.attach(model, "lora", "attention", rank=2, name=name), seed=i)
    graft.combine(model, {"a": 1, "b": 1}, "ties", name="asked")
    asked = change(model, "asked")
    done = graft.combine(model, {"a": 1, "b": 1}, "ties", name="kept", rank=4)
    assert not done.exact and done.error == pytest.approx(lost(change(model, "kept"), asked))


# Biases, norms, heads, tied matrices


@pytest.mark.parametrize("make", [llama, gpt2, bert])
def test_everything_that_an_adapter_changes_takes_part(make):
    model = make(tie_word_embeddings=False).double()
    heads = {"heads": "classifier"} if make is bert else {}
    move(graft.attach(model, graft.LoRA(rank=2, rslora=True), name="a", **heads))
    move(graft.attach(model, "ssf", name="b", **heads), seed=2)
    move(graft.attach(model, "dora", ["all-linear", "embeddings"], name="c"), seed=3)
    weights = {"a": 0.5, "b": 1.5, "c": -1.0}
    expected = weighted([(w, change(model, n)) for n, w in weights.items()])
    for i, into in enumerate((None, "lora", "full")):
        done = graft.combine(model, weights, name=f"n{i}", into=into)
        assert done.exact
        same(change(model, f"n{i}"), expected, rtol=1e-5, atol=1e-8)
        plain = make(tie_word_embeddings=False).double()
        plain.load_state_dict(graft.merged_state_dict(model))
        torch.testing.assert_close(model(IDS).logits, plain(IDS).logits)
        if make is bert:
            assert "classifier" in dict(done.adapter.heads)
        done.adapter.detach()


def test_heads_of_one_task_are_averaged_from_the_base():
    model = bert().double()
    base = model.classifier.weight.detach().clone()
    for i, name in enumerate("ab"):
        move(graft.attach(model, "lora", "query", heads="classifier", name=name), seed=i)
    own = [a.deltas["classifier"].copy.weight for a in graft.adapters(model).values()]
    done = graft.combine(model, {"a": 0.5, "b": 0.25})
    torch.testing.assert_close(
        done.adapter.deltas["classifier"].copy.weight, base + 0.5 * (own[0] - base) + 0.25 * (own[1] - base)
    )


def test_a_matrix_inside_the_head_of_another_adapter_is_kept_with_the_head():
    model = bert().double()
    move(graft.attach(model, "lora", "query", heads="bert.pooler", name="a"))
    move(graft.attach(model, "dora", "bert.pooler.dense", name="b"), seed=2)
    expected = weighted([(0.5, change(model, "a")), (2.0, change(model, "b"))])
    done = graft.combine(model, {"a": 0.5, "b": 2.0})
    same(change(model, "combined"), expected)
    assert [path for path, _ in done.adapter.heads] == ["bert.pooler"]


def test_tied_matrices_change_alike():
    model = llama(torch.float64, tie_word_embeddings=True)
    for i, name in enumerate("ab"):
        move(graft.attach(model, graft.Tokens(tokens=(1, 4 + i)), name=name), seed=i)
    expected = weighted([(0.5, change(model, "a")), (0.5, change(model, "b"))])
    for into in ("lora", "shira", "full"):
        done = graft.combine(model, {"a": 0.5, "b": 0.5}, name=into, into=into)
        assert done.exact and {"model.embed_tokens", "lm_head"} == {*done.adapter.deltas}
        same(change(model, into), expected)
    ranks = {len(d.A) for d in graft.adapters(model)["lora"].deltas.values()}
    assert ranks == {3}


# Life


def test_the_result_runs_in_the_place_of_its_sources_and_leaves_as_it_came(tmp_path):
    model = llama()
    move(graft.attach(model, "lora", "q_proj", name="far"))
    before = picture(model)
    for i, name in enumerate("ab"):
        move(graft.attach(model, "dora", "q_proj", rank=2, name=name), seed=i)
    done = graft.combine(model, {"a": 0.5, "b": 0.5}, name="ab", rank=3)
    assert graft.core.registry.registry(model).active == ("far", "ab")
    assert not any(p.requires_grad for p in done.adapter.parameters())
    graft.activate(model, "ab")
    y = model(IDS).logits
    done.adapter.save(tmp_path / "ab")
    for name in ("ab", "a", "b"):
        graft.adapters(model)[name].detach()
    graft.activate(model, "far")
    assert picture(model) == before
    graft.adapters(model)["far"].detach()
    graft.load(model, tmp_path / "ab")
    assert torch.equal(model(IDS).logits, y)


def test_what_all_tasks_say_is_kept():
    model = llama()
    for name, task in (("a", {"objective": "causal-lm", "max_length": 8}), ("b", {"objective": "causal-lm"})):
        graft.attach(model, "lora", "q_proj", name=name).task = task
    assert graft.combine(model, {"a": 1, "b": 1}).adapter.task == {"objective": "causal-lm"}


def test_dare_is_drawn_from_the_seed_and_leaves_the_generator_alone():
    model = llama()
    move(graft.attach(model, "lora", "q_proj", name="a"))
    torch.manual_seed(3)
    state = torch.get_rng_state()
    for name, seed in (("x", 1), ("y", 1), ("z", 2)):
        graft.combine(model, {"a": 1.0}, "dare", name=name, seed=seed)
    assert torch.equal(torch.get_rng_state(), state)
    x, y, z = (change(model, n)["model.layers.0.self_attn.q_proj.weight"] for n in "xyz")
    assert torch.equal(x, y) and not torch.equal(x, z)


def test_a_half_precision_base_is_combined_in_float32():
    model, wide = llama(torch.bfloat16), llama(torch.bfloat16).float()
    for m in (model, wide):
        for i, name in enumerate("ab"):
            move(graft.attach(m, "dora", "q_proj", rank=2, name=name), seed=i)
        graft.combine(m, {"a": 0.5, "b": 0.5}, rank=3)
    ours, theirs = (graft.adapters(m)["combined"] for m in (model, wide))
    assert {p.dtype for p in ours.parameters()} == {torch.float32}
    for path, delta in ours.deltas.items():
        other = theirs.deltas[path]
        torch.testing.assert_close(delta.B @ delta.A, other.B @ other.A, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "arguments, options, says",
    [
        (({},), {}, "weights names no adapter; the model has a, b"),
        (({"c": 1},), {}, "no adapter is called 'c'; the model has a, b"),
        (({"a": float("nan")},), {}, "the weight of 'a' must be a number, not nan"),
        (({"a": 1, "b": 1}, "linear"), {}, "method is sum or cat or dare or .* not 'linear'"),
        (({"a": 1, "b": 1}, "ties"), {"density": 2}, "ties: density must be float, above 0 and at most 1, not 2"),
        (({"a": 1, "b": 1}, "sum"), {"density": 0.5}, "sum has no option 'density'"),
        (({"a": 1, "b": 1}, "magnitude"), {}, "magnitude needs density: share of the entries"),
        (({"a": 1, "b": 1}, "cat"), {}, "the change at .*q_proj has no low-rank factors"),
        (({"a": 1, "b": 1}, "cat"), {"rank": 2}, "cat puts factors side by side"),
        (({"a": 1, "b": 1},), {"into": "oft"}, "into is lora or shira or full, not 'oft'"),
        (({"a": 1, "b": 1},), {"into": "full", "rank": 2}, "a rank is for lora, not for full"),
        (({"a": 1, "b": 1},), {"rank": 0}, "rank must be int, at least 1, not 0"),
        (({"a": 1, "b": 1},), {"name": "a"}, "has an adapter called 'a' already"),
    ],
)
def test_what_cannot_be_is_refused_and_changes_nothing(arguments, options, says):
    model = llama()
    move(graft.attach(model, "lora", "q_proj", name="a"))
    move(graft.attach(model, "dora", "q_proj", name="b"))
    before, active = picture(model), graft.core.registry.registry(model).active
    with pytest.raises(graft.GraftError, match=says):
        graft.combine(model, *arguments, **options)
    assert picture(model) == before and graft.core.registry.registry(model).active == active


def test_more_refusals():
    model = gpt2()
    with pytest.raises(graft.GraftError, match="carries no adapter"):
        graft.combine(model, {"a": 1})
    for name in "ab":
        move(graft.attach(model, "bitfit", name=name))
    with pytest.raises(graft.GraftError, match=r'shira changes no bias, and that of .* choose into="lora"'):
        graft.combine(model, {"a": 1, "b": 1}, into="shira")
    with pytest.raises(graft.GraftError, match="the combination is no bitfit adapter"):
        graft.combine(model, {"a": 1, "b": 1}, "ties", into="bitfit")
    move(graft.attach(model, "ln_tuning", name="n"))
    with pytest.raises(graft.GraftError, match='no matrix changes, which lora could adapt: choose into="full"'):
        graft.convert(model, "n")
    with graft.merge(model), pytest.raises(graft.GraftError, match="merged into the base"):
        graft.combine(model, {"a": 1})
    with torch.no_grad():
        next(iter(graft.adapters(model)["a"].deltas.values())).c[0] = float("inf")
    with pytest.raises(graft.GraftError, match="'a' holds NaN or infinity: nothing was combined"):
        graft.combine(model, {"a": 0.5, "b": 0.5})


# Against PEFT


def as_peft(model, folder, *names):
    """The adapters of a llama in PEFT's own model."""
    peft = pytest.importorskip("peft")
    for name in names:
        graft.adapters(model)[name].save(folder / name, format="peft")
    theirs = peft.PeftModel.from_pretrained(llama(torch.float64), folder / names[0], adapter_name=names[0])
    for name in names[1:]:
        theirs.load_adapter(folder / name, adapter_name=name)
    return theirs


def peft_change(theirs, name):
    return {
        path.removeprefix("base_model.model."): m.get_delta_weight(name)
        for path, m in theirs.named_modules()
        if hasattr(m, "get_delta_weight") and name in m.lora_A
    }


@pytest.mark.parametrize("kind", ["cat", "svd"])
def test_plain_loras_combine_as_in_peft(tmp_path, kind):
    model = llama(torch.float64)
    move(graft.attach(model, graft.LoRA(rank=2, alpha=3.0), "qv", name="a"))
    move(graft.attach(model, graft.LoRA(rank=4, alpha=8.0), "qv", name="b"), seed=2)
    theirs = as_peft(model, tmp_path, "a", "b")
    theirs.add_weighted_adapter(["a", "b"], [0.5, 0.5], "c", kind, svd_rank=3)
    expected = peft_change(theirs, "c")
    assert expected
    done = graft.combine(model, {"a": 0.5, "b": 0.5}, rank=3 if kind == "svd" else None)
    mean = weighted([(0.5, change(model, "a")), (0.5, change(model, "b"))])
    found = change(model, "combined")
    for path, value in expected.items():
        torch.testing.assert_close(found[f"{path}.weight"], value)
        if kind == "cat":
            torch.testing.assert_close(found[f"{path}.weight"], mean[f"{path}.weight"])
    assert done.exact == (kind == "cat")


def test_peft_reads_what_was_combined(tmp_path):
    model = llama(torch.float64)
    move(graft.attach(model, graft.LoRA(rank=2, rslora=True), "qv", name="a"))
    move(graft.attach(model, "dora", "all-linear", rank=3, name="b"), seed=2)
    graft.combine(model, {"a": 0.5, "b": -0.5}, name="c", rank=4)
    move(graft.attach(model, graft.LoRA(rank=5), "attention", name="d"), seed=3)
    graft.combine(model, {"a": 2.0, "d": -0.5}, name="e")  # ranks 5 and 7
    theirs = as_peft(model, tmp_path, "c", "e")
    for name in ("c", "e"):
        graft.activate(model, name)
        theirs.set_adapter(name)
        torch.testing.assert_close(theirs(IDS).logits, model(IDS).logits)


def test_peft_does_not_give_an_rslora_back_for_weight_one(tmp_path):
    """Why sums here are of changes: PEFT writes the new scaling once for adapters that scale in other ways."""
    model = llama(torch.float64)
    move(graft.attach(model, graft.LoRA(rank=4, rslora=True), "qv", name="a"))
    theirs = as_peft(model, tmp_path, "a")
    theirs.add_weighted_adapter(["a"], [1.0], "b", "linear")
    path, value = next(iter(peft_change(theirs, "b").items()))
    expected = change(model, "a")[f"{path}.weight"]
    assert (value - expected).norm() > 0.1 * expected.norm()
    graft.combine(model, {"a": 1.0})
    torch.testing.assert_close(change(model, "combined")[f"{path}.weight"], expected)


def test_a_copy_of_the_model_keeps_its_own_combination():
    model = llama()
    move(graft.attach(model, "lora", "q_proj", name="a"))
    twin = copy.deepcopy(model)
    graft.combine(model, {"a": -1.0})
    assert [*graft.adapters(twin)] == ["a"]
