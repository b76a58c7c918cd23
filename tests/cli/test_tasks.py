"""graft tasks, and tasks as data of the other commands."""

import json
from dataclasses import dataclass
from typing import Annotated

import pytest

import graft as library
from graft import tasks
from graft.core.hyper import Range
from graft.training import evaluation, predict, read


def test_tasks_lists_what_is_registered(graft):
    listed = {t["name"]: t for t in graft("tasks", "--json").json}
    assert listed.keys() == tasks.TASKS.keys() - {"own"}  # whose data must be named
    out = graft("tasks").out
    assert all(name in out and t["summary"] and t["licence"] in out for name, t in listed.items())
    assert listed["rewrites"]["splits"] == tasks.TASKS["rewrites"].splits


def test_show_gives_the_card_of_the_task_as_it_was_asked_for(graft):
    card = graft("tasks", "show", "rewrites,rules=16,examples=100", "--json").json
    made = tasks.task("rewrites", rules=16, examples=100)
    assert card["sizes"]["train"] == 100 and card["values"] == {"rules": 16, "examples": 100} | card["values"]
    assert card["fingerprint"] == made.fingerprint() and card["baseline"] == made.baseline()
    assert card["examples"] == list(made.rows("train")[:2])
    out = graft("tasks", "show", "answers,people=20,edits=7").out
    assert "edits_reworded" in out and "CC0-1.0" in out and "exact_match" in out
    assert repr(tasks.load("answers", people=20, edits=7)[0]["prompt"]) in out


def test_a_new_task_is_listed_shown_and_data(graft):
    @dataclass(frozen=True, kw_only=True)
    class Echo(tasks.Task):
        """Say it again."""

        name = "test_echo"
        sources, licence = "generated", "CC0-1.0"
        splits = dict.fromkeys(tasks.SPLITS, "numbers")

        count: Annotated[int, "rows of a split", Range(1)] = 3

        def generate(self):
            first = {"train": 0, "validation": 100, "test": 200}
            return {s: [{"prompt": f"{n + i}", "completion": f" {n + i}"} for i in range(self.count)]
                    for s, n in first.items()}  # fmt: skip

        def items(self, row):
            return (row["prompt"],)

    try:
        assert "test_echo" in {t["name"] for t in graft("tasks", "--json").json}
        assert graft("tasks", "show", "test_echo,count=5", "--json").json["sizes"]["test"] == 5
        assert read("task:test_echo,count=2", split="test")[1] == {"prompt": "201", "completion": " 201"}
    finally:
        del tasks.TASKS["test_echo"]


@pytest.mark.parametrize(
    "args, said",
    [(["show", "rewrits"], "no task is called 'rewrits': did you mean rewrites"),
     (["show"], "graft tasks show NAME"), (["list", "rewrites"], "graft tasks show NAME"),
     (["show", "rewrites,rule=3"], "no knob 'rule': did you mean rules"),
     (["show", "rewrites,depth=0"], "depth must be int, at least 1, not 0")],
)  # fmt: skip
def test_bad_input_is_one_sentence(graft, args, said):
    done = graft("tasks", *args)
    assert done.code == 2 and not done.out and said in done.err and done.err.count("\n") == 1


def test_a_task_is_tuned_on_measured_and_predicted(graft, house, tmp_path):
    facts = "task:answers,people=4,strangers=1,edits=2,forget=1"
    done = graft(
        "tune", house / "llama", "--data", facts, "--validation", facts, "--output", tmp_path / "out", "--steps", "2",
        "--json",
    )  # fmt: skip
    assert done.code == 0, done.err
    assert done.json["objective"] == "causal-lm" and done.json["validation"]["loss"] > 0
    assert f"data: {facts}" in (tmp_path / "out" / "recipe.yaml").read_text()
    measured = graft("eval", house / "llama", "--adapter", tmp_path / "out", "--data", facts, "--json").json
    answers = tmp_path / "answers.jsonl"
    graft("predict", house / "llama", "--adapter", tmp_path / "out", "--data", facts, "--output", answers)
    rows = [json.loads(line) for line in answers.read_text().splitlines()]
    assert [row["prompt"] for row in rows] == [row["prompt"] for row in read(facts, split="test")]
    assert (
        measured["exact_match"]
        == tasks.parse(facts[5:])[0].score(rows, [row["prediction"] for row in rows])["exact_match"]
    )
    assert {"loss", "perplexity"} < measured.keys() and next(iter(measured)) == "exact_match"


def test_the_metric_is_that_of_what_the_model_says(house, monkeypatch):
    base = library.load_base(house / "llama", objective="causal-lm")
    rows = tasks.load("prefer", split="test", examples=10, rules=4, letters=4).select(range(8))
    right = [rows.task.answer(row) for row in rows]
    seen = {}

    def said(model, examples, **options):
        seen.update(options)
        assert [e["prompt"] for e in examples] == [row["prompt"] for row in rows]
        return [*right[:6], "", ""]

    monkeypatch.setattr(evaluation, "predict", said)
    found = library.evaluate(base.model, rows, columns={"completion": "chosen"}, **base.arguments())
    assert found["exact_match"] == found["reward"] == 6 / 8
    assert seen["max_new_tokens"] >= max(len(a) for a in right)


def test_what_the_objective_measures_is_not_measured_twice(house, monkeypatch):
    rows = tasks.load("chapters", split="test").select(range(12))
    base = library.load_base(house / "bert", objective="classification", examples=rows)
    assert base.model.config.num_labels == len(rows.task.labels)  # all of them, not those that occur here
    monkeypatch.setattr(evaluation, "predict", None)
    found = library.evaluate(base.model, rows, **base.arguments())
    monkeypatch.undo()
    assert found["accuracy"] == rows.score(predict(base.model, rows, **base.arguments()))["accuracy"]


def test_a_task_of_prompts_is_one_of_labels_under_other_names(house):
    rows = tasks.load("multitask", split="test", task="north").select(range(20))
    columns = {"text": "prompt", "label": "completion"}
    base = library.load_base(house / "bert", objective="classification", labels=[" no", " yes"])
    base.model.config.id2label = {0: "LABEL_0", 1: "LABEL_1"}  # only the data names the classes
    found = library.evaluate(base.model, rows, columns=columns, **base.arguments())
    assert found["exact_match"] == found["accuracy"] > 0


def test_images_of_a_task_are_images():
    pytest.importorskip("sklearn")
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

    rows = tasks.load("digits-incremental", step=2)
    config = ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, image_size=8,
                       patch_size=4, num_labels=10)  # fmt: skip
    processor = ViTImageProcessor(size={"height": 8, "width": 8}, do_resize=False)
    model = ViTForImageClassification(config)
    assert library.evaluate(model, rows, processor=processor)["loss"] > 0
    said = predict(model, rows.select([0, 1, 2]), processor=processor, labels=rows.labels)
    assert {p["label"] for p in said} <= set("0123456789")


def test_texts_give_knobs_of_every_kind():
    made, split = tasks.parse("digits-shifted, shift=noise, severity=2, stream=rising, split=clean, seed=3")
    assert (made.shift, made.severity, made.stream, made.seed, split) == ("noise", 2, "rising", 3, "clean")
    assert tasks.parse("prefer,noise=0.25")[0] == tasks.task("prefer", noise=0.25)
    for text, said in {"digits-shifted,shift=rotate": "shift must be 'rotation' or 'noise'", "prefer,noise=2": "not 2",
                       "rewrites,rules=1.5": "not 1.5", "rewrites,rules=": "not ''"}.items():  # fmt: skip
        with pytest.raises(library.GraftError, match=said):
            tasks.parse(text)
