"""Searchers on functions whose best point is known, and their models against other ways to the same numbers."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graft.core.errors import GraftError
from graft.searching import gaussian, searchers
from graft.searching.outcome import Outcome, front
from graft.searching.searchers.autopeft import ROOM, hypervolume_improvement
from graft.searching.searchers.carbs import CARBS
from graft.searching.space import Alternative, Choice, Interval, Space, key

searchers.load()


def plane(values=None):
    """Two dimensions from 0 to 1, or of so many values."""
    domain = Interval(0.0, 1.0) if values is None else Choice(tuple(np.linspace(0, 1, values).tolist()))
    return Space([Alternative("all", ())], {"x": domain, "y": domain})


def bowl(point):
    return (point["x"] - 0.7) ** 2 + (point["y"] - 0.3) ** 2


def told(searcher, function, count, limit=None):
    """The losses of so many points; `limit` is a function whose values are to be 0 or less."""
    found = []
    while len(found) < count and (point := searcher.ask()) is not None:
        losses = function(point)
        over = {} if limit is None else {"memory": limit(point)}
        found.append((point, losses))
        cost = 1 + point.get("x", 0.0)
        searcher.tell(point, Outcome(losses if isinstance(losses, tuple) else (losses,), over, cost))
    return found


def regret(name, seeds, count=16):
    runs = (told(searchers.find(name)(plane(), seed=s), bowl, count) for s in range(seeds))
    return np.mean([min(loss for _, loss in run) for run in runs])


@pytest.mark.parametrize("name", ["config", "autopeft", "carbs", "tpe", "gp"])
def test_models_find_the_bottom_of_a_bowl_sooner_than_chance(name):
    if name in ("tpe", "gp"):
        pytest.importorskip("optuna")
    assert regret(name, 1 if name == "gp" else 2) < 0.5 * regret("random", 24)


@pytest.mark.parametrize("name", sorted(searchers.SEARCHERS))
def test_equal_seeds_and_answers_give_equal_points(name):
    if "optuna" in searchers.find(name).__module__:
        pytest.importorskip("optuna")
    made = [told(searchers.find(name)(plane(), seed=3), bowl, 9) for _ in range(2)]
    assert made[0] == made[1]
    assert made[0] != told(searchers.find(name)(plane(), seed=4), bowl, 9)


@pytest.mark.parametrize("name", ["random", "config", "autopeft", "carbs"])
def test_every_point_of_a_finite_space_is_asked_for_once_though_none_is_told(name):
    asked = searchers.find(name)(plane(4))
    for place in range(8):
        point = asked.ask()
        asked.tell(point, Outcome((float(place),), {}, 1.0))
    points = []
    while (point := asked.ask()) is not None:
        points.append(key(point))
    assert len(set(points)) == len(points) == 8 and asked.verdict == "every point of the space was tried"


def test_limits_are_kept_to_where_they_can_be_and_called_impossible_where_not():
    space = plane(20)
    kept = searchers.find("config")(space, limits=("memory",), seed=1)
    run = told(kept, bowl, 30, lambda p: p["x"] - 0.4)
    best = min((p for p, _ in run if p["x"] <= 0.4), key=bowl)
    right = min((p for p in space.points() if p["x"] <= 0.4), key=bowl)
    assert bowl(best) == pytest.approx(bowl(right)) and kept.verdict is None
    assert sum(p["x"] > 0.5 for p, _ in run[10:]) <= 3
    hopeless = searchers.find("config")(space, limits=("memory",), seed=1)
    tried = told(hopeless, bowl, 400, lambda p: 1.0 + 0.2 * p["x"])
    assert len(tried) < 60 and hopeless.verdict == "no point of the space is likely to keep to the limits"


def test_two_losses_give_more_area_than_chance():
    def pair(p):
        return p["x"] + 0.3 * p["y"], (1 - p["x"]) ** 2 + p["y"]

    def area(run):
        kept = sorted(loss for _, loss in run)
        total, height = 0.0, 2.0
        for a, b in kept:
            total += max(0.0, height - b) * (2 - a)
            height = min(height, b)
        return total

    mean = {
        name: np.mean([area(told(searchers.find(name)(plane(), seed=s, objectives=2), pair, 14)) for s in range(2)])
        for name in ("autopeft", "random")
    }
    assert mean["autopeft"] > mean["random"] + 0.02
    with pytest.raises(GraftError, match="autopeft takes 2 objectives, not 3"):
        searchers.find("autopeft")(plane(), objectives=3)


@settings(max_examples=8, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 6))
def test_the_improvement_of_the_hypervolume_is_what_sampling_says(seed, count):
    rng = np.random.default_rng(seed)
    losses, mean, deviation = rng.random((count, 2)), rng.random((3, 2)), 0.05 + 0.3 * rng.random((3, 2))
    found = hypervolume_improvement(mean[:, 0], deviation[:, 0], mean[:, 1], deviation[:, 1], losses)
    reference = losses.max(0) + ROOM * np.maximum(np.ptp(losses, axis=0), 1e-12)

    def area(points):
        total, height = 0.0, reference[1]
        for a, b in sorted(points):
            if a < reference[0] and b < height:
                total, height = total + (reference[0] - a) * (height - b), b
        return total

    drawn = mean[:, None, :] + deviation[:, None, :] * rng.standard_normal((3, 2000, 2))
    before = area(map(tuple, losses))
    for i in range(3):
        gains = [area([*map(tuple, losses), tuple(p)]) - before for p in drawn[i]]
        assert found[i] == pytest.approx(np.mean(gains), abs=5 * np.std(gains) / math.sqrt(2000) + 1e-4)


@pytest.mark.parametrize("sparse", [False, True])
def test_the_slope_of_the_density_and_the_posterior_are_right(sparse):
    from sklearn.gaussian_process import GaussianProcessRegressor
    from sklearn.gaussian_process.kernels import ConstantKernel, Matern

    rng = np.random.default_rng(0)
    x, new = rng.random((12, 3)), rng.random((5, 3))
    y = np.sin(5 * x[:, 0]) + 0.01 * rng.standard_normal(12)
    found = gaussian.GaussianProcess(x, y, sparse=sparse)
    lengths, variance, noise = found.lengths.copy(), found.variance, found.noise
    kernel = ConstantKernel(variance, "fixed") * Matern(lengths, "fixed", nu=2.5)
    other = GaussianProcessRegressor(kernel, alpha=noise + gaussian.JITTER).fit(x, (y - y.mean()) / y.std())
    mean, deviation = other.predict(new, return_std=True)
    got = found(new)
    assert got[0] == pytest.approx(y.mean() + y.std() * mean) and got[1] == pytest.approx(y.std() * deviation, rel=1e-4)
    assert lengths[0] < lengths[1:].min()  # the one that matters
    at = rng.normal(0, 0.5, 5 + sparse)
    slope = found._cost(at)[1]
    for i in range(len(at)):
        step = np.eye(len(at))[i] * 1e-5
        assert slope[i] == pytest.approx(
            (found._cost(at + step)[0] - found._cost(at - step)[0]) / 2e-5, rel=1e-4, abs=1e-5
        )


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=12))
def test_a_front_is_what_nothing_is_better_than(losses):
    places = front(losses)
    kept = [losses[i] for i in places]
    assert len(set(kept)) == len(kept)
    for point in losses:
        worse = any(o != point and o[0] <= point[0] and o[1] <= point[1] for o in losses)
        assert (point in kept) != worse


def test_the_front_of_loss_and_cost_begins_with_the_best_of_the_cheapest():
    costs = np.arange(10.0)
    losses = np.array([5.0, 4.0, 6.0, 3.0, 3.5, 3.0, 1.0, 2.0, 0.5, 9.0])
    assert CARBS.front(losses, costs) == [1, 3, 6, 8]


def test_what_costs_more_is_worth_it_only_where_it_is_better():
    """The best is dear, and the search must leave the cheap corner for it."""

    def dear(p):
        return (p["y"] - 0.4) ** 2 + 0.1 * (1 - p["x"])

    def run(name, seed):
        found = told(searchers.find(name)(plane(), seed=seed), dear, 18)
        return min(loss for _, loss in found)

    carbs = np.mean([run("carbs", s) for s in range(2)])
    assert carbs < np.mean([run("random", s) for s in range(8)])
