"""What other tasks say of the best point: the formula, that it helps where it is right, and that it does not bind."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

import graft
from graft import evidence
from graft.searching import searchers
from graft.searching.beliefs import Beliefs
from graft.searching.outcome import Outcome
from graft.searching.space import Space

RATES = "1e-4:1"
TEXTS = ["lora(rank=2|4|8|16)", "ia3", "bitfit"]


def table(**methods):
    """A table of the rates that were best; a negative one could be told from the best."""
    return {"rows": [{"method": m, "learning_rate": abs(r), "tie": r > 0} for m, r in methods.items()]}


TABLES = [table(lora=1e-2, ia3=-1e-1), table(lora=1e-3, ia3=-3e-1), table(lora=-3e-3, ia3=1e-2)]


def point(method, rate, **options):
    return {"method": method, "learning_rate": rate, f"{method}.targets": None} | options


def test_the_density_is_the_formula_and_references_are_no_methods():
    logs = {"lora": [-2.0, -3.0, math.log10(3e-3)], "ia3": [-1.0, math.log10(0.3), -2.0]}
    means = {m: np.mean(v) for m, v in logs.items()}
    within = sum(np.var(v) * 3 for v in logs.values()) / 4
    scales = dict.fromkeys(logs, math.sqrt(within * 4 / 3))
    means["bitfit"], q = np.mean(list(means.values())), {"lora": 3 / 5, "ia3": 2 / 5, "bitfit": 1 / 2}
    scales["bitfit"] = math.sqrt(np.var([means["lora"], means["ia3"]], ddof=1) * 1.5 + within)
    controls = [{"method": "zero-shot", "learning_rate": None, "tie": False},
                {"method": "full-fine-tuning", "learning_rate": 1e-9, "tie": True}]  # fmt: skip
    beliefs = Beliefs(Space.of(TEXTS, {"learning_rate": RATES}), [*TABLES, {"rows": controls}])
    found, wanted = [], []
    for name in means:
        for rate in (1e-4, 2e-3, 0.5):
            found.append(beliefs.density(point(name, rate)))
            wanted.append(math.log(q[name]) + stats.cauchy.logpdf(math.log10(rate), means[name], scales[name]))
            offset = (math.log10(rate) - means[name]) / math.sqrt(within)
            assert beliefs.offset(point(name, rate)) == pytest.approx(offset)
    assert np.diff(found) == pytest.approx(np.diff(wanted))


@given(st.floats(-3, 3), st.floats(1e-4, 1.0))
def test_what_is_believed_moves_with_the_rates(shift, rate):
    factor = 10**shift
    moved = [{"rows": [r | {"learning_rate": r["learning_rate"] * factor} for r in t["rows"]]} for t in TABLES]
    space = Space.of(TEXTS, {"learning_rate": RATES})
    here, there = Beliefs(space, TABLES), Beliefs(space, moved)
    for name in ("lora", "ia3", "bitfit"):
        a, b = point(name, rate), point(name, rate * factor)
        assert there.density(b) == pytest.approx(here.density(a), abs=1e-6)
        assert there.offset(b) == pytest.approx(here.offset(a), abs=1e-6)


def test_a_chain_has_the_means_of_its_methods():
    space = Space.of(["lora(rank=2|4)+ia3", *TEXTS], {"learning_rate": RATES})
    beliefs = Beliefs(space, TABLES)
    middle = (beliefs.known["lora"][0] + beliefs.known["ia3"][0]) / 2
    assert beliefs.offset(point("lora+ia3", 10**middle)) == pytest.approx(0.0, abs=1e-9)
    q = math.log((3 / 5 + 2 / 5) / 2) - 0.5 * math.log(beliefs.known["lora"][1])
    assert beliefs.density(point("lora+ia3", 10**middle)) == pytest.approx(q)


def run(function, tables, *, seed, count, texts=TEXTS, name="config", rates=RATES):
    searcher = searchers.find(name)(Space.of(texts, {"learning_rate": rates}), seed=seed, tables=tables)
    found = []
    for _ in range(count):
        asked = searcher.ask()
        assert asked is not None
        found.append((asked, function(asked)))
        searcher.tell(asked, Outcome((found[-1][1],), {}, 1.0))
    return found


def test_the_first_points_are_drawn_by_the_density():
    rates = "1e-4|1e-3|1e-2|1e-1"
    space = Space.of(TEXTS, {"learning_rate": rates})
    points, beliefs = list(space.points()), Beliefs(space, TABLES)
    share = np.exp([beliefs.density(p) for p in points])
    share /= share.sum()
    drawn = [run(lambda p: 0.0, TABLES, seed=s, count=1, rates=rates)[0][0] for s in range(500)]
    counts = np.array([drawn.count(p) for p in points])
    assert stats.chisquare(counts, 500 * share).pvalue > 1e-3
    assert stats.chisquare(counts).pvalue < 1e-6  # not evenly


@pytest.mark.parametrize("tables", [[table(lora=1e-2)], [table(lora=1e-2), table(lora=1e-3)],
                                    [table(lora=1e-2, ia3=0.1), table(lora=1e-2, ia3=0.1)]])  # fmt: skip
def test_tables_that_say_nothing_leave_a_search_as_it_is(tables):
    def loss(p):
        return (math.log10(p["learning_rate"]) + 2) ** 2

    assert not Beliefs(Space.of(TEXTS, {"learning_rate": RATES}), tables)
    assert run(loss, tables, seed=1, count=7) == run(loss, [], seed=1, count=7)


def valley(usual):
    """A loss that is 0 at a rate of its own for each method, lora being the best."""

    def loss(p):
        away = math.log10(p["learning_rate"]) - math.log10(usual[p["method"]])
        return min(4.0, away**2) + {"lora": 0.0, "ia3": 0.3, "bitfit": 0.2}[p["method"]]

    return loss


USUAL = {"lora": 4e-3, "ia3": 5e-2, "bitfit": 1e-2}


def regret(name, tables, count):
    runs = [run(valley(USUAL), tables, seed=s, count=count, name=name) for s in range(3)]
    return np.mean([min(loss for _, loss in found) for found in runs])


@pytest.mark.parametrize("name", ["config", "autopeft", "carbs"])
def test_right_beliefs_find_sooner(name):
    assert regret(name, TABLES, 5) < 0.5 * regret(name, [], 5)


@pytest.mark.parametrize("factor", [0.1, 30])
def test_wrong_beliefs_are_given_up(factor):
    """All rates are wrong by so much."""
    wrong = [{"rows": [r | {"learning_rate": r["learning_rate"] * factor} for r in t["rows"]]} for t in TABLES]
    assert regret("config", wrong, 20) < 0.05


def test_equal_options_of_two_methods_are_the_same_numbers():
    space = Space.of(["lora(rank=2|4|8) on attention|mlp", "dora(rank=2|4|8) on mlp|all-linear", "vera(rank=2|4)"], {})
    made = {(p["method"], p.get("lora.rank", p.get("dora.rank", p.get("vera.rank"))),
             p[f"{p['method']}.targets"]): space.encode(p) for p in space.points()}  # fmt: skip

    def apart(a, b):
        return math.dist(made[a], made[b]) ** 2

    for rank in (2, 4, 8):
        assert apart(("lora", rank, "mlp"), ("dora", rank, "mlp")) == pytest.approx(1)  # the method alone
        assert apart(("lora", rank, "attention"), ("dora", rank, "all-linear")) == pytest.approx(2)
    assert apart(("lora", 2, "mlp"), ("dora", 8, "mlp")) == pytest.approx(1 + (2 / 3) ** 2)
    assert len({tuple(v) for v in made.values()}) == len(made) == 14


def test_a_search_knows_the_tables_where_they_speak_of_its_objective(bases, reviews, here, tmp_path, monkeypatch):
    seen = []

    class Spy(searchers.find("random")):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            seen.append(self.tables)

    monkeypatch.setitem(searchers.SEARCHERS, "random", Spy)
    small = dict(steps=1, batch_size=4, rows=6, validation=0.25, test=0.25, seeds=(0,), trials=1, progress=False)
    for objective in ("quality", "parameters"):
        graft.search(bases / "bert", reviews, space=["ia3"], searcher="random", objective=[objective],
                     output=tmp_path / objective, **small)  # fmt: skip
    assert seen == [evidence.tables(), []] and evidence.tables()
