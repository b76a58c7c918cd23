"""Runs as trials of Ray Tune: stand-ins that die or are stopped, and the runs of a search."""

import json
import logging
import os
import random
import signal
from dataclasses import replace

import numpy as np
import pytest
from made_up import COMMON, record

from graft.comparison import task_of
from graft.core.errors import GraftError
from graft.runs.reference import tuning
from graft.runs.single import perform
from graft.runs.store import Store
from graft.searching import searchers
from graft.searching.fits import Fits
from graft.searching.space import Space
from graft.searching.study import Study

pytest.importorskip("ray")
pytestmark = pytest.mark.slow


def study(space, at_most, steps=8, objectives=("loss",)):
    class Any_(Fits):
        def refused(self, configuration):
            return None

    common = replace(COMMON, training={"steps": steps})
    asked = searchers.find("random")(space, seed=0)
    return Study(space, asked, common, Any_(common, {}), objectives,
                 at_most=at_most, seconds=None, reserved=1, jobs=2)  # fmt: skip


def stand_in(place, work, fate):
    """A trial whose loss is its learning rate, after the points of a curve; it notes that it began."""
    wanted = [work.space.configuration(p, work.common) for p in work.space.points()]
    records = {c.id: replace(record(loss=c.training["learning_rate"]), configuration=c).json() for c in wanted}
    known = {c.training["learning_rate"]: records[c.id] for c in wanted}

    def made(asked):
        from ray import tune

        training = asked["configuration"]["training"]
        rate = training["learning_rate"]
        with open(place / "begun", "a") as file:
            file.write(f"{rate}\n")
        before = (place / "begun").read_text().split().count(str(rate)) > 1
        for step in range(1, training["steps"] + 1):
            if step == 2 and rate < 0.05 and (fate == "always" or (fate == "killed" and not before)):
                os.kill(os.getpid(), signal.SIGKILL)
            tune.report({"step": step, "loss": rate, "record": ""})
        tune.report({"step": 99, "loss": rate, "record": known[rate]})

    return made


@pytest.fixture(scope="module", autouse=True)
def cluster():
    """Ray on this machine, whose workers do not give way to all else."""
    import ray

    os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    yield
    ray.shutdown()


@pytest.fixture
def engine(monkeypatch, tmp_path):
    from graft.searching.engines import ray as engine

    def run(work, fate, **options):
        monkeypatch.setattr(engine, "made", stand_in(tmp_path, work, fate))
        engine.run(work, tmp_path / "store", threads=1, tell=False, **{"jobs": 2, **options})
        return [float(line) for line in (tmp_path / "begun").read_text().split()], Store(tmp_path / "store").records()

    return run


RATES = "0.01|0.07|0.08|0.09"


def test_a_run_whose_worker_is_killed_is_made_again_and_counted_once(engine):
    work = study(Space.of(["lora"], {"learning_rate": RATES}), 4)
    begun, records = engine(work, "killed")
    assert {r: begun.count(r) for r in begun} == {0.01: 2, 0.07: 1, 0.08: 1, 0.09: 1}
    assert len(records) == 4 == len(work.trials) and all(r.done for r in records)
    assert sorted(t.outcome.losses[0] for t in work.trials) == [0.01, 0.07, 0.08, 0.09]

    again = study(Space.of(["lora"], {"learning_rate": RATES}), 4)
    assert len(engine(again, "none")[0]) == 5 and len(again.trials) == 4  # nothing begins that is there


def test_a_run_that_always_kills_its_worker_is_a_record_and_the_others_go_on(engine):
    work = study(Space.of(["lora"], {"learning_rate": "0.01|0.07|0.09"}), 3)
    begun, records = engine(work, "always")
    assert begun.count(0.01) == 3 and len(begun) == 5
    assert {r.configuration.training["learning_rate"]: r.reason for r in records} == {
        0.01: "its worker died, again and again", 0.07: None, 0.09: None
    }  # fmt: skip


def test_the_worse_half_is_stopped_early(engine):
    rates = "|".join(str(r) for r in np.linspace(0.05, 0.5, 6).round(3))
    work = study(Space.of(["lora"], {"learning_rate": rates}), 6)
    _, records = engine(work, "none", scheduler="asha", jobs=1)  # one after the other, always the same ones are stopped
    stopped = {r.configuration.training["learning_rate"] for r in records if not r.done}
    assert stopped and all("stopped by the scheduler after" in r.reason for r in records if not r.done)
    assert 0.05 not in stopped and 0.5 in stopped and len(records) == 6


