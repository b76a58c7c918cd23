"""Supernets: what a path computes and trains, what it is read out as, and how paths are searched."""

import itertools
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import graft
import models
from graft.models import Base
from graft.searching.oneshot import ONESHOT, find, search
from graft.searching.oneshot.evolution import evolve
from graft.searching.oneshot.methods.glora import Supports
from graft.searching.oneshot.methods.noah import Depths
from graft.searching.oneshot.mixed import Space, mixed
from graft.searching.oneshot.supernet import Member, Supernet, blocks

LORA = [None, graft.LoRA(rank=2), graft.LoRA(rank=4, alpha=32.0), graft.LoRA(rank=3)]


def base(model):
    return Base("tiny", model, None)


def outputs(model):
    with torch.no_grad():
        return model(models.tokens()).logits


def supernet(kind, seed):
    """A supernet of a kind on a tiny model, with values away from where they start."""
    if kind == "glora":
        model = models.bert()
        members = {"glora": Member(Supports(2, True), "qv")}
    else:
        model = models.llama(layers=3)
        where = blocks(model)
        members = {
            "ranks": {"lora": Member(Space(LORA), "all-linear")},
            "several methods": {"any": Member(Space([*LORA, "ia3", graft.HiRA(rank=2)], where), "all-linear")},
            "tune and adapt": {
                "full": Member(Space([None, "full"], where), "mlp"),
                "lora": Member(Space(LORA, where), "all-linear"),
            },
            "noah": find("noah")(sizes=(1, 3)).members(base(model)),
        }[kind]
    net = Supernet(base(model), members, seed)
    for adapter in net.adapters.values():
        models.move(adapter)
    return net, model


KINDS = "ranks", "several methods", "tune and adapt", "noah", "glora"


@pytest.mark.parametrize("kind", KINDS)
@given(seed=st.integers(0, 2**16))
@settings(max_examples=5, deadline=None)
def test_a_path_computes_what_its_recipes_do_with_the_same_tensors(kind, seed):
    net, model = supernet(kind, seed)
    path = net.draw(random.Random(seed))
    net.use(path)
    there, found, count = outputs(model), net.found(path), net.parameters(path)
    inherited = {}
    for f, choice in enumerate(path):
        for d in net.deltas(f):
            parts = d.parts(choice[d.group])
            if parts:
                name = d.option(choice[d.group]).name
                inherited[name, d.site.path] = {n: t.detach().clone() for n, t in parts.items()}
    net.close()
    base_outputs = outputs(model)
    for number, (recipe, where) in enumerate(zip(found.recipes, found.targets)):
        plain = graft.attach(model, recipe, where, name=f"plain-{number}")
        assert list(plain.deltas) == where
        for at, delta in plain.deltas.items():
            delta.load_state_dict(inherited.pop((recipe.method.name, at)))
    assert not inherited
    assert count == sum(p.numel() for a in graft.adapters(model).values() for p in a.parameters())
    torch.testing.assert_close(outputs(model), there, rtol=1e-5, atol=1e-6)
    assert (there - base_outputs).abs().max() > 1e-5  # ten times what the comparison allows


def test_a_step_trains_the_slice_it_drew_and_nothing_else():
    model = models.llama()
    adapter = models.move(graft.attach(model, mixed(Space(LORA)), "qv"))
    paths = adapter.shared
    choice = (0, 1, 2, 3)
    paths.use(choice)
    model(models.tokens()).logits.square().sum().backward()
    for delta, k in zip(adapter.deltas.values(), choice):
        A, B = delta.largest["lora"].A, delta.largest["lora"].B
        rank = 0 if LORA[k] is None else LORA[k].hyper["rank"]
        if rank == 0:
            assert A.grad is None and B.grad is None
        else:
            assert A.grad[:rank].abs().min() > 0 and B.grad[:, :rank].abs().min() > 0
            assert not A.grad[rank:].any() and not B.grad[:, rank:].any()
    seen = set()
    for step in range(1, 40):
        adapter.step(step / 40)
        seen.add(paths.now)
        assert any(paths.now)
    assert {k for drawn in seen for k in drawn} == {0, 1, 2, 3}
    again = paths.now
    paths.use((1, 1, 1, 1))
    adapter.step(39 / 40)
    assert paths.now == again  # a run that goes on draws the same


def test_the_base_is_bit_identical_after_a_search():
    model = models.llama()
    before, there = {k: t.clone() for k, t in model.state_dict().items()}, outputs(model)
    with Supernet(base(model), {"lora": Member(Space(LORA), "qv"), "mlp": Member(Space([None, "pfeiffer"]))}) as net:
        models.move(net.adapters["lora"])
        assert not torch.equal(outputs(model), there)
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(t, before[k]) for k, t in model.state_dict().items())
    assert torch.equal(outputs(model), there) and all(p.requires_grad for p in model.parameters())


# Mixtures


