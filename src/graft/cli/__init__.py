"""The command line: one file a command, found by its name and thin, since the library does the work.

A file `NAME.py` here holds a function of the same name, whose arguments are the command's options; files that begin
with an underscore are no commands. A command whose options depend on what is asked (those of a method) has beside it
a function `options(args)` that gives the further ones. Heavy imports stand inside the functions.
"""

import importlib
import inspect
import logging
import pkgutil
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import typer

from ..core.errors import GraftError
from ..version import __version__

Refused = typer.BadParameter.__mro__[2]  # the base of what typer raises; only new versions export it


def main() -> None:
    """The program `graft`."""
    sys.exit(run(sys.argv[1:]))


def run(args: Sequence[str]) -> int:
    """Run one command line. Returns its exit code: 0; 2 for what cannot be done; 130 when interrupted.

    Anything else that goes wrong is a bug and keeps its traceback.
    """
    args, debug = [a for a in args if a != "--debug"], "--debug" in args
    shown = warnings.showwarning
    if not debug:
        warnings.showwarning = _warn
        for name in ("torchao", "torch.utils._pytree"):  # torchao, once installed, complains in every command
            logging.getLogger(name).setLevel(logging.ERROR)
    try:
        return _program(args)(args, prog_name="graft", standalone_mode=False) or 0
    except (KeyboardInterrupt, typer.Abort):
        return 130
    except Exception as error:
        said = _sentence(error, args)
        if debug or said is None:
            raise
        if said:
            print(f"graft: {' '.join(said.split())}", file=sys.stderr)
        return 2
    finally:
        warnings.showwarning = shown


def commands() -> list[str]:
    """The names of the commands."""
    return sorted(m.name for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_"))


def _program(args: Sequence[str]) -> Callable[..., Any]:
    """The command line as far as `args` need it: the command which they name, or all of them for the overview."""
    app = typer.Typer(
        help="Adapt pre-trained PyTorch models: train a few parameters beside a frozen base model, and use the result.",
        epilog="An error is one line on stderr and exit code 2; graft --debug COMMAND ... shows where it came from.",
        add_completion=False,
        no_args_is_help=True,
        context_settings={"help_option_names": ["--help", "-h"]},
    )
    app.callback()(_common)
    asked = _asked(args)
    for name in [asked] if asked else commands():
        module = importlib.import_module(f".{name}", __name__)
        function = getattr(module, name)
        if asked and hasattr(module, "options"):
            function = _with(function, module.options(args))
        paragraphs = (inspect.getdoc(function) or "").split("\n\n")
        text = "\n\n".join(" ".join(p.split()) for p in paragraphs)
        app.command(name, help=text, no_args_is_help=_takes_arguments(function))(function)
    return typer.main.get_command(app)


def _asked(args: Sequence[str]) -> str | None:
    first = next((a for a in args if not a.startswith("-")), None)
    return first if first in commands() else None


def _version(asked: bool) -> None:
    if asked:
        print(f"graft {__version__}")
        raise typer.Exit()


def _common(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """What all commands share; `run` has taken --debug out already."""


def _with(function: Callable, options: Sequence[inspect.Parameter]) -> Callable:
    """`function`, which takes **keywords, with these ones in its signature."""
    signature = inspect.signature(function)
    own = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]

    def called(**given: Any) -> Any:
        return function(**given)

    called.__doc__ = function.__doc__
    called.__signature__ = signature.replace(parameters=[*own, *options])  # type: ignore
    return called


def _takes_arguments(function: Callable) -> bool:
    parameters = inspect.signature(function).parameters.values()
    return any(p.default is p.empty and p.kind is not p.VAR_KEYWORD for p in parameters)


def _warn(message: Any, category: type, *where: Any, **more: Any) -> None:
    """A warning that is meant for users, as one line."""
    if issubclass(category, UserWarning):
        print(f"graft: warning: {' '.join(str(message).split())}", file=sys.stderr)


def _sentence(error: Exception, args: Sequence[str]) -> str | None:
    """What to tell the user about an error, or None if it is a bug."""
    if isinstance(error, Refused):
        message, asked = error.format_message().rstrip("."), _asked(args)  # type: ignore
        if not message:
            return ""  # called without arguments, and helped
        return f"{message} (graft {f'{asked} ' if asked else ''}--help lists what there is)"
    if isinstance(error, GraftError):
        return str(error)
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    if isinstance(error, MemoryError) or "out of memory" in str(error) or "can't allocate memory" in str(error):
        return "memory ran out: use a smaller model, --dtype bfloat16, a smaller --batch-size or a shorter --max-length"
    return None
