"""A newcomer who adds a method touches one file: the example of the documentation, added on the fly."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """A copy of the library and of its contract test, with one file more."""
    folder = tmp_path_factory.mktemp("copy")
    skip = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "src", folder / "src", ignore=skip)
    (folder / "tests").mkdir()
    for name in ("test_contract.py", "conftest.py", "models.py"):
        shutil.copy(ROOT / "tests" / name, folder / "tests" / name)
    for part in ("docs", "benchmarks"):  # pages are made from the figures of the benchmarks
        shutil.copytree(ROOT / part, folder / part, ignore=skip)
    page = (ROOT / "docs" / "adding-a-method.md").read_text(encoding="utf-8")
    example = re.search(r"```python\n(.*?)```", page, re.DOTALL)
    assert example
    (folder / "src/graft/methods/weight/lora_xs.py").write_text(example[1], encoding="utf-8")
    return folder


def run(library, *command):
    env = os.environ | {"PYTHONPATH": str(library / "src"), "COLUMNS": "200"}
    return subprocess.run([sys.executable, *command], cwd=library, env=env, capture_output=True, text=True)


def test_the_contract_test_covers_it(library):
    done = run(library, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_contract.py", "-k", "lora_xs")
    passed = re.search(r"(\d+) passed", done.stdout)
    assert done.returncode == 0 and passed and int(passed[1]) > 30, done.stdout[-3000:]


def test_the_command_line_knows_it(library):
    done = run(library, "-m", "graft", "methods", "--json")
    assert done.returncode == 0, done.stderr
    method = next(m for m in json.loads(done.stdout)["methods"] if m["name"] == "lora_xs")
    assert method["papers"][0]["url"] == "https://arxiv.org/abs/2405.17604"


def test_the_catalogue_page_knows_it(library):
    done = run(library, "docs/generate.py")
    assert done.returncode == 0, done.stderr
    assert "lora_xs" in (library / "docs" / "catalogue.md").read_text(encoding="utf-8")
