"""One run: what is trained, what is measured, and that it comes again."""

from dataclasses import replace

import pytest
from made_up import FACTS

import graft
from graft import tasks
from graft.runs.configuration import Configuration
from graft.runs.single import perform, subset

ROOM = 150  # tokens


@pytest.fixture
def answers(bases):
    """A configuration of `answers` on the tiny language model."""

    def made(method="lora", **changes):
        training = {"steps": 6, "batch_size": 4, "learning_rate": 1e-2, "warmup": 0.06}
        common = Configuration(base=str(bases / "llama"), task="answers", knobs=FACTS, method=method, training=training)
        return replace(common, rows=8, **changes)

    return made


def test_the_same_configuration_gives_the_same_metrics_and_another_seed_others(answers):
    first, again, other = (perform(answers(seed=seed, splits=("validation", "test"))) for seed in (0, 0, 1))
    assert (
        first.metrics == again.metrics and first.curve == again.curve and first.metrics.keys() == {"validation", "test"}
    )
    assert other.curve != first.curve and other.metrics["test"]["loss"] != first.metrics["test"]["loss"]
    assert len(first.curve) == 6 and first.seconds.keys() == {"training", "step", "measuring", "in_all"}


def test_only_what_is_asked_for_is_measured(answers):
    record = perform(answers())
    assert record.metrics.keys() == record.baseline.keys() == {"validation"}


def test_the_base_as_it_is_is_what_evaluate_measures(answers, bases):
    found = perform(answers("zero-shot", splits=("test",)))
    base = graft.load_base(bases / "llama", objective="causal-lm")
    rows = subset(tasks.task("answers", **FACTS), "test", 8)
    assert len(rows) == 8 and found.metrics["test"] == graft.evaluate(base.model, rows, **base.arguments())
    assert found.baseline["test"] == rows.task.baseline(rows) and found.parameters == 0 and found.curve == []


def test_full_fine_tuning_trains_all_of_the_base_and_the_probe_its_head_alone(answers, bases):
    base = graft.load_base(bases / "llama").model
    full = perform(answers("full-fine-tuning"))
    assert full.parameters == sum(p.numel() for p in base.parameters()) and full.adapter_bytes == 4 * full.parameters
    assert full.curve[-1][1] < full.curve[0][1]
    probe = perform(replace(answers("linear-probe"), base=str(bases / "bert"), task="chapters", knobs={}))
    rows = tasks.load("chapters")
    whole = graft.load_base(bases / "bert", objective="classification", examples=rows)
    new = [whole.model.get_submodule(path) for path in whole.heads]  # a pooler and a classifier
    assert whole.model.classifier in new and probe.status == "done", probe.reason
    assert probe.parameters == sum(p.numel() for m in new for p in m.parameters())
    assert 0 <= probe.metrics["validation"]["accuracy"] <= 1


def test_a_quantised_base_is_what_is_adapted_and_asked_and_full_fine_tuning_trains_the_plain_one(answers, bases):
    base = graft.load_base(bases / "llama", objective="causal-lm", dtype="float32", quantise="int8")
    rows = subset(tasks.task("answers", **FACTS), "validation", 8)
    asked = perform(answers("zero-shot", quantise="int8"))
    assert asked.metrics["validation"] == graft.evaluate(base.model, rows, **base.arguments())
    assert asked.metrics != perform(answers("zero-shot")).metrics
    lora, plain = (perform(answers(quantise=q, also={"latency": True})) for q in ("int8", None))
    assert lora.parameters == plain.parameters and lora.curve[0] != plain.curve[0]
    assert lora.curve[-1][1] < lora.curve[0][1]
    assert lora.figures["latency"]["merged"] is None  # codes take no change
    full, reference = (perform(answers("full-fine-tuning", quantise=q)) for q in ("int8", None))
    assert full.metrics == reference.metrics and full.parameters == reference.parameters


def test_columns_are_renamed_and_the_task_judges(answers):
    knobs = {"examples": 20, "rules": 4, "letters": 4}
    training = answers().training | {"columns": {"completion": "chosen"}}
    record = perform(replace(answers(), task="prefer", knobs=knobs, training=training))
    assert {"reward", "exact_match", "loss"} <= record.metrics["validation"].keys()


@pytest.mark.parametrize(
    "method, changes, said",
    [("bitfit", {}, "it has no bias"), ("linear-probe", {}, "no new head"),
     ("lora", {"base": "/nowhere/x"}, "no folder"),
     ("lora", {"options": {"rank": 0}}, "rank must be"), ("lora", {"task": "nothing"}, "no task is called")],
)  # fmt: skip
def test_what_cannot_be_done_is_a_record_with_the_reason(answers, method, changes, said):
    record = perform(replace(answers(method), **changes))
    assert record.status == "failed" and said in record.reason and not record.metrics


def test_a_bug_and_full_memory_are_records_too(answers, monkeypatch):
    for error, said in ((KeyError("lost"), "KeyError: 'lost'"), (MemoryError(), "memory ran out")):
        monkeypatch.setattr("graft.runs.single.evaluate", lambda *a, error=error, **k: (_ for _ in ()).throw(error))
        assert perform(answers("zero-shot")).reason == said


def test_a_subset_is_drawn_by_the_seed_of_the_task_and_in_order():
    task = tasks.task("rewrites", examples=50)
    rows = subset(task, "test", 40)
    places = [task.rows("test").index(row) for row in rows]
    assert places == sorted(set(places)) and len(places) == 40 and rows == subset(task, "test", 40)
    assert subset(task, "test", 10_000) == task.rows("test")
    assert [task.rows("test").index(row) for row in subset(task, "test", 41)] != places


def test_answered_examples_stand_before_the_prompts_as_many_as_fit(answers, monkeypatch, bases):
    task, asked = tasks.task("answers", **FACTS), []

    def evaluate(model, rows, **given):
        asked.append(rows)
        return {"loss": 1.0}

    monkeypatch.setattr("graft.runs.single.evaluate", evaluate)
    assert "not one answered example fits" in perform(answers("in-context")).reason  # in 64 tokens
    monkeypatch.setattr("graft.runs.single.limit", lambda *given: ROOM)
    record = perform(answers("in-context", splits=("test",)))
    assert record.status == "done", record.reason
    ((*rows,), words) = asked[0], graft.load_base(bases / "llama").processor
    before = {row["prompt"].removesuffix(plain["prompt"]) for row, plain in zip(rows, subset(task, "test", 8))}
    (prefix,) = before
    shots = [shot for shot in prefix.split("\n\n") if shot]
    known = {f"{row['prompt']}{row['completion']}" for row in task.rows("train")}
    assert 0 < len(shots) < 4 and set(shots) <= known
    assert [row["completion"] for row in rows] == [row["completion"] for row in subset(task, "test", 8)]
    longest = max(len(words(row["prompt"])["input_ids"]) for row in rows)
    assert longest + asked[0].generation["max_new_tokens"] <= ROOM


def test_fewer_rows_to_learn_from_are_some_of_more():
    from graft.runs.single import train_rows

    task = tasks.task("rewrites", examples=50)
    few, more = ([row["prompt"] for row in train_rows(task, count)] for count in (10, 20))
    assert len(few) == 10 and len(more) == 20 and set(few) < set(more)
    assert train_rows(task, None) == task.rows("train")


def test_other_data_than_planned_are_refused(answers):
    record = perform(replace(answers(), data="another"))
    assert record.status == "failed" and "plan it anew" in record.reason
