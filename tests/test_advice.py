"""Advice: the rule of ranking on tables made up here, limits, and what it says it does not know."""

import json

import pytest

from graft import GraftError, advise, attach, bases, evidence, predict_cost
from graft.cli import run
from graft.core.recipe import Recipe
from graft.models import load_base


def row(method, mean, tie, rate=0.01):
    test = {"accuracy": {"mean": mean, "sd": 0.01}, "loss": {"mean": 1 - mean, "sd": 0.0}}
    return {
        "base": "graft:minilm", "method": method, "seeds": [0, 1, 2], "learning_rate": rate, "at_end_of_grid": False,
        "test": test, "parameters": 10, "adapter_bytes": 40, "tie": tie,
    }  # fmt: skip


def table(task, rows, objective="classification", **more):
    found = {
        "task": task, "knobs": {}, "base": "graft:minilm", "objective": objective, "train_rows": 100, "steps": 60,
        "batch_size": 16, "floor": {"accuracy": 0.2}, "rows": rows,
    }  # fmt: skip
    return found | more


@pytest.fixture
def tables(monkeypatch):
    made = [
        table("one", [row("lora", 0.6, True, 0.001), row("dora", 0.55, True), row("ia3", 0.4, False)]),
        table("two", [row("lora", 0.5, False, 0.003), row("dora", 0.7, True), row("ia3", 0.6, False)]),
        table("easy", [row("lora", 0.9, True), row("dora", 0.9, True), row("bitfit", 0.9, True)]),
        table("three", [row("lora", 0.6, True, 0.01), row("ia3", 0.3, False), row("zero-shot", 0.2, False)]),
        table("hopeless", [row("ia3", 0.2, True), row("lora", 0.1, False)]),
        table("four", [row("lora", 0.6, True, 0.003), row("ia3", 0.3, False), row("vera", 0.2, False)]),
    ]
    monkeypatch.setattr(evidence, "tables", lambda: made)
    monkeypatch.setattr(evidence, "costs", lambda: {"lora": {"step": 1.0, "kept": 1.0}, "ia3": {"step": 0.8}})


def test_ranked_by_ties_and_then_by_quality(tables):
    found = advise(objective="classification").recommendations
    assert [r.method for r in found] == ["dora", "lora", "ia3"]  # vera, bitfit and zero-shot: too few tables, or none
    dora, lora, ia3 = found
    assert (dora.tied, dora.of, lora.tied, lora.of, ia3.tied) == (2, 2, 3, 4, 0)
    assert dora.quality == pytest.approx(((0.55 - 0.2) / 0.4 + 1) / 2)
    assert lora.quality == pytest.approx((1 + 0.3 / 0.5 + 1 + 1) / 4)
    assert lora.learning_rate == 0.003  # the middle one of 0.001, 0.003, 0.003, 0.01
    assert "one on graft:minilm: accuracy 0.600 ± 0.010, the best; learning rate 0.001" in lora.evidence
    assert "best lora 0.600 ± 0.010, not told apart" in dora.evidence[0]


def test_limits_leave_out_with_the_reason(tables):
    found = advise(objective="classification", slower=0.9)
    assert [r.method for r in found.recommendations] == ["ia3"]
    assert found.left_out == {"lora": "its step takes 1 times LoRA's", "dora": "the time of its step is not measured"}
    base = load_base("graft:minilm", objective="classification", labels=["a", "b"])
    adapter = attach(base.model, Recipe.of("ia3"))
    own = sum(p.numel() for p in adapter.parameters()) + sum(p.numel() for p in base.model.classifier.parameters())
    rows = [{"text": "x", "label": "a"}, {"text": "y", "label": "b"}]
    found = advise("graft:minilm", rows, parameters=own)
    assert {r.method: r.parameters for r in found.recommendations} == {"ia3": own}
    assert set(found.left_out) == {"lora", "dora"}
    assert advise("graft:minilm", rows, parameters=own - 1).recommendations == []


def test_what_takes_too_much_memory_is_not_recommended_and_the_next_ones_move_up(tables):
    rows = [{"text": f"{i} one two three", "label": "ab"[i % 2]} for i in range(8)]
    methods = ["dora", "lora", "ia3"]
    needs = {m: max((c := predict_cost("graft:minilm", rows, method=m, measure=False)).peak, c.start) for m in methods}
    most = sorted(needs.values())[1]
    found = advise("graft:minilm", rows, memory=f"{most / 2**20 + 0.01:.2f} MiB", count=2)
    too_large = next(m for m in methods if needs[m] > most)
    assert [r.method for r in found.recommendations] == [m for m in methods if m != too_large]
    (method, why), *_ = found.left_out.items()
    assert method == too_large and why.startswith(f"it would take {needs[too_large] / 2**20:,.1f} MiB of memory")


def test_what_is_not_known_is_said(tables):
    found = advise(objective="regression")
    assert not found.recommendations and "nothing was measured for regression" in found.unknown[0]
    near, far = (advise(objective="classification", rows=n).unknown for n in (1000, 1001))
    assert not any("rows" in said for said in near) and any("yours are 1,001" in said for said in far)
    assert any(said.startswith("not counted") and said.endswith(": easy, hopeless") for said in near)


def test_a_base_beyond_the_measured_ones_is_named(tables, monkeypatch):
    small = table("one", [row("lora", 0.6, True), row("ia3", 0.2, False)], base="graft:sprout")
    monkeypatch.setattr(evidence, "tables", lambda: [small])
    assert bases.find("sprout").card["parameters"] * 10 < bases.find("minilm").card["parameters"]
    found = advise("graft:minilm", [{"text": "x", "label": "a"}, {"text": "y", "label": "b"}])
    assert any("the largest base measured has 561,600" in said for said in found.unknown)


def test_refuses_what_it_cannot_judge():
    with pytest.raises(GraftError, match="data, or an objective"):
        advise()
    with pytest.raises(GraftError, match="depends on the model"):
        advise(objective="classification", parameters=10)
    for given in ({"objective": "classification"}, {"data": [{"text": "x", "label": "a"}]}):
        with pytest.raises(GraftError, match="memory=2GiB at most: that depends on the model and the data: name both"):
            advise(memory="2GiB", **given)
    with pytest.raises(GraftError, match="memory='much' is no size"):
        advise("graft:minilm", "task:chapters", memory="much")
    with pytest.raises(GraftError, match="classify"):
        advise(objective="classify")


def test_the_command_says_the_same_as_the_library(capsys):
    assert run(["advise", "--objective", "causal-lm", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    found = advise(objective="causal-lm")
    assert [r["method"] for r in shown["recommendations"]] == [r.method for r in found.recommendations]
    assert len(shown["recommendations"]) == 5 and shown["reported"]
