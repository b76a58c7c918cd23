"""The whole of a search on tiny models: the protocol, what is kept, and what is refused."""

import json
import time
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_up import COMMON, record

import graft
from graft.comparison.budget import SHARE
from graft.core.errors import GraftError
from graft.runs.store import Store
from graft.searching import searchers, supernets
from graft.searching.fits import Fits
from graft.searching.space import Space
from graft.searching.study import Study

SMALL = dict(steps=2, batch_size=4, rows=6, validation=0.25, test=0.25, seeds=(0, 1), progress=False)
SPACE = ["lora(rank=1|2|4) on attention|mlp", "bitfit"]


def test_the_best_on_validation_is_run_again_and_nothing_is_made_twice(bases, reviews, here, tmp_path):
    given = SMALL | {"space": SPACE, "learning_rate": "1e-3|1e-2", "trials": 5, "output": tmp_path / "out"}
    found = graft.search(bases / "bert", reviews, **given)
    tried = [c for c in here if c.splits == ("validation",)]
    assert len(tried) == len({c.id for c in tried}) == 5 and {c.seed for c in tried} == {0}
    store = Store(found.folder / "runs")
    scores = {c.id: store.get(c).metrics["validation"] for c in tried}
    best = min(tried, key=lambda c: (-scores[c.id]["accuracy"], scores[c.id]["loss"]))
    last = [c for c in here if c.splits == ("validation", "test")]
    assert [c.seed for c in last] == [0, 1] and len(here) == 7
    assert all((c.method, c.options, c.targets, c.training) ==
               (best.method, best.options, best.targets, best.training) for c in last)  # fmt: skip
    (row,) = found.best
    assert row["seeds"] == [0, 1] and row["validation"] == scores[best.id] and row["options"] == best.options
    assert [r["id"] for r in found.rows if r["best"]] == [best.id]

    with pytest.raises(GraftError, match="holds this search already: resume it"):
        graft.search(bases / "bert", reviews, **given)
    with pytest.raises(GraftError, match="holds a search with space="):
        graft.search(bases / "bert", reviews, **given | {"space": SPACE[:1]}, resume=True)
    (found.folder / "runs" / f"{tried[2].id}.json").unlink()
    again = graft.search(bases / "bert", reviews, **given, resume=True)
    assert [c.id for c in here[7:]] == [tried[2].id]
    assert [r["id"] for r in again.rows] == [r["id"] for r in found.rows] == [c.id for c in tried]
    more = graft.search(bases / "bert", reviews, **given | {"trials": 7}, resume=True)
    assert [r["id"] for r in more.rows[:5]] == [c.id for c in tried] and len(more.rows) == 7
    kept = json.loads((found.folder / "results.json").read_text())
    assert [t["id"] for t in kept["trials"]] == [r["id"] for r in more.rows]
    assert "<script" in (found.folder / "report.html").read_text()


def test_on_a_quantised_base(bases, reviews, here, tmp_path):
    given = SMALL | {"seeds": (0,), "space": ["lora(rank=1)"], "learning_rate": "1e-2", "output": tmp_path, "trials": 1}
    found = graft.search(bases / "bert", reviews, **given, quantise="int8")
    assert {c.quantise for c in here} == {"int8"} and found.best[0]["seeds"] == [0]
    assert "bert (int8) on own" in (tmp_path / "report.html").read_text()


def test_what_a_supernet_found_is_trained_anew_within_the_limit(bases, reviews, here, tmp_path, monkeypatch):
    given = SMALL | {"searcher": "noah", "learning_rate": "1e-3|1e-2", "trials": 2, "output": tmp_path / "out"}
    given |= {"at_most": {"parameters": 1000}}
    found = graft.search(bases / "bert", reviews, **given)
    names = [m["name"] for m in found.supernet["members"]]
    assert {c.method for c in here} == {"+".join(names)} and len(here) == 4
    assert {c.training["learning_rate"] for c in here} == {1e-3, 1e-2}
    runs = [r for r in found.runs if r.done]
    base = graft.load_base(bases / "bert", objective="classification", labels=["a", "b"])
    heads = sum(p.numel() for path in base.heads for p in base.model.get_submodule(path).parameters())
    assert {r.parameters - found.supernet["parameters"] for r in runs} == {heads}
    assert heads < max(r.parameters for r in runs) <= 1000
    for m, c in ((m, c) for m in found.supernet["members"] for c in here):
        targets = c.targets[m["name"]] if len(names) > 1 else c.targets
        assert targets == m["targets"]

    monkeypatch.setattr(supernets, "train", lambda *args, **kwargs: pytest.fail("it was trained again"))
    again = graft.search(bases / "bert", reviews, **given, resume=True)
    assert again.supernet == found.supernet and len(here) == 4
    assert json.loads((found.folder / "results.json").read_text())["supernet"] == found.supernet
    with pytest.raises(GraftError, match="noah has a space of its own"):
        graft.search(bases / "bert", reviews, **given | {"space": SPACE})


