"""The whole of it on tiny models: the protocol, what is kept, and what is refused."""

import json
from pathlib import Path

import pytest

import graft
from graft.comparison import budget, compare
from graft.core.delta import METHODS
from graft.core.errors import GraftError

WORDS = {"liked": ["good", "great", "lovely"], "disliked": ["bad", "awful", "dull"]}
SMALL = dict(seeds=(0, 1), learning_rates=(1e-3, 1e-2), steps=3, batch_size=4, rows=6, progress=False)


def test_own_data_are_compared_under_one_protocol_and_nothing_is_made_twice(bases, reviews, here, tmp_path):
    given = {
        **SMALL,
        "methods": ["lora(rank=2)", "dora"],
        "output": tmp_path / "out",
        "validation": 0.25,
        "test": 0.25,
    }
    found = compare(bases / "bert", reviews, **given, sizes=[6])
    rows = {r["method"]: r for r in found.rows}
    assert rows.keys() == {"no-op", "linear-probe", "full-fine-tuning", "lora(rank=2)", "dora"}
    trained = {c.method for c in here if c.splits == ("train", "validation")}
    for c in here:
        tuned = c.splits == ("train", "validation")
        assert c.training["steps"] == 3 and ("learning_rate" in c.training) == (c.method != "no-op")
        assert c.seed == 0 if tuned else "test" in c.splits
    assert len({c.id for c in here}) == len(here) and trained == {
        "no-op",
        "linear-probe",
        "full-fine-tuning",
        "lora",
        "dora",
    }
    lora = rows["lora(rank=2)"]
    assert lora["seeds"] == [0, 1] and lora["learning_rate"] in (1e-3, 1e-2) and lora["deciding"] == "accuracy"
    assert lora["latency"] > 0 and lora["latency_merged"] > 0 and lora["forgetting"] is None
    final = [r for r in found.runs if r.configuration.also and r.configuration.method == "full-fine-tuning"]
    assert [[p[0] for p in r.figures["validation"]] for r in final] == [[1, 2, 3]] * 2
    assert found.target == max(r.figures["validation"][-1][2] for r in final)
    assert all(r.curve[-1][0] == 3 and len(r.curve) == 3 for r in final)
    assert rows["full-fine-tuning"]["reached"] == 2
    fewer = [c for c in here if c.train_rows]
    assert {c.train_rows for c in fewer} == {6} and {c.method for c in fewer} == trained - {"no-op"}
    assert {r["method"] for r in found.sizes[6]} == rows.keys()

    before = len(here)
    with pytest.raises(GraftError, match="holds this comparison already: resume it"):
        compare(bases / "bert", reviews, **given, sizes=[6])
    with pytest.raises(GraftError, match="holds a comparison with sizes=\\[6\\], not \\[\\]"):
        compare(bases / "bert", reviews, **given, resume=True)
    lost = next((found.folder / "runs").glob("*.json"))
    lost.unlink()
    again = compare(bases / "bert", reviews, **given, sizes=[6], resume=True)
    assert len(here) == before + 1 and here[-1].id == lost.stem
    assert [r["method"] for r in again.rows] == [r["method"] for r in found.rows]
    assert {p.name for p in found.folder.iterdir()} >= {"report.html", "results.json", "results.parquet", "runs"}
    planned = found.folder / "comparison.json"
    planned.write_text(json.dumps(json.loads(planned.read_text()) | {"format": 1}))
    with pytest.raises(GraftError, match=r"comparison\.json has format 1, and this version of Graft goes on with 2"):
        compare(bases / "bert", reviews, **given, sizes=[6], resume=True)
    planned.write_text("{}")
    with pytest.raises(GraftError, match=r"comparison\.json is no plan of a comparison"):
        compare(bases / "bert", reviews, **given, sizes=[6], resume=True)


def test_a_language_model_is_compared_with_answered_examples_and_with_what_it_forgets(bases, here, tmp_path):
    rows = [{"prompt": f"the film {w}", "completion": f" {o}"} for w in WORDS["liked"] for o in ("good", "bad", "fine")]
    rows += [{"prompt": f"a book {w}", "completion": " great"} for w in WORDS["disliked"] + ["plot", "fine", "very"]]
    other = tmp_path / "other.jsonl"
    other.write_text(
        "".join(json.dumps({"text": f"the story was {w}"}) + "\n" for w in ["good", "bad", "film", "book", "great"])
    )
    other = str(other)
    given = {**SMALL, "learning_rates": (1e-2,), "validation": 0.3, "test": 0.3}
    found = compare(
        bases / "llama", rows, methods=["bitfit", "ia3"], forgetting=other, **given, output=tmp_path / "out"
    )
    of = {r["method"]: r for r in found.rows}
    assert of.keys() == {"no-op", "zero-shot", "in-context", "full-fine-tuning", "bitfit", "ia3"}
    assert "it has no bias" in next(iter(of["bitfit"]["failures"])) and of["bitfit"]["seeds"] == []
    assert of["no-op"]["test"] == {k: v | {"sd": 0.0} for k, v in of["zero-shot"]["test"].items()}
    assert of["no-op"]["forgetting"] == 0 and of["full-fine-tuning"]["forgetting"] != 0
    assert of["in-context"]["test"]["loss"] != of["zero-shot"]["test"]["loss"]
    texts = [json.loads(line) for line in Path(other).read_text().splitlines()]
    base = graft.load_base(bases / "llama", objective="causal-lm")
    plain = graft.evaluate(base.model, texts, processor=base.processor, objective="causal-lm")["loss"]
    (record,) = [r for r in found.runs if r.configuration.method == "zero-shot" and r.configuration.also]
    assert record.figures["forgetting"] == pytest.approx(plain)


