"""Who gets how many steps within a budget, by a clock that only runs advance."""

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from made_up import configuration

from graft.comparison import budget, fitting
from graft.comparison.fitting import Fitting
from graft.comparison.live import Live
from graft.core.errors import GraftError
from graft.runs.store import Record

RATES = (1e-3, 1e-2, 1e-1)
METHODS = ("lora", "dora", "ia3", "bitfit", "vera")


SET_UP, SPLIT, ALSO = (
    0.1,
    0.2,
    0.3,
)  # of `fixed`: what begins a run, measuring a split, and what final runs measure beside


class Made:
    """Runs that nothing makes: beside its steps, one that measures three splits and all else takes `fixed` seconds."""

    def __init__(self, costs, losses, seconds, jobs=1, failing=()):
        self.costs, self.losses, self.failing, self.jobs = costs, losses, failing, jobs
        self.now, self.made, self.limits = 100.0, [], []
        names = ("no-op", "full-fine-tuning", *(m for m in METHODS if m in costs))
        rates = {m: (None,) if m == "no-op" else RATES for m in names}
        self.plans = [[configuration(rate, method=m, rows=512) for rate in rates[m]] for m in names]
        self.fitting = Fitting(self.plans, {"points": 8}, 3, 0, seconds, None, self.now, Path("nowhere"),
                               {"jobs": jobs}, Live(enabled=False))  # fmt: skip

    def run(self, wanted, store, *, jobs, limit=None, until=None):
        self.limits.append(limit)
        return [self.one(c) for c in wanted if until is None or self.now < until]

    def took(self, c):
        fixed, step = self.costs.get(c.method, self.costs["full-fine-tuning"])
        parts = SET_UP + SPLIT * len(c.splits) + ALSO * ("test" in c.splits)
        return parts * fixed + (c.training["steps"] * step if c.method != "no-op" else 0.0)

    def one(self, c):
        self.made.append(c)
        self.now += self.took(c) / self.jobs
        if c.method in self.failing:
            return Record(configuration=c, status="failed", reason="no way", seconds={"in_all": 0.1})
        fixed, step = self.costs[c.method]
        seconds = {"in_all": self.took(c), "training": c.training["steps"] * step, "step": step,
                   "measuring": SPLIT * fixed * len(c.splits)}  # fmt: skip
        loss = self.losses.get((c.method, c.training["learning_rate"]), 5.0)
        return Record(configuration=c, status="done", seconds=seconds, figures={"validation": [[8, 1.0, loss]]})

    def remaining(self, out, steps):
        """Seconds of the runs that a comparison makes then."""
        still = 0.0
        for plan in self.plans:
            if plan[0].method not in out:
                own = [fitting.training(c, steps=steps) for c in plan]
                still += sum(self.took(replace(c, splits=("train", "validation"))) for c in own)
                last = replace(own[0], splits=("validation", "test"))
                still += 3 * (
                    self.took(last)
                    if last.method != "no-op"
                    else self.took(last) - ALSO * self.costs["full-fine-tuning"][0]
                )
        return still / self.jobs


@pytest.fixture
def made(monkeypatch):
    def of(*args, **options):
        found = Made(*args, **options)
        monkeypatch.setattr(fitting.pool, "run", found.run)
        monkeypatch.setattr(fitting.time, "monotonic", lambda: found.now)
        return found

    return of


LOSSES = {("lora", 1e-2): 1.0, ("lora", 1e-1): 7.0, ("dora", 1e-3): 0.5, ("ia3", 1e-1): 2.0, ("bitfit", 1e-2): 1.5}
ALIKE = dict.fromkeys(("full-fine-tuning", *METHODS), (10.0, 0.1))


def test_where_too_few_steps_fit_for_all_the_best_ones_are_compared(made):
    of = made(ALIKE, LOSSES, 350.0)
    found = of.fitting.fitted()
    looks = [c for c in of.made if not c.splits and c.method != "full-fine-tuning"]
    assert [c.training["learning_rate"] for c in looks[: len(METHODS)]] == [RATES[-1]] * len(METHODS)
    assert sorted((c.method, c.training["learning_rate"]) for c in looks) == sorted(
        (m, r) for m in METHODS for r in RATES
    )
    assert {(c.training["steps"], c.rows, c.seed) for c in looks} == {(budget.TRIAL, 128, 0)}
    assert [r["method"] for r in found.screened] == ["dora", "lora", "bitfit", "ia3", "vera"]
    assert [(r["learning_rate"], r["loss"]) for r in found.screened[:2]] == [(1e-3, 0.5), (1e-2, 1.0)]
    assert [r["compared"] for r in found.screened] == [True, True, True, False, False]
    assert found.steps >= 32 and not found.unfit