def test_each_of_the_best_paths_of_nfts_is_trained_anew(bases, reviews, here, tmp_path):
    given = SMALL | {"searcher": "nfts", "learning_rate": "1e-2", "trials": 9, "output": tmp_path / "out"}
    found = graft.search(bases / "bert", reviews, **given | {"seeds": (0,)})
    paths = [found.supernet, *found.supernet["others"]]
    assert len(paths) == 3
    assert [p["parameters"] for p in paths] == [r["parameters"] for r in found.supernet["paths"][:3]]
    base = graft.load_base(bases / "bert", objective="classification", labels=["a", "b"])
    heads = sum(p.numel() for path in base.heads for p in base.model.get_submodule(path).parameters())
    assert sorted(r["parameters"] for r in found.rows) == sorted(p["parameters"] + heads for p in paths)
    assert found.verdict == "every point of the space was tried" and found.best[0]["validation"]["loss"] == min(
        r["loss"] for r in found.rows if r["quality"] == min(r["quality"] for r in found.rows)
    )


def test_a_small_space_is_tried_whole_and_what_is_too_large_is_never_started(bases, reviews, here, tmp_path):
    given = SMALL | {"space": SPACE[:1], "learning_rate": "1e-2", "seeds": (0,)}
    whole = graft.search(bases / "bert", reviews, **given, output=tmp_path / "a")
    sizes = {r["parameters"] for r in whole.rows}
    assert len(whole.rows) == 6 and whole.verdict == "every point of the space was tried" and len(sizes) > 2
    before, limit = len(here), sorted(sizes)[1]
    found = graft.search(
        bases / "bert", reviews, **given, at_most={"parameters": limit}, searcher="random", output=tmp_path / "b"
    )
    assert {r.parameters for r in found.runs} == {v for v in sizes if v <= limit}
    started = {c.id for c in here[before:] if c.splits == ("validation",)}
    assert started == {r["id"] for r in whole.rows if r["parameters"] <= limit}
    assert sum(r["status"] == "refused" for r in found.rows) == 6 - len(started)
    before = len(here)
    with pytest.raises(GraftError, match=f"no configuration of the space keeps to parameters=9: .* is {min(sizes)}$"):
        graft.search(bases / "bert", reviews, **given, at_most={"parameters": 9}, output=tmp_path / "c")
    assert len(here) == before


def test_two_objectives_give_the_front(bases, reviews, here, tmp_path):
    given = SMALL | {"space": [*SPACE, "ia3"], "learning_rate": "1e-2", "seeds": (0,), "trials": 8}
    found = graft.search(
        bases / "bert", reviews, **given, objective=("loss", "parameters"), searcher="random", output=tmp_path / "out"
    )
    points = [(r["loss"], r["parameters"]) for r in found.rows]
    front = [p for p in points if not any(q != p and q[0] <= p[0] and q[1] <= p[1] for q in points)]
    assert sorted(p for p, r in zip(points, found.rows) if r["best"]) == sorted(set(front))
    assert len(found.best) == len(set(front)) and all(b["test"] for b in found.best)


def test_methods_in_a_chain_and_ranks_by_block_are_runs(bases, reviews, here, tmp_path):
    space = ["pfeiffer(size=0|2)+bitfit on attention", "lora(rank=0|2|3 per block)"]
    given = SMALL | {"space": space, "learning_rate": "1e-2", "seeds": (0,), "searcher": "random"}
    found = graft.search(bases / "bert", reviews, **given, output=tmp_path / "out")
    assert {c.method for c in here} == {"pfeiffer+bitfit", "bitfit", "lora"}
    assert all(r.done for r in found.runs), [r.reason for r in found.runs]
    refused = [r for r in found.rows if r["status"] == "refused"]
    assert [r["reason"] for r in refused] == ["nothing is adapted: every method is left out, or every block"]
    count = {r["title"]: r["parameters"] for r in found.rows if r["title"]}
    alone = {"bitfit": count["bitfit"], "both": next(v for k, v in count.items() if k.startswith("pfeiffer"))}
    width = 16
    assert alone["both"] - alone["bitfit"] == 2 * width * 2 + width + 2  # down, up and their biases; one head


