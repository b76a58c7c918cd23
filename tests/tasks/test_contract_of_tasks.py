"""The contract which every task keeps. A new task file is covered without touching this one."""

import json
import os
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graft import tasks
from graft.core.errors import GraftError
from graft.core.hyper import hyperparameters
from graft.tasks import SPLITS, TASKS
from graft.training import data, objectives

NAMES = [entry["name"] for entry in tasks.catalogue()]
pytest.importorskip("sklearn")


@pytest.fixture(scope="module", params=NAMES)
def task(request):
    return tasks.task(request.param)


def drawn(cls, seed):
    """Values for some of the knobs: a choice, or a number near the default or at the border."""
    draw, values = random.Random(seed), {"seed": seed}
    for knob in hyperparameters(cls).values():
        if knob.name == "seed" or draw.random() < 0.5:
            continue
        if choices := [k for k in knob.kinds if not isinstance(k, type)]:
            values[knob.name] = draw.choice(choices)
        elif int in knob.kinds:
            near = [knob.default, knob.default // 2, knob.default + 1, 2 * knob.default, knob.ranges[0].low]
            values[knob.name] = int(draw.choice([v for v in near if knob.accepts(int(v))]))
        else:
            low, high = max(knob.ranges[0].low, 0), min(knob.ranges[0].high, knob.ranges[0].below, 1)
            values[knob.name] = draw.uniform(low, 0.99 * high)
    return values


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_train_validation_and_test_share_no_item(name, seed):
    try:
        made = tasks.task(name, **drawn(TASKS[name], seed))
        found = {split: made.rows(split) for split in SPLITS}
    except GraftError:  # these knobs do not go together
        made = tasks.task(name, seed=seed)
        found = {split: made.rows(split) for split in SPLITS}
    homes = {}
    for split, rows in found.items():
        for row in rows:
            for item in made.items(row):
                assert homes.setdefault(item, split) == split


def test_splits_are_those_of_the_card_and_not_empty(task):
    assert tuple(task.splits)[:3] == SPLITS
    assert task.generate().keys() == task.splits.keys()
    for split in task.splits:
        rows = task.rows(split)
        assert len({tuple(row) for row in rows}) == 1
        assert len({json.dumps(row, default=tasks._listed) for row in rows}) == len(rows)


def test_another_process_makes_the_same_rows():
    script = "import json, sys; from graft import tasks\n"
    script += "print(json.dumps({n: tasks.task(n).fingerprint() for n in json.loads(sys.argv[1])}))"
    environment = os.environ | {"PYTHONHASHSEED": "7", "PYTHONPATH": str(Path(tasks.__file__).parents[2])}
    command = [sys.executable, "-c", script, json.dumps(NAMES)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert json.loads(done.stdout) == {name: tasks.task(name).fingerprint() for name in NAMES}


def test_the_rows_of_a_version_are_fixed(task):
    """A change of content is a new version: raise `version` and write the new `digest`."""
    assert task.digest == (task.fingerprint() if task.portable else "")


def test_the_seed_decides(task):
    other = tasks.task(task.name, seed=1)
    assert json.dumps(other.rows("test"), default=tasks._listed) != json.dumps(task.rows("test"), default=tasks._listed)


def test_right_answers_score_one_and_the_commonest_one_the_baseline(task):
    rows = task.rows("test")
    right = [task.answer(row) for row in rows]
    assert rows.score(right) == pytest.approx(dict.fromkeys(rows.metrics, 1.0))
    counts = Counter(task.answer(row) for row in task.rows("train"))
    common = max(counts, key=counts.__getitem__)
    assert task.baseline() == rows.score([common] * len(rows))
    assert all(0 <= value <= 1 for value in task.baseline().values())
    with pytest.raises(GraftError, match=f"1 predictions for {len(rows)} rows"):
        rows.score(right[:1])


def test_labels_are_named_in_every_split(task):
    for split in task.splits:
        assert task.rows(split).labels == task.labels
        if task.labels:
            assert {row["label"] for row in task.rows(split)} <= set(task.labels)


def test_the_rows_are_in_a_format_that_is_known(task):
    rows = task.rows("train")
    if not {"prompt", "chosen", "rejected"} <= rows[0].keys():
        assert objectives.guess(rows).name in ("classification", "causal-lm", "image-classification")


def test_it_is_data_under_its_name(task):
    def same(a, b):
        return [json.dumps(r, default=tasks._listed) for r in a] == [json.dumps(r, default=tasks._listed) for r in b]

    last = list(task.splits)[-1]
    assert same(data.read(f"task:{task.name}"), task.rows("train"))
    assert same(data.read(f"task:{task.name}", split="test"), task.rows("test"))
    assert same(data.read(f"task:{task.name},seed=1,split={last}"), tasks.load(task.name, split=last, seed=1))


def test_parts_of_the_rows_know_the_task(task):
    rows = task.rows("test")
    part = data.take(rows, [2, 0])
    assert list(part) == [rows[2], rows[0]] and part.task is task and part.split == "test"
    assert part.score([task.answer(row) for row in part]) == pytest.approx(dict.fromkeys(part.metrics, 1.0))


def test_the_card_is_complete(task):
    card = tasks.card(task)
    assert card["summary"] and card["sources"] and card["licence"] and all(card["splits"].values())
    assert card["sizes"] == {split: len(task.rows(split)) for split in task.splits}
    assert all(knob["meaning"] for knob in card["knobs"]) and len(card["examples"]) == 2
    json.dumps(card)


def test_what_does_not_exist_is_named_with_what_is_like_it(task):
    def said(text, match):
        with pytest.raises(GraftError, match=match):
            data.read(f"task:{text}")

    said(f"{task.name}x", f"no task is called '{task.name}x': did you mean .*{task.name}")
    said(f"{task.name},sed=1", f"the task {task.name} has no knob 'sed': did you mean seed")
    said(f"{task.name},split=tests", f"the task {task.name} has no split 'tests': did you mean test")
    said(f"{task.name},seed=-1", f"{task.name}: seed must be int, at least 0, not -1")
    said(f"{task.name},seed=x", f"{task.name}: seed must be int, at least 0, not 'x'")
    said(f"{task.name},seed", "'seed' is no setting of a knob")
