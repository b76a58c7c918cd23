"""Runs in processes of their own: stand-ins that die in several ways, and real ones under SIGKILL."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from made_up import configuration

import graft as library
from graft.cli import run as command_line
from graft.runs import forks
from graft.runs.pool import run
from graft.runs.store import Record, Store, read

SOURCE = str(Path(library.__file__).parents[1])

# A run whose seed is n notes that it began and does what is prepared for n.
STAND_IN = """
import os, shutil, signal
from pathlib import Path
from graft.runs import forks

def run(wanted):
    folder, made = Path(wanted["folder"]), wanted["configuration"]
    with open(folder.parent / "begun", "a") as file:
        file.write(f"{made['seed']}\\n")
    fate = made["options"].get("fate")
    if fate == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if fate == "all killed":
        os.kill(os.getppid(), signal.SIGKILL)
        signal.pause()
    if fate == "endless":
        signal.pause()
    if fate == "crash":
        Path(wanted["errors"]).write_text("no way")
        return 1
    folder.mkdir(exist_ok=True)
    (prepared,) = (folder.parent / "prepared" / str(made["seed"])).glob("*.json")
    shutil.copy(prepared, folder)
    return 0

forks._import, forks._run = lambda wanted: True, run
forks.serve(1)
"""


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """Configurations whose runs have these fates, and the seeds of the runs that began."""
    (tmp_path / "stand_in.py").write_text(STAND_IN)
    monkeypatch.setattr(forks, "PROGRAM", (str(tmp_path / "stand_in.py"),))

    def made(fates):
        found = [configuration(seed=i, options={"fate": fate}) for i, fate in enumerate(fates)]
        for c in found:
            status = "failed" if c.options["fate"] == "failed" else "done"
            Store(tmp_path / "prepared" / str(c.seed)).put(Record(configuration=c, status=status, reason="because"))
        return found

    begun = tmp_path / "begun"
    return made, lambda: [int(line) for line in begun.read_text().split()]


def test_runs_that_die_or_fail_are_recorded_and_the_others_go_on(tmp_path, stand_in):
    wanted = stand_in[0](["killed", None, "crash", "failed", None])
    records = run(wanted, tmp_path / "store", jobs=2, progress=False)
    assert [r.configuration for r in records] == wanted
    assert [r.status for r in records] == ["failed", "done", "failed", "failed", "done"]
    assert "killed by SIGKILL" in records[0].reason and "ended with code 1: no way" in records[2].reason
    assert records[3].reason == "because" and Store(tmp_path / "store").get(wanted[0]) == records[0]


def test_where_nothing_is_missing_no_process_begins(tmp_path, stand_in, monkeypatch):
    wanted = stand_in[0]([None])
    run(wanted, tmp_path / "store", progress=False)
    monkeypatch.setattr(forks.subprocess, "Popen", lambda *args, **options: pytest.fail("a process began"))
    assert run(wanted, tmp_path / "store", progress=False)[0].done


def test_what_is_forked_has_not_begun_to_use_an_accelerator(monkeypatch):
    devices = []
    monkeypatch.setattr("graft.runs.single.load_base", lambda *a, device, **k: devices.append(device))
    forks._import({"configuration": configuration(base="graft:seedling-small", task="answers").plain()})
    assert devices == ["cpu"]


def test_when_what_runs_are_forked_from_dies_only_what_ran_is_lost(tmp_path, stand_in):
    records = run(stand_in[0]([None, "all killed", None]), tmp_path / "store", progress=False)
    assert [r.status for r in records] == ["done", "failed", "done"] and "killed by SIGKILL" in records[1].reason


def test_what_takes_too_long_is_ended_alone(tmp_path, stand_in):
    records = run(stand_in[0](["endless", None, "killed"]), tmp_path / "store", jobs=2, limit=15, progress=False)
    assert [r.status for r in records] == ["failed", "done", "failed"]
    assert "it took too long" in records[0].reason and records[0].seconds["in_all"] >= 15
    assert "killed by SIGKILL" in records[2].reason


def test_exactly_the_missing_runs_are_made(tmp_path, stand_in, capfd):
    (made, begun), place = stand_in, tmp_path / "store"
    wanted = made([None, None, None, None, "failed"])
    run(wanted[:2], place, progress=False)
    assert sorted(begun()) == [0, 1]
    run([*wanted, *wanted], place, jobs=3)
    assert sorted(begun()) == [0, 1, 2, 3, 4] and "3 of 3 runs" in capfd.readouterr().err
    run(wanted, place)
    assert len(begun()) == 5 and capfd.readouterr().err == ""
    run(wanted, place, retry=True)
    assert begun()[5:] == [4]


def children(pid):
    """The processes that a process has started and that still run."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = status.read_text().rpartition(")")[2].split()[:2]
        except OSError:
            continue
        if int(parent) == pid and state != "Z":
            found.append(int(status.parent.name))
    return found


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks at processes where Linux lists them")
def test_a_killed_command_ends_its_runs_and_goes_on_where_it_was(tmp_path, bases, capsys):
    command = [
        "tasks", "run", "answers,people=4,strangers=1,edits=2,forget=1", "--base", str(bases / "llama"), "--json",
        "--method", "lora", "--learning-rates", "1e-3,1e-2", "--seeds", "0", "--steps", "3", "--rows", "4",
        "--batch-size", "4", "--output", str(tmp_path / "store"),
        "--archived", str(tmp_path / "answers.jsonl"),
    ]  # fmt: skip
    environment = os.environ | {"PYTHONPATH": SOURCE}
    process = subprocess.Popen([sys.executable, "-m", "graft", *command], env=environment, stderr=subprocess.DEVNULL)
    store, deadline = Store(tmp_path / "store"), time.monotonic() + 300
    while not (store.folder.exists() and store.records()) and time.monotonic() < deadline:
        time.sleep(0.02)
    started = children(process.pid)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    while any(map(alive, started)) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert started and not any(map(alive, started))
    times = {file.name: file.stat().st_mtime_ns for file in store.folder.glob("[!.]*")}
    before = {r.configuration.id for r in store.records()}  # each of them is whole
    assert {Path(name).stem for name in times} == before and 0 < len(before) < 3
    assert not (tmp_path / "answers.jsonl").exists()

    capsys.readouterr()
    assert command_line(command) == 0
    out, err = capsys.readouterr()
    (lora,), records = json.loads(out), store.records()
    assert len(records) == 3 and f"of {2 - len(before)} runs" in err  # two rates and one seed
    assert all((store.folder / name).stat().st_mtime_ns == time for name, time in times.items())
    assert {r.configuration.id for r in read(tmp_path / "answers.jsonl")} == {r.configuration.id for r in records}
    (last,) = [r for r in records if "test" in r.metrics]
    tried = {r.configuration.training["learning_rate"]: r for r in records if r is not last}
    assert lora["seeds"] == [0] and tried.keys() == {1e-3, 1e-2} and lora["at_end_of_grid"]
    assert lora["test"]["loss"] == {"mean": last.metrics["test"]["loss"], "sd": None}
    assert last.metrics["validation"] == tried[lora["learning_rate"]].metrics["validation"]