def test_the_time_is_kept_and_what_one_run_costs_is_said(bases, reviews, here, tmp_path):
    given = SMALL | {"space": SPACE, "seeds": (0,)}
    said = r"the budget of 1 s is too small: one run of 1000000 steps takes \d.* and those of 1 seeds .* would do"
    with pytest.raises(GraftError, match=said):
        graft.search(bases / "bert", reviews, **given | {"steps": 10**6}, budget="1s", output=tmp_path / "out")
    assert len(here) == 1
    found = graft.search(
        bases / "bert", reviews, **given | {"steps": 12}, budget="1h", trials=2, output=tmp_path / "enough"
    )
    assert [c.training["steps"] for c in here[1:]] == [8, 12, 12, 12] and len(found.rows) == 2
    study = Study(None, None, None, None, ("loss",), at_most=None, seconds=100.0, reserved=3, jobs=1)  # type: ignore
    study.expected = 20.0  # one run and three at the end are 80 s of the 90 that are planned with
    assert not study.over()
    study.spent = 11.0
    assert study.over()


@settings(max_examples=30, deadline=None)
@given(seeds=st.integers(1, 4), budget=st.integers(8, 60), objectives=st.sampled_from([("loss",), ("loss", "saved")]))
def test_the_time_holds_the_last_runs_of_a_whole_front(seeds, budget, objectives):
    """Runs of a second each, none of which is better than another one in all: a front of all of them."""
    rates = [0.001 * n for n in range(1, 61)]
    space = Space.of(["lora"], {"learning_rate": "|".join(f"{r:g}" for r in rates)})
    now = 100.0

    class All(Fits):
        def refused(self, configuration):
            return None

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(time, "monotonic", lambda: now)
        study = Study(space, searchers.find("random")(space, seed=0), COMMON, All(COMMON, {}), objectives,
                      at_most=None, seconds=(budget + 0.5) / SHARE, reserved=seeds, jobs=1)  # fmt: skip
        study.expected = 1.0
        while found := study.next():
            now += 1.0
            rate = found[1].training["learning_rate"]
            made = replace(record(loss=rate), configuration=found[1], adapter_bytes=int(1e6 * (1 - rate)))
            study.take(replace(made, seconds={"in_all": 1.0}), anew=True)
    runs, points = len(study.trials), len(study.best())
    assert points == (runs if len(objectives) > 1 else min(runs, 1))
    assert runs + seeds * points <= budget  # and one more would not have fitted
    assert runs + 1 + seeds * (points + 1 if len(objectives) > 1 else 1) > budget or runs == len(rates)


@pytest.mark.parametrize(
    "changes, said",
    [({"space": []}, "the space is empty"), ({"space": ["lorra(rank=2)"]}, "did you mean lora"),
     ({"space": ["lora(rank=-1|2)"]}, "rank must be"), ({"space": ["lora(ranks=2)"]}, "did you mean rank"),
     ({"space": ["ia3", "ia3"]}, "names 'ia3' twice"), ({"learning_rate": "1e-2:1e-4"}, "write the lower end first"),
     ({"searcher": "randon"}, "no searcher is called 'randon'.*random"), ({"budget": "soon"}, "is no time"),
     ({"objective": "size"}, "there is no objective 'size'"), ({"at_most": {"memory": "much"}}, "write memory=1GiB"),
     ({"at_most": {"size": 3}}, "there is no limit 'size'"),
     ({"objective": ["loss", "memory"], "searcher": "config"}, "config takes 1 objective, not 2")],
)  # fmt: skip
def test_bad_input_is_one_sentence(bases, reviews, here, tmp_path, changes, said):
    with pytest.raises(GraftError, match=said):
        graft.search(bases / "bert", reviews, **{**SMALL, "output": tmp_path / "out", **changes})
    assert not here
