"""What texts mean, and that points, numbers and runs belong together."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import graft
from graft.core.errors import GraftError
from graft.core.recipe import Recipe
from graft.core.targets import resolve
from graft.runs.configuration import Configuration
from graft.runs.single import recipes
from graft.searching.space import Choice, Interval, Space, key

COMMON = Configuration(base="tiny", task="rewrites", method="", training={"steps": 3})


def llama(blocks=4):
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = dict(hidden_size=16, intermediate_size=24, num_attention_heads=2, vocab_size=20)
    return LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=blocks))


@given(st.floats(1e-6, 1e3), st.floats(1.01, 1e6), st.floats(0, 1), st.booleans())
def test_a_share_of_an_interval_is_a_value_in_it_and_back(low, factor, share, whole):
    domain = Interval(*((round(low), round(low * factor)) if whole else (low, low * factor)), whole)
    value = domain.at(share)
    assert domain.low <= value <= domain.high and isinstance(value, int) == whole
    assert 0 <= domain.share(value) <= 1 and domain.at(domain.share(value)) == pytest.approx(value, rel=1e-5)
    if whole and domain.high - domain.low < 50:
        assert {domain.at(s) for s in np.linspace(0, 1, 5001)} <= set(range(int(domain.low), int(domain.high) + 1))


def test_wide_intervals_are_even_in_the_logarithm():
    assert Interval(1e-4, 1e-2).at(0.5) == pytest.approx(1e-3) and Interval(1.0, 3.0).at(0.5) == 2.0
    even = [Choice((4, 8, 16)).at(s) for s in np.linspace(0, 1, 3000, endpoint=False)]
    assert [even.count(v) for v in (4, 8, 16)] == [1000] * 3


SPACE = ["lora(rank=4|8) on attention|mlp", "lora(rank=2:64, init=random|orthogonal)", "ia3"]


def test_texts_name_the_dimensions():
    space = Space.of(SPACE, {"learning_rate": "1e-4:1e-2", "schedule": "linear|cosine"})
    assert {k: (d.domain, d.owner) for k, d in space.dimensions.items()} == {
        "method": (Choice(("lora", "lora#2", "ia3")), None),
        "lora.rank": (Choice((4, 8)), "lora"),
        "lora.targets": (Choice(("attention", "mlp")), "lora"),
        "lora#2.rank": (Interval(2, 64, True), "lora#2"),
        "lora#2.init": (Choice(("random", "orthogonal")), "lora#2"),
        "lora#2.targets": (Choice((None,)), "lora#2"),
        "ia3.targets": (Choice((None,)), "ia3"),
        "learning_rate": (Interval(1e-4, 1e-2), None),
        "schedule": (Choice(("linear", "cosine")), None),
    }
    c = space.configuration({"method": "lora#2", "lora#2.rank": 5, "lora#2.init": "orthogonal", "lora#2.targets": None,
                             "learning_rate": 2e-3, "schedule": "cosine"}, COMMON)  # fmt: skip
    assert recipes(c) == [Recipe.of("lora", rank=5, init="orthogonal")] and c.targets is None
    assert c.training == {"steps": 3, "learning_rate": 2e-3, "schedule": "cosine"}


@given(st.integers(0, 10**6))
def test_points_have_the_dimensions_of_their_method_and_different_ones_other_numbers(seed):
    space = Space.of(SPACE, {"learning_rate": "1e-4:1e-2"})
    rng = np.random.default_rng(seed)
    one = space.random(rng)
    other = space.near(one, rng, 0.3)
    for point in (one, other):
        own = {k for k, d in space.dimensions.items() if d.owner in (None, point["method"])}
        assert point.keys() == own and space.configuration(point, COMMON).id
        x = space.encode(point)
        assert ((x >= 0) & (x <= 1)).all()
    assert (key(one) == key(other)) == (space.encode(one) == space.encode(other)).all()


def test_all_points_of_a_finite_space_are_there_once():
    space = Space.of([SPACE[0], "ia3"], {"learning_rate": "1e-3|1e-2|1e-1"})
    points = list(space.points())
    assert space.size == len(points) == len({key(p) for p in points}) == (4 + 1) * 3
    assert np.isinf(Space.of(SPACE, {"learning_rate": "1e-3:1e-2"}).size)
    rng = np.random.default_rng(0)
    assert {key(space.random(rng)) for _ in range(500)} == {key(p) for p in points}


def test_ranks_by_block_are_the_ranks_of_the_matrices_of_the_block():
    model = llama()
    space = Space.of(["lora(rank=0|2|5 per block) on attention"], {}, model)
    point = {"method": "lora", "lora.targets": "attention"} | {f"lora.rank.{i}": r for i, r in enumerate([2, 0, 5, 2])}
    c = space.configuration(point, COMMON)
    adapter = graft.attach(model, recipes(c)[0], c.targets)
    ranks = {path: delta.A.shape[0] for path, delta in adapter.deltas.items()}
    expected = {path: [2, 0, 5, 2][int(path.split(".")[2])] for path, _ in resolve(llama(), "attention")}
    assert ranks == {path: rank for path, rank in expected.items() if rank}


@given(st.lists(st.booleans(), min_size=3, max_size=3), st.sampled_from([0, 4]), st.sampled_from([0, 3]))
def test_switches_take_all_methods_of_a_chain_off_their_blocks(on, size, length):
    model = _LLAMA
    space = Space.of(["pfeiffer(size=0|4)+prefix_tuning(length=0|3) in any 2 blocks"], {}, model)
    name = "pfeiffer+prefix_tuning"
    point = {"method": name, f"{name}.pfeiffer.size": size, f"{name}.prefix_tuning.length": length}
    point |= {f"{name}.{m}.targets": None for m in ("pfeiffer", "prefix_tuning")}
    point |= {f"{name}.block.{i}": int(v) for i, v in enumerate(on)}
    if not any(on) or not (size or length):
        with pytest.raises(GraftError, match="nothing is adapted"):
            space.configuration(point, COMMON)
        return
    c = space.configuration(point, COMMON)
    blocks = {i for i in range(5) if on[i // 2]}
    for recipe in recipes(c):
        where = (c.targets or {}).get(recipe.method.name) if size and length else c.targets
        hosts = resolve(model, where or recipe.method.targets, recipe.method.hosts)
        assert {int(path.split(".")[2]) for path, _ in hosts} == blocks
    assert len(recipes(c)) == bool(size) + bool(length)


torch.manual_seed(0)
_LLAMA = llama(5)


@pytest.mark.parametrize(
    "text, said",
    [("lora(rank=4|eight)", "rank must be"), ("lora(4)", "no option with values"), ("", "names no method"),
     ("lora+lora", "lora twice in one chain"), ("lora(rank=8:4)", "lower end first"), ("lora(rank=)", "no values")],
)  # fmt: skip
def test_what_cannot_be_read_is_one_sentence(text, said):
    with pytest.raises(GraftError, match=said):
        Space.of([text], {})