@given(seed=st.integers(0, 2**16))
@settings(max_examples=5, deadline=None)
def test_padded_slices_make_one_lora_that_is_a_plain_one_where_one_option_is_certain(seed):
    options = [None, *(graft.LoRA(rank=r, alpha=2.0 * r) for r in (1, 3, 4))]
    model = models.llama()
    adapter = models.move(graft.attach(model, mixed(Space(options), "weights"), "qv"), seed=seed)
    paths = adapter.shared
    with torch.no_grad():
        paths.logits.copy_(torch.randn(paths.logits.shape))
    there, p = outputs(model), paths.probabilities()
    ranks = torch.tensor([0, 1, 3, 4])
    plain = {}
    for path, d in adapter.deltas.items():
        keep = (p[d.group][:, None] * (torch.arange(4) < ranks[:, None])).sum(
            0
        )  # of each row, sum of p_k with r_k > row
        own = d.largest["lora"]
        plain[path] = {"A": (keep[:, None] * own.A).detach(), "B": (own.B * keep).detach()}
    assert sum(t.numel() for d in adapter.deltas.values() for t in d.parameters()) == sum(
        t.numel() for own in plain.values() for t in own.values()
    )
    with torch.no_grad():
        paths.logits.copy_(1e3 * nn.functional.one_hot(torch.tensor([0, 1, 2, 3]), 4))
    certain = outputs(model)
    paths.use((0, 1, 2, 3))
    torch.testing.assert_close(outputs(model), certain, rtol=1e-5, atol=1e-6)
    adapter.detach()
    dense = graft.attach(model, options[-1], "qv")
    for path, delta in dense.deltas.items():
        delta.load_state_dict(plain[path])
    torch.testing.assert_close(outputs(model), there, rtol=1e-5, atol=1e-6)


def test_ranks_with_scalings_of_their_own_cannot_be_padded():
    with pytest.raises(graft.GraftError, match="proportion"):
        graft.attach(models.llama(), mixed(Space([graft.LoRA(rank=2), graft.LoRA(rank=4)]), "weights"), "qv")


def test_a_mixture_of_outputs_is_the_weighted_sum_of_what_each_option_gives():
    options = [None, graft.LoRA(rank=2), "ia3", graft.LoRA(rank=3)]
    host = nn.Sequential(nn.Linear(6, 5))
    adapter = models.move(graft.attach(host, mixed(Space(options), "outputs"), "0"))
    paths, x = adapter.shared, torch.randn(4, 6)
    with torch.no_grad():
        paths.logits.copy_(0.1 * torch.randn(1, 4))
    there, p = host(x), paths.probabilities()[0]
    each = []
    for k in range(4):
        paths.use((k,))
        each.append(host(x))
    torch.testing.assert_close(there, sum(q * y for q, y in zip(p, each)))


class Trial:
    """Losses of a regression, as `graft.fit` gives them to `review`."""

    def __init__(self, model, aside):
        self.model, self.aside, self.learning_rate = model, aside, 1e-2

    def gradients(self, parameters, aside=False):
        assert aside
        return list(torch.autograd.grad(loss(self.model, self.aside), parameters))


def loss(model, data):
    return (model(data[0]) - data[1]).square().mean()


def fitted(model, adapter, train, aside, steps=150):
    """Train a mixture on one part of the data, its logits on the other; the probabilities by group."""
    tuner = torch.optim.AdamW([p for p in adapter.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)
    for step in range(1, steps + 1):
        tuner.zero_grad()
        loss(model, train).backward()
        adapter.review(step / steps, Trial(model, aside))
        adapter.step(step / steps)
        tuner.step()
    return dict(zip(adapter.shared.groups, adapter.shared.probabilities().tolist()))


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 12))


