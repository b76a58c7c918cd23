"""Data of the user as a task: nothing that is held out is trained on, and the columns say what is measured."""

import json
from collections import Counter

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from graft import tasks
from graft.core.errors import GraftError


def written(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


TEXTS = st.lists(st.integers(0, 99), min_size=15, max_size=30, unique=True)
ROWS = st.builds(lambda texts, again: [*texts, *(texts[i] for i in again)], TEXTS, st.lists(st.integers(0, 14)))


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(texts=ROWS, seed=st.integers(0, 99))
def test_every_row_is_in_one_split_and_no_question_in_two(tmp_path, texts, seed):
    rows = [(f"text {n}", i % 2) for i, n in enumerate(texts)]
    data = written(tmp_path / "rows.jsonl", [{"text": t, "label": n} for t, n in rows])
    made = tasks.task("own", data=data, test=0.2, validation=0.3, seed=seed)
    found = {split: made.rows(split) for split in tasks.SPLITS}
    questions = [{row["text"] for row in part} for part in found.values()]
    assert sum(map(len, questions)) == len(set().union(*questions))
    assert Counter((r["text"], r["label"]) for part in found.values() for r in part) == Counter(
        (t, str(n)) for t, n in rows
    )


def test_the_columns_say_what_is_measured_and_what_is_right(tmp_path):
    def own(row, **knobs):
        columns = {
            k: [f"{v} {i}" if isinstance(v, str) and k != "label" else v for i in range(30)] for k, v in row.items()
        }
        rows = [dict(zip(columns, values)) for values in zip(*columns.values())]
        made = tasks.task("own", data=written(tmp_path / "rows.jsonl", rows), **knobs)
        return made, made.answer(made.rows("test")[0]), made.rows("test")[0]

    for row, metric in [
        ({"text": "a", "label": "x"}, "accuracy"),
        ({"text": "a", "label": 3}, "accuracy"),
        ({"prompt": "a", "completion": "b"}, "exact_match"),
        ({"input": "a", "target": "b"}, "exact_match"),
    ]:
        made, answer, first = own(row)
        assert made.metric == metric and [m.__name__ for m in made.metrics] == [metric]
        assert answer == str(next(first[c] for c in ("label", "completion", "target") if c in first))
        assert made.rows("test").score([made.answer(r) for r in made.rows("test")]) == {metric: 1.0}
    for row in ({"text": "a"}, {"text": "a", "label": 0.5}):
        assert own(row)[0].metric == "loss" and own(row)[0].metrics == ()
    made, _, _ = own({"sentence": "a", "label": "x"}, columns={"text": "sentence"})
    assert made.metric == "accuracy" and made.labels == ("x",) and "text" in made.rows("train")[0]


def test_data_of_its_own_is_taken_for_a_split_and_texts_of_numbers_are_shares(tmp_path):
    rows = [{"prompt": f"{i}", "completion": f"{i}"} for i in range(40)]
    first, last = written(tmp_path / "a.jsonl", rows), written(tmp_path / "b.jsonl", rows[:3])
    made, split = tasks.parse(f"own,data={first},test={last},validation=0.25")
    assert split is None and made.rows("test") == rows[:3] and len(made.rows("validation")) == 10
    assert len(made.rows("train")) == 30


def test_the_fingerprint_is_that_of_the_rows(tmp_path):
    rows = [{"text": f"text {i}", "label": i % 2} for i in range(20)]
    first, same = written(tmp_path / "a.jsonl", rows), written(tmp_path / "b.jsonl", rows)
    other = written(tmp_path / "c.jsonl", [*rows[:-1], rows[-1] | {"label": 7}])
    found = [tasks.task("own", data=path).fingerprint() for path in (first, same, other)]
    assert found[0] == found[1] != found[2]


def test_bad_input_is_one_sentence(tmp_path):
    data = written(tmp_path / "a.jsonl", [{"text": "a", "label": 0}, {"text": "b", "label": 1}])
    for knobs, said in [
        ({"test": 0.01}, "leaves test empty: take another share"),
        ({"test": 1.5}, "below 1, not 1.5"),
        ({"validation": 0.9, "test": 0.5}, "empty"),
    ]:
        with pytest.raises(GraftError, match=said):
            tasks.task("own", data=data, **knobs).rows("train")
    with pytest.raises(GraftError, match="no objective fits data with the columns sentence"):
        tasks.task("own", data=written(tmp_path / "b.jsonl", [{"sentence": "a"}]))
    with pytest.raises(GraftError, match="the task own needs data: own,data="):
        tasks.parse("own")
