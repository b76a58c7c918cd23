"""The chapters of the standard library's documentation: splits, texts, labels."""

import inspect
import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import pytest

from graft.tasks import chapters


@pytest.fixture(scope="module")
def data():
    return chapters.load()


def parts(data):
    return {"train": data.train, "validation": data.validation, "test": data.test}


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
    assert len(data.labels) >= 12 and len(data.train) > 3000
    total = Counter(row["label"] for rows in parts(data).values() for row in rows)
    assert set(total) == set(data.labels) and min(total.values()) >= 75
    for rows, share in ((data.test, 0.2), (data.validation, 0.1)):
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


def test_another_process_reads_the_same_rows(data):
    script = "import json; from dataclasses import asdict; from graft.tasks import chapters\n"
    script += "print(json.dumps(asdict(chapters.load())))"
    environment = {**os.environ, "PYTHONHASHSEED": "7", "PYTHONPATH": str(Path(chapters.__file__).parents[2])}
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env=environment)
    assert json.loads(run.stdout) == json.loads(json.dumps(asdict(data)))


def test_the_seed_decides_the_split(data):
    other = chapters.load(seed=1)
    assert {row["text"] for row in other.test} != {row["text"] for row in data.test}
    assert sorted(row["text"] for p in parts(other).values() for row in p) == sorted(
        row["text"] for p in parts(data).values() for row in p
    )


def test_interactive_examples_are_cut_out():
    docstring = "Add two numbers.\n\n    >>> add(1, 2)\n    3\n\nBoth may be negative.\n>>> add(-1, 1)\n0"
    assert chapters.clean(docstring) == "Add two numbers. Both may be negative."


@pytest.mark.parametrize("shares", [{"test": -0.1}, {"test": 0.6, "validation": 0.4}])
def test_a_share_out_of_range_is_refused(shares):
    with pytest.raises(ValueError, match="shares must not be negative"):
        chapters.load(**shares)


def test_too_high_a_minimum_is_refused():
    with pytest.raises(ValueError, match="min_texts=100000"):
        chapters.load(min_texts=100_000)