def planted(change):
    """Train data and data aside of a network that differs from `network` by `change`."""
    teacher, x = network(), torch.randn(400, 12, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        change(teacher)
        y = teacher(x)
    return (x[:200], y[:200]), (x[200:], y[200:])


@pytest.mark.parametrize("layer", ["0", "2", "4"])
def test_the_softmax_moves_to_where_the_change_is(layer):
    def change(teacher):
        own = teacher[int(layer)].weight
        own += torch.outer(*torch.randn(2, 12, generator=torch.Generator().manual_seed(2)))

    model = network()
    adapter = graft.attach(model, mixed(Space([None, graft.LoRA(rank=2)]), "outputs"), ["0", "2", "4"])
    p = fitted(model, adapter, *planted(change))
    assert max(p, key=lambda group: p[group][1]) == layer


@pytest.mark.parametrize("kind, wanted", [("bias", "bitfit"), ("matrix", "lora")])
def test_the_softmax_moves_to_the_method_that_alone_can_fit(kind, wanted):
    def change(teacher):
        if kind == "bias":
            teacher[0].bias += torch.randn(12, generator=torch.Generator().manual_seed(2))
        else:
            teacher[0].weight += torch.outer(*torch.randn(2, 12, generator=torch.Generator().manual_seed(2)))

    model, options = network(), ["none", "bitfit", "lora"]
    recipe = mixed(Space([None, "bitfit", graft.LoRA(rank=2)]), "outputs")
    adapter = graft.attach(model, recipe, ["0"])
    p = fitted(model, adapter, *planted(change))["0"]  # its inputs have the mean 0, so that no matrix is like a bias
    assert options[p.index(max(p))] == wanted


def test_the_likeliest_path_under_a_cap_is_that_of_all_paths():
    model = models.llama()
    net = Supernet(base(model), {"lora": Member(Space(LORA[:3]), "qv", "outputs")})
    (paths,) = net.paths
    with torch.no_grad():
        paths.logits.copy_(torch.randn(4, 3, generator=torch.Generator().manual_seed(0)) / 10)
    p = paths.probabilities().log().tolist()
    every = [(choice,) for choice in itertools.product(range(3), repeat=4)]
    sizes = sorted({net.parameters(path) for path in every})
    for cap in [*sizes[1:], None]:
        legal = [path for path in every if 0 < net.parameters(path) <= (cap or sizes[-1])]
        best = max(legal, key=lambda path: sum(row[k] for row, k in zip(p, path[0])))
        assert net.likeliest(cap) == best
    with pytest.raises(graft.GraftError, match="raise the cap"):
        net.likeliest(sizes[1] - 1)


# Evolution


@given(seed=st.integers(0, 2**16))
@settings(max_examples=10, deadline=None)
def test_evolution_finds_the_best_of_the_paths_that_keep_to_the_cap(seed):
    rng, space = random.Random(seed), Space(LORA)
    gains = [[rng.random() for _ in range(4)] for _ in range(7)]
    costs = [[0, *(rng.randrange(1, 9) for _ in range(3))] for _ in range(7)]
    cap, asked = 20, []

    def total(table, path):
        return sum(row[k] for row, k in zip(table, path))

    def score(path):
        asked.append(path)
        return total(gains, path)

    found = evolve(
        lambda r: space.draw(7, r), lambda p, r: space.mutate(p, r, 0.2), lambda p, q, r: space.cross(p, q, r),
        score, lambda p: 0 < total(costs, p) <= cap, scored=800, seed=seed,
    )  # fmt: skip
    assert len(asked) == len(set(asked)) == len(found) <= 800  # of 16,384
    assert all(0 < total(costs, p) <= cap for p in asked)
    legal = [p for p in itertools.product(range(4), repeat=7) if 0 < total(costs, p) <= cap]
    best = max(legal, key=lambda p: total(gains, p))
    assert next(iter(found)) == best and [*found.values()] == sorted(found.values(), reverse=True)


def test_evolution_ends_where_there_is_nothing_new_and_where_nothing_is_legal():
    space = Space(LORA)
    arguments = (lambda r: space.draw(2, r), lambda p, r: p, lambda p, q, r: p, sum)
    assert len(evolve(*arguments, lambda p: True, scored=100)) == 15  # all but nothing twice
    assert evolve(*arguments, lambda p: False, scored=100) == {}


@given(seed=st.integers(0, 2**16))
@settings(max_examples=50, deadline=None)
def test_noah_has_sizes_in_the_first_blocks_only_whatever_evolution_does(seed):
    space, rng = Depths(LORA, (), (2, 5)), random.Random(seed)
    pool = [space.draw(6, rng) for _ in range(3)]
    for _ in range(20):
        pool.append(space.mutate(rng.choice(pool), rng, 0.9))
        pool.append(space.cross(rng.choice(pool), rng.choice(pool), rng))
    for choice in pool:
        depth = sum(k > 0 for k in choice)
        assert len(choice) == 6 and depth in (2, 5) and all(choice[:depth]) and not any(choice[depth:])


# Errors


@pytest.mark.parametrize(
    "options, message",
    [
        ([None, None], "all None"),
        ([graft.LoRA(rank=2), graft.LoRA(rank=4, bias=True), graft.LoRA(rank=5)], "no part"),
        ([graft.AdaLoRA()], "run of its own"),
        ([graft.VeRA()], "run of its own"),
        ([graft.LoRA(), graft.Houlsby()], "in common"),
    ],
)
def test_what_cannot_be_mixed_is_refused(options, message):
    with pytest.raises(graft.GraftError, match=message):
        graft.attach(models.llama(), mixed(Space(options)), "qv")


def test_an_unknown_search_or_setting_is_named():
    with pytest.raises(graft.GraftError, match="noah"):
        search("graft:sprout", "task:digits", method="noa")
    with pytest.raises(graft.GraftError, match="sizes"):
        search("graft:sprout", "task:digits", options={"size": 3})
    with pytest.raises(graft.GraftError, match="rank must be"):
        search("graft:sprout", "task:digits", method="glora", options={"rank": 0})
    assert {"noah", "nfts", "glora", "darts", "tanglenas"} <= ONESHOT.keys()


def test_an_option_that_trains_weights_themselves_is_refused_on_codes():
    model = graft.quantise(models.llama(layers=1), "int8")
    with pytest.raises(graft.GraftError, match=r"^mixed cannot work at .*: its weight is quantised"):
        graft.attach(model, mixed(Space([graft.LoRA(rank=2), "full"])), "q_proj")
    graft.attach(model, mixed(Space([graft.LoRA(rank=2), "ia3"])), "q_proj")
