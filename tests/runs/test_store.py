"""Records on the disk: nothing is lost, nothing damaged is believed."""

import json
import math
from dataclasses import fields, replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from made_up import COMMON, configuration, record

from graft.core.errors import GraftError
from graft.runs import store
from graft.runs.configuration import Configuration
from graft.runs.store import Record, Store
from models import damage

NUMBERS = st.floats(width=32)
METRICS = st.dictionaries(st.sampled_from(["validation", "test"]), st.dictionaries(st.text(max_size=5), NUMBERS))


def same(a, b):
    """Equal, where a number that is none equals itself."""
    return repr(a) == repr(b)


@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(metrics=METRICS, seed=st.integers(0, 9), reason=st.none() | st.text(), rate=NUMBERS.filter(math.isfinite))
def test_a_record_comes_back_as_it_was(tmp_path, metrics, seed, reason, rate):
    made = Record(
        configuration=configuration(rate, seed=seed, options={"rank": {"q_proj": 4}}), status="done", metrics=metrics,
        reason=reason, curve=[[1, 2.5], [2, 2.25]], seconds={"step": 0.25}, environment={"torch": "2"},
    )  # fmt: skip
    kept = Store(tmp_path)
    kept.put(made)
    assert same(kept.get(made.configuration), made) and any(same(made, r) for r in kept.records())
    assert same(Record.of(made.json()), made) and "\n" not in made.json()


def test_whatever_is_another_run_has_another_name():
    other = {"base": "b", "weights": "w", "task": "names", "version": 2, "knobs": {"seed": 1}, "data": "d",
             "method": "dora", "options": {"rank": 2}, "targets": "qv", "seed": 1, "training": {"steps": 4}, "rows": 5,
             "splits": ("validation", "test"), "train_rows": 5, "also": {"latency": True},
             "quantise": "int8"}  # fmt: skip
    assert other.keys() == {f.name for f in fields(Configuration)}
    made = [COMMON, *(replace(COMMON, **{name: value}) for name, value in other.items())]
    assert len({c.id for c in made}) == len(made)
    assert all(Configuration.of(json.loads(json.dumps(c.plain()))).id == c.id for c in made)
    assert not {"train_rows", "also", "quantise"} & COMMON.plain().keys()  # so that the names of older runs stay
    turned = dict(reversed(COMMON.training.items()))
    assert replace(COMMON, training=turned).id == COMMON.id


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(data=st.data())
def test_a_damaged_record_is_refused_by_name(tmp_path, data):
    kept, made = Store(tmp_path), record(exact_match=0.5)
    kept.put(made)
    damage(tmp_path / f"{made.configuration.id}.json", data)
    try:
        assert kept.get(made.configuration) == made  # another white space
    except GraftError as error:
        assert made.configuration.id in str(error)


def test_what_a_killed_process_left_is_no_record_and_goes_with_the_next_one(tmp_path):
    kept, made = Store(tmp_path), record()
    (tmp_path / f".{made.configuration.id}.json.0123.new").write_text('{"format"')
    assert kept.records() == [] and kept.get(made.configuration) is None
    kept.put(made)
    assert [p.name for p in tmp_path.iterdir()] == [f"{made.configuration.id}.json"]


def test_an_archive_takes_records_in_once_and_in_one_order(tmp_path):
    file, some = tmp_path / "deep" / "rewrites.jsonl", [record(rate) for rate in (1e-2, 1e-3, 1e-4)]
    store.archive(file, some[:2])
    store.archive(file, [replace(some[1], metrics={"validation": {"exact_match": 1.0, "loss": 0.5}}), some[2]])
    found = {r.configuration.id: r for r in store.read(file)}
    assert found.keys() == {r.configuration.id for r in some}
    assert found[some[1].configuration.id].metrics["validation"]["exact_match"] == 1.0
    text = file.read_text()
    store.archive(file, reversed(store.read(file)))
    assert file.read_text() == text
    file.write_text(text + "{}\n")
    with pytest.raises(GraftError, match="line 4 is no record"):
        store.read(file)


@settings(deadline=None)
@given(st.integers(1, 400), st.integers(1, 50))
def test_a_thinned_curve_keeps_the_end_and_the_mean_of_each_stretch(length, points):
    curve = [[step, 1 / step] for step in range(1, length + 1)]
    found = store.thinned(curve, points)
    assert len(found) == min(length, points) and found[-1][0] == length
    begin = 0
    for step, loss in found:
        part = [value for at, value in curve if begin < at <= step]
        assert loss == pytest.approx(sum(part) / len(part), rel=1e-4)
        begin = step
