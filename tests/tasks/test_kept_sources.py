"""What is kept from process to process is what would be made, whatever happens to the file."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from graft import tasks
from graft.tasks import kept as module
from graft.tasks.kept import folder, kept
from models import damage

CALLS = []


def lengths(given):
    CALLS.append([name for name, _ in given])
    return [(name, len(content), "\ud800é\n") for name, content in given]


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("GRAFT_CACHE", str(tmp_path))
    CALLS.clear()
    return tmp_path / "tasks"


GIVEN = [("a", b"12"), ("b", b"345")]
MADE = [["a", 2, "\ud800é\n"], ["b", 3, "\ud800é\n"]]


def test_it_is_made_once_for_the_same_input_and_anew_for_any_other(cache, monkeypatch):
    assert kept(lengths, GIVEN) == kept(lengths, iter(GIVEN)) == MADE and len(CALLS) == 1
    others = [[("a", b"12"), ("b", b"346")], [("a", b"12"), ("c", b"345")], [("a", b"1"), ("b", b"2345")], GIVEN[::-1]]
    for number, other in enumerate(others, 2):
        kept(lengths, other)
        assert len(CALLS) == number
    monkeypatch.setattr(sys, "version", "another interpreter")
    assert kept(lengths, GIVEN) == MADE and len(CALLS) == len(others) + 2
    monkeypatch.setattr(module.inspect, "getsource", lambda module: "another way to make it")
    assert kept(lengths, GIVEN) == MADE and len(CALLS) == len(others) + 3


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(data=st.data())
def test_a_damaged_file_is_made_anew(cache, data):
    assert kept(lengths, GIVEN) == MADE
    (file,) = cache.iterdir()
    whole = file.read_bytes()
    damage(file, data)
    assert kept(lengths, GIVEN) == MADE and file.read_bytes() == whole


def test_a_process_killed_while_it_writes_leaves_no_file_under_the_name(cache):
    script = f"""
import os, signal, sys
sys.path[:0] = {[str(Path(__file__).parent), str(Path(__file__).parents[1]), str(Path(tasks.__file__).parents[2])]!r}
from graft.core import disk
import test_kept_sources
flush, disk.os.fsync = os.fsync, lambda handle: os.kill(os.getpid(), signal.SIGKILL)
test_kept_sources.kept(test_kept_sources.lengths, test_kept_sources.GIVEN)
"""
    for _ in range(2):
        assert subprocess.run([sys.executable, "-c", script]).returncode == -signal.SIGKILL
        assert not [p for p in cache.iterdir() if not p.name.startswith(".")]
    assert kept(lengths, GIVEN) == MADE and kept(lengths, GIVEN) == MADE and len(CALLS) == 1


def test_a_folder_that_cannot_be_written_does_no_harm(tmp_path, monkeypatch):
    monkeypatch.setenv("GRAFT_CACHE", str(tmp_path / "file"))
    (tmp_path / "file").write_text("no folder")
    assert kept(lengths, GIVEN) == MADE


def test_the_folder_is_where_the_user_says(monkeypatch):
    monkeypatch.delenv("GRAFT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", os.sep + "shared")
    assert folder() == Path(os.sep, "shared", "graft")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert folder() == Path("~/.cache/graft").expanduser()


@pytest.mark.parametrize("name", ["chapters", "code", "names"])
def test_processes_that_build_a_task_at_once_agree_and_the_next_one_does_not_parse(cache, name):
    environment = os.environ | {"PYTHONPATH": str(Path(tasks.__file__).parents[2]), "GRAFT_CACHE": str(cache.parent)}
    script = f"from graft import tasks; print(tasks.task({name!r}).fingerprint())"

    def started(script):
        return subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, env=environment)

    said = {process.communicate()[0] for process in [started(script) for _ in range(2)]}
    unable = "import ast; ast.parse = None; " + script
    assert said == {started(unable).communicate()[0]} and said != {b""}
    assert len(list(cache.iterdir())) == 1
