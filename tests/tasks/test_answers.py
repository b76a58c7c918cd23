"""Facts about invented people: which split says what."""

import pytest

from graft import tasks
from graft.core.errors import GraftError

KNOBS = [{}, {"seed": 5, "people": 20, "strangers": 4, "edits": 7, "forget": 3}]


@pytest.fixture(params=KNOBS, ids=str)
def task(request):
    return tasks.task("answers", **request.param)


def facts(rows):
    """{(subject, relation): answer}; one fact has one answer."""
    found = {}
    for row in rows:
        assert found.setdefault((row["subject"], row["relation"]), row["completion"]) == row["completion"]
        assert row["subject"] in row["prompt"]
    return found


def test_learning_splits_ask_the_same_facts_in_other_words(task):
    train, validation, test = (task.rows(split) for split in ("train", "validation", "test"))
    assert facts(train) == facts(validation) == facts(test) and len(facts(train)) == 4 * task.people
    assert len(train) == 2 * len(validation) == 2 * len(test)
    wordings = [{r["prompt"].replace(r["subject"], "{}") for r in rows} for rows in (train, validation, test)]
    assert [len(w) for w in wordings] == [8, 4, 4] and len(set.union(*wordings)) == 16


def test_nobody_unknown_is_named(task):
    known = {row["subject"] for row in task.rows("train")}
    strangers = {row["subject"] for row in task.rows("unknown")}
    assert not known & strangers and len(strangers) == task.strangers


def test_edits_change_answers_and_the_rest_is_locality(task):
    known, edited, local = (facts(task.rows(split)) for split in ("train", "edits", "locality"))
    assert len(edited) == task.edits and all(known[fact] != answer for fact, answer in edited.items())
    assert facts(task.rows("edits_reworded")) == edited
    assert local == {fact: answer for fact, answer in known.items() if fact not in edited}
    places = {relation: {a for (_, r), a in known.items() if r == relation} for _, relation in known}
    assert all(answer in places[relation] for (_, relation), answer in edited.items()) or task.people < 30
    asked = {row["prompt"] for row in task.rows("train")}
    assert {row["prompt"] for row in task.rows("edits")} < asked
    assert not {row["prompt"] for row in task.rows("edits_reworded")} & asked


def test_forgetting_divides_the_known_people(task):
    known, gone, kept = (facts(task.rows(split)) for split in ("train", "forget", "retain"))
    assert gone | kept == known and not gone.keys() & kept.keys() and facts(task.rows("forget_reworded")) == gone
    forgotten = {subject for subject, _ in gone}
    assert len(forgotten) == task.forget and not forgotten & {subject for subject, _ in kept}
    assert not forgotten & {row["subject"] for row in task.rows("edits")}


def test_an_answer_cannot_be_guessed_better_than_by_chance():
    task = tasks.task("answers", people=1000)
    counts = {}
    for (_, relation), answer in facts(task.rows("train")).items():
        counts.setdefault(relation, {}).setdefault(answer, 0)
        counts[relation][answer] += 1
    for of in counts.values():
        assert len(of) == 16 and max(of.values()) < 1.6 * 1000 / 16


@pytest.mark.parametrize(
    "knobs, said",
    [({"forget": 128}, "forget=128: leave some of people=128"), ({"edits": 448}, "edits=448: fewer than the 448"),
     ({"people": 10_000}, "people=10000 and strangers=32 need more than")],
)  # fmt: skip
def test_too_many_are_refused(knobs, said):
    with pytest.raises(GraftError, match=said):
        tasks.task("answers", **knobs)
