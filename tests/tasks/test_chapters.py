"""The chapters of the standard library's documentation: splits, texts, labels."""

import inspect
import re
import shutil
from collections import Counter

import pytest

from graft.core.errors import GraftError
from graft.tasks import SPLITS, chapters
from graft.tasks.chapters import Chapters


@pytest.fixture(scope="module")
def data():
    return Chapters()


def parts(data):
    return {split: data.rows(split) for split in SPLITS}


def test_no_text_stands_twice(data):
    texts = [" ".join(re.findall(r"\w+", row["text"].lower())) for rows in parts(data).values() for row in rows]
    assert len(set(texts)) == len(texts)


def test_no_top_level_object_stands_in_two_splits(data):
    homes = {}
    for part, rows in parts(data).items():
        for row in rows:
            homes.setdefault((row["label"], row["name"].split(".")[0].lstrip("_")), set()).add(part)
    assert all(len(home) == 1 for home in homes.values())


def test_enough_chapters_each_split_as_asked(data):
    assert len(data.labels) >= 12 and len(data.rows("train")) > 3000
    total = Counter(row["label"] for rows in parts(data).values() for row in rows)
    assert set(total) == set(data.labels) and min(total.values()) >= 75
    for rows, share in ((data.rows("test"), 0.2), (data.rows("validation"), 0.1)):
        found = Counter(row["label"] for row in rows)
        assert all(abs(found[label] - share * total[label]) <= 1 for label in data.labels)


def test_labels_follow_the_documentation(data):
    homes = {(row["module"], row["name"]): row["label"] for rows in parts(data).values() for row in rows}
    assert homes["json.decoder", "JSONDecoder.decode"] == "Internet data"
    assert homes["posix", "getppid"] == "Operating system services"
    assert homes["shutil", "copytree"] == "Files and directories"
    assert homes["math", "isqrt"] == "Numbers and mathematics"
    assert not any("test" in module.split(".") for module, _ in homes)


def test_every_module_of_the_table_stands_in_one_chapter():
    names = [name for modules in chapters.CHAPTERS.values() for name in modules.split()]
    assert len(set(names)) == len(names)


def test_texts_are_those_that_inspect_reports(data):
    rows = {row["name"]: row["text"] for rows in parts(data).values() for row in rows if row["module"] == "shutil"}
    assert len(rows) > 20
    for name in ("copytree", "copyfileobj", "which", "disk_usage"):
        assert rows[name] == " ".join(inspect.getdoc(getattr(shutil, name)).split())


def test_the_seed_decides_the_split(data):
    other = Chapters(seed=1)
    assert {row["text"] for row in other.rows("test")} != {row["text"] for row in data.rows("test")}
    assert sorted(row["text"] for p in parts(other).values() for row in p) == sorted(
        row["text"] for p in parts(data).values() for row in p
    )


def test_interactive_examples_are_cut_out():
    docstring = "Add two numbers.\n\n    >>> add(1, 2)\n    3\n\nBoth may be negative.\n>>> add(-1, 1)\n0"
    assert chapters.clean(docstring) == "Add two numbers. Both may be negative."


@pytest.mark.parametrize("shares", [{"test": -0.1}, {"test": 0.6, "validation": 0.4}])
def test_a_share_out_of_range_is_refused(shares):
    with pytest.raises(GraftError, match=r"test must be .* not -0\.1|must sum to less than 1"):
        Chapters(**shares)


def test_too_high_a_minimum_is_refused():
    with pytest.raises(GraftError, match="min_texts=100000"):
        Chapters(min_texts=100_000).rows("train")


def test_steps_divide_the_chapters_and_their_rows(data):
    steps = [Chapters(steps=4, step=i) for i in (1, 2, 3, 4)]
    for split, whole in parts(data).items():
        found = [{row["text"] for row in step.rows(split)} for step in steps]
        assert sum(map(len, found)) == len(whole) and set.union(*found) == {row["text"] for row in whole}
    arriving = [{row["label"] for row in step.rows("train")} for step in steps]
    assert sum(map(len, arriving)) == len(data.labels) and max(map(len, arriving)) - min(map(len, arriving)) <= 1
    for i, step in enumerate(steps):
        assert step.labels == data.labels
        assert {row["label"] for row in step.rows("seen")} == set().union(*arriving[: i + 1])
    with pytest.raises(GraftError, match="step=5 of steps=4"):
        Chapters(steps=4, step=5).rows("train")


def test_domains_divide_the_rows_under_the_same_labels(data):
    domains = [Chapters(domain=name) for name in ("functions", "members")]
    for split, whole in parts(data).items():
        functions, members = ({row["text"] for row in domain.rows(split)} for domain in domains)
        assert functions and members and not functions & members
        assert functions | members == {row["text"] for row in whole}
        assert members == {row["text"] for row in whole if "." in row["name"]}
    assert all(domain.labels == data.labels for domain in domains)
