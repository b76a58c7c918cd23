"""How the program starts: what it imports, what it lists, how it ends."""

import signal
import subprocess
import sys

import pytest
import typer

from graft import cli
from graft.cli import commands, run

HEAVY = ("torch", "transformers", "numpy", "datasets", "accelerate", "yaml")


@pytest.mark.parametrize("args", [["--help"], ["methods", "--help"], ["show", "--help"], ["bases"], ["--version"]])
def test_overview_and_light_commands_import_nothing_heavy(args):
    program = (
        f"import sys; from graft.cli import run; code = run({args!r}); "
        f"print([m for m in {HEAVY!r} if m in sys.modules], file=sys.stderr); sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0
    assert done.stderr.strip() == "[]"


def test_importing_the_library_does_not_import_the_command_line():
    program = "import sys, graft; print([m for m in ('typer', 'rich', 'torch') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.strip() == "[]"


def test_the_overview_lists_every_command(graft):
    done = graft("--help")
    assert done.code == 0
    assert {"eval", "generate", "merge", "methods", "predict", "show", "tune"} <= set(commands())
    assert all(f" {name} " in done.out for name in commands())


@pytest.mark.parametrize("name", commands())
def test_the_help_of_a_command_explains_every_option(graft, monkeypatch, name):
    monkeypatch.setenv("COLUMNS", "200")
    seen = {}
    ask = typer.main.get_command

    def keep(app):
        seen["program"] = ask(app)
        return seen["program"]

    monkeypatch.setattr(typer.main, "get_command", keep)
    done = graft(name, "--help")
    assert done.code == 0
    options = [p for p in seen["program"].commands[name].params if not getattr(p, "hidden", False)]
    for option in options:
        assert option.opts[-1] in done.out or option.metavar in done.out
        assert option.help, f"{name}: {option.name} has no help"


def test_a_file_is_a_command(tmp_path, monkeypatch, graft):
    (tmp_path / "hello.py").write_text('def hello(name: str) -> None:\n    """Greet."""\n    print(f"hello {name}")\n')
    monkeypatch.setattr(cli, "__path__", [*cli.__path__, str(tmp_path)])
    assert "hello" in commands()
    assert graft("hello", "you").out == "hello you\n"
    assert "Greet." in graft("--help").out


def test_no_arguments_show_the_help(graft):
    done = graft()
    assert "Usage" in done.out + done.err


def test_a_bug_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr("graft.catalogue.catalogue", lambda family: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(["methods"])


def test_debug_shows_where_an_error_comes_from():
    with pytest.raises(ValueError, match="no method"):
        run(["tune", "--method", "nope", "--debug"])


def test_out_of_memory_is_one_line(monkeypatch, graft):
    def full(family):
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried 1 bytes")

    monkeypatch.setattr("graft.catalogue.catalogue", full)
    done = graft("methods")
    assert done.code == 2
    assert done.err.startswith("graft: memory ran out") and done.err.count("\n") == 1


def test_a_pipe_that_closes_is_no_error():
    program = "from graft.cli import main; import sys; sys.argv = ['graft', 'methods', '--json']; main()"
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    assert process.wait() == 1
    assert process.stderr.read() == b""


def test_an_interruption_is_quiet(tmp_path):
    program = (
        "import sys, graft.catalogue, time\n"
        "graft.catalogue.catalogue = lambda family: (print('waiting', flush=True, file=sys.stderr), time.sleep(60))\n"
        "from graft.cli import main; sys.argv = ['graft', 'methods']; main()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program], stderr=subprocess.PIPE, stdout=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored below a shell in the background
    )  # fmt: skip
    assert process.stderr.readline() == b"waiting\n"
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 130
    assert process.stderr.read() == b""