def test_a_search_under_ray_makes_the_runs_of_a_search(bases, reviews, tmp_path):
    import graft

    given = dict(steps=2, batch_size=4, rows=6, validation=0.25, test=0.25, seeds=(0,), progress=False,
                 space=["lora(rank=1|2)"], learning_rate="1e-2", searcher="random")  # fmt: skip
    here = graft.search(bases / "bert", reviews, **given, output=tmp_path / "a")
    there = graft.search(bases / "bert", reviews, **given, engine="ray", jobs=2, output=tmp_path / "b")
    assert {r["id"]: r["loss"] for r in here.rows} == {r["id"]: r["loss"] for r in there.rows}
    assert json.loads((tmp_path / "b" / "results.json").read_text())["best"][0]["test"] == here.best[0]["test"]


def killed_once(place):
    """A member of a population whose worker dies once, after a point of its curve; it notes its reports."""

    def member(config):
        from ray import tune

        from graft.searching import population

        report = tune.report

        def told(metrics, **checkpoint):
            report(metrics, **checkpoint)
            with open(place / "reports", "a") as file:
                file.write(f"{metrics['step']} {bool(metrics['record'])}\n")
            if len((place / "reports").read_text().splitlines()) == 4:
                os.kill(os.getpid(), signal.SIGKILL)

        tune.report = told
        try:
            population.member(config)
        finally:
            tune.report = report

    return member


def test_a_member_of_a_population_is_the_run_that_its_record_says(bases, reviews, tmp_path, monkeypatch):
    from graft.searching import population
    from graft.searching.engines import ray as engine

    made = task_of(reviews, tmp_path, {"validation": 0.25, "test": 0.25})
    ((common,),) = tuning(made, method=["lora"], base=str(bases / "bert"), learning_rates=[1e-3], steps=6, batch_size=4)
    common = replace(common, also={"points": 3})
    space = Space.of(["lora(rank=1|2)"], {"learning_rate": "1e-4:1e-1"})

    def work():
        asked = searchers.find("random")(space, seed=0)
        return Study(space, asked, common, Fits(common, {}), ("loss",),
                     at_most=3, seconds=None, reserved=1, jobs=1)  # fmt: skip

    random.seed(0)
    real, first = population.member, work()
    monkeypatch.setattr(population, "member", killed_once(tmp_path))
    # Each member takes both processors, so that they take turns in the same order on any machine.
    options = {"jobs": 1, "threads": 2, "tell": False, "scheduler": "pbt"}
    engine.run(first, tmp_path / "runs", **options)
    monkeypatch.setattr(population, "member", real)
    reports = (tmp_path / "reports").read_text().split()
    assert reports.count("True") == 3 == len(first.trials) == len(first.known) and not first.running
    records = [t.record for t in first.trials if t.record]
    assert len(records) == 3 and all(r.done for r in records)
    changed = [r for r in records if r.configuration.training.get("rate_changes")]
    assert changed
    for r in records:
        alone = perform(r.configuration)
        assert alone.metrics == r.metrics and alone.curve == r.curve

    again = work()
    monkeypatch.setattr(population, "member", None)
    engine.run(again, tmp_path / "runs", **options)
    assert {t.record.json() for t in again.trials if t.record} == {r.json() for r in records}
    assert again.spent == pytest.approx(sum(r.seconds["in_all"] for r in records))


def test_a_member_that_always_kills_its_worker_is_a_record_and_the_others_go_on(tmp_path, monkeypatch):
    from graft.searching import population
    from graft.searching.engines import ray as engine

    work = study(Space.of(["lora"], {"learning_rate": "0.01|0.07|0.09"}), 3)
    work.common = replace(work.common, also={"points": 2})
    wanted = [work.space.configuration(p, work.common) for p in work.space.points()]
    known = {c.training["learning_rate"]: replace(record(), configuration=c).json() for c in wanted}

    def member(config):
        from ray import tune

        rate = config["member"]["rate"]
        if rate < 0.05:
            os.kill(os.getpid(), signal.SIGKILL)
        tune.report({"step": 0, "loss": 1.0, "record": known[rate]})

    monkeypatch.setattr(population, "member", member)
    engine.run(work, tmp_path / "runs", jobs=2, threads=1, tell=False, scheduler="pbt")
    assert {t.configuration.training["learning_rate"]: t.outcome.reason for t in work.trials if t.configuration} == {
        0.01: "its worker died, again and again", 0.07: None, 0.09: None
    }  # fmt: skip
    assert len(Store(tmp_path / "runs").records()) == 3 and not work.running


def test_a_population_needs_its_size_and_several_rates(tmp_path):
    from graft.searching.engines import ray as engine

    for rates, trials, said in (("0.01|0.1", None, "set trials"), ("0.01", 2, "several values")):
        work = study(Space.of(["lora"], {"learning_rate": rates}), trials)
        work.common = replace(work.common, also={"points": 2})
        with pytest.raises(GraftError, match=said):
            engine.run(work, tmp_path / "runs", jobs=1, threads=1, tell=False, scheduler="pbt")