def test_with_time_enough_nothing_is_screened(made):
    of = made(ALIKE, LOSSES, 2000.0)
    found = of.fitting.fitted()
    assert found.screened == [] and all(c.splits for c in of.made) and found.steps > 200
    assert of.now + of.remaining((), found.steps) <= 100 + budget.SHARE * 2000


def test_what_fails_or_is_no_number_goes_on_nowhere(made):
    of = made(ALIKE, LOSSES | {("vera", r): float("nan") for r in RATES}, 450.0, failing=("dora",))
    found = of.fitting.fitted()
    assert found.unfit == {"dora": "no way", "vera": "its loss is not a number"}
    assert [r["method"] for r in found.screened] == ["lora", "bitfit", "ia3"]
    assert sum(c.method == "dora" for c in of.made) == 1  # its other rates are not tried


def test_a_screening_run_has_a_limit(made):
    of = made(ALIKE | {"full-fine-tuning": (30.0, 0.1)}, LOSSES, 1200.0)
    of.fitting.fitted()
    assert of.limits[2] == of.limits[3] == pytest.approx(fitting.SLOW * (3 + 8 * 0.1)) and of.limits[0] is None


@pytest.mark.parametrize("methods, would_do", [(METHODS, "to screen the methods and compare the best one"),
                                               (METHODS[:1], "for 8 steps")])  # fmt: skip
def test_the_budget_that_the_refusal_names_does(made, methods, would_do):
    costs = dict.fromkeys(("full-fine-tuning", *methods), (10.0, 0.1))
    with pytest.raises(GraftError, match=would_do) as refusal:
        made(costs, LOSSES, 30.0).fitting.fitted()
    words = str(refusal.value).partition(" would do")[0].rpartition(" ")[2]
    found = made(costs, LOSSES, budget.seconds(words)).fitting.fitted()
    assert found.steps >= budget.TRIAL and bool(found.screened) == (len(methods) > 1)


@given(
    st.lists(st.tuples(st.floats(0.1, 20), st.floats(0.01, 1)), min_size=6, max_size=6),
    st.floats(10, 5000), st.integers(1, 3), st.randoms(),
)  # fmt: skip
def test_what_is_planned_keeps_within_the_budget(costs, seconds, jobs, draw):
    names = [(m, r) for m in METHODS for r in RATES]
    losses = dict(zip(names, map(float, draw.sample(range(len(names)), len(names)))))  # no two alike
    # What is dear in full is dear in a screening, and what is not trained costs what full fine-tuning does.
    by_name = dict(zip(("full-fine-tuning", *METHODS), costs))
    dearest = max(fixed for fixed, _ in costs)
    by_name = {m: (dearest, step) for m, (_, step) in by_name.items()}
    with pytest.MonkeyPatch.context() as patch:
        of = Made(by_name, losses, seconds, jobs)
        patch.setattr(fitting.pool, "run", of.run)
        patch.setattr(fitting.time, "monotonic", lambda: of.now)
        try:
            found = of.fitting.fitted()
        except GraftError:
            return
    out = {r["method"] for r in found.screened if not r["compared"]} | found.unfit.keys()
    kept = [r["method"] for r in found.screened if r["compared"]]
    if found.steps > budget.TRIAL:  # what a screening took is not thrown away for a little more time
        assert of.now - 100 + of.remaining(out, found.steps) <= budget.SHARE * seconds * (1 + 1e-9)
    if found.screened:
        looks = [c for c in of.made if not c.splits and c.method in METHODS]
        tried = {m: [losses[m, c.training["learning_rate"]] for c in looks if c.method == m] for m in METHODS}
        late = {m for m in METHODS if not tried[m]}  # where others took much longer than full fine-tuning
        assert found.unfit == dict.fromkeys(late, "the time for the screening was over")
        order = sorted(set(METHODS) - late, key=lambda m: min(tried[m]))
        assert kept and order[: len(kept)] == kept
        assert [r["tried"] for r in found.screened] == [len(tried[m]) for m in order]
        usual = sorted(order, key=lambda m: losses[m, 1e-1])  # the better ones get their other rates first
        assert sorted((len(tried[m]) for m in usual), reverse=True) == [len(tried[m]) for m in usual]
        assert found.steps >= fitting.MORE * budget.TRIAL or len(kept) == 1