def test_on_a_quantised_base(bases, reviews, here, tmp_path):
    given = {**SMALL, "seeds": (0,), "learning_rates": (1e-2,), "output": tmp_path, "quantise": "int8"}
    given |= {"validation": 0.25, "test": 0.25, "methods": ["lora(rank=2)", "hft"]}
    found = compare(bases / "bert", reviews, **given)
    assert {c.quantise for c in here} == {"int8"}
    of = {r["method"]: r for r in found.rows}
    assert "its weight is quantised" in next(iter(of["hft"]["failures"]))
    assert of["lora(rank=2)"]["latency_merged"] is None and of["full-fine-tuning"]["latency_merged"]
    assert "bert (int8) on own" in (tmp_path / "report.html").read_text()
    with pytest.raises(GraftError, match="holds a comparison with quantise=int8, not None"):
        compare(bases / "bert", reviews, **given | {"quantise": None}, resume=True)
    with pytest.raises(GraftError, match="no scheme of quantisation is called 'int9'"):
        compare(bases / "bert", reviews, **given | {"quantise": "int9", "output": tmp_path / "other"})
    with pytest.raises(GraftError, match="quantised by int8 is not known before: leave the limit out"):
        compare(bases / "bert", reviews, **given | {"output": tmp_path / "other"}, memory="2GiB")


def test_steps_are_as_many_as_fit_and_what_fails_at_once_is_left_out(bases, reviews, here, tmp_path):
    given = {**SMALL, "steps": 5, "seeds": (0,), "learning_rates": (1e-2,), "validation": 0.25, "test": 0.25}
    given |= {"methods": ["prompt_tuning(length=9000)"]}
    with pytest.raises(GraftError, match=r"the budget of 0.01 s is too small: one run takes .* would do for 8 steps"):
        compare(bases / "bert", reviews, **given, budget="0.01s", output=tmp_path / "a")
    assert len(here) == 1 and here[0].method == "full-fine-tuning" and here[0].training["steps"] == budget.TRIAL
    found = compare(bases / "bert", reviews, **given, budget="2h", output=tmp_path / "b")
    assert found.settings["steps"] == 5 and found.unfit.keys() == {"prompt_tuning(length=9000)"}
    assert "leaves no room for text" in found.unfit["prompt_tuning(length=9000)"]
    assert {r["method"] for r in found.rows} == {"no-op", "linear-probe", "full-fine-tuning"}
    assert all(r.configuration.training["steps"] == 5 for r in found.runs)


@pytest.mark.parametrize(
    "changes, said",
    [({"methods": ["lorra"]}, "no method or control is called|no method is called 'lorra'"),
     ({"methods": []}, "methods is empty"), ({"methods": ["lora", "lora(rank=8)"]}, "names lora twice"),
     ({"methods": ["lora", "-dora"]}, "leaves dora out, but -dora has a meaning beside all only"),
     ({"methods": ["all", "-lorra"]}, "no method is called 'lorra': did you mean"),
     ({"budget": "soon"}, "budget='soon' is no time"), ({"sizes": [10**6]}, "sizes=1000000: the train"),
     ({"forgetting": "task:code"}, "not of classification")],
)  # fmt: skip
def test_bad_input_is_one_sentence(bases, reviews, here, tmp_path, changes, said):
    with pytest.raises(GraftError, match=said):
        compare(bases / "bert", reviews, **{**SMALL, "output": tmp_path / "out", **changes})
    assert not here


def test_all_is_what_fits_the_model(bases):
    from graft.comparison import _refuses

    base = graft.load_base(bases / "llama")
    weights = {n: p.clone() for n, p in base.model.named_parameters()}
    assert "it has no bias" in _refuses(base, "bitfit") and _refuses(base, "lora") is None
    assert "linear-probe" in _refuses(base, "full")
    assert all((p == weights[n]).all() for n, p in base.model.named_parameters())


def test_all_but_some_and_others_beside(monkeypatch):
    from types import SimpleNamespace

    from graft import comparison

    monkeypatch.setattr(comparison, "_refuses", lambda base, name: "unfit" if name in ("vera", "tokens") else None)
    given = ["all", "-alora", "alora(rounds=2)", "lora(rank=2)"]
    names, unfit = comparison._contestants(given, None, None, SimpleNamespace(metrics=["accuracy"], name="any"))
    fits = sorted(METHODS.keys() - {"alora", "vera", "tokens"})
    assert names == ["no-op", "linear-probe", "full-fine-tuning", *fits, "alora(rounds=2)", "lora(rank=2)"]
    assert unfit == {"vera": "unfit", "tokens": "unfit"}


def test_what_would_take_more_than_the_memory_is_not_started(bases, reviews, here, tmp_path):
    given = {**SMALL, "methods": ["lora"], "output": tmp_path / "out", "validation": 0.25, "test": 0.25}
    with pytest.raises(GraftError, match="no contestant keeps within memory=1KiB: not started: it would take"):
        compare(bases / "bert", reviews, memory="1KiB", **given)
    assert not here
