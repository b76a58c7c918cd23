"""Options from signatures: the keyword arguments of a library function are options here and keys of a recipe file.

Whatever a function or a method takes, with its type, default and allowed values, is written once, where it is used.
"""

import inspect
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from ..core.errors import GraftError
from ..core.hyper import Hyper, hyperparameters, keywords
from ._output import write_whole


@dataclass(frozen=True)
class Setting:
    """One option: its name in recipes (`learning_rate`; --learning-rate as an option), what it takes, and its help."""

    name: str
    hyper: Hyper
    help: str
    panel: str

    @property
    def option(self) -> str:
        return f"--{self.name.replace('_', '-')}"

    @property
    def _key(self) -> str:
        return self.name.replace(".", "__")

    @property
    def _flag(self) -> bool:
        return bool in self.hyper.kinds

    def parameters(self) -> list[inspect.Parameter]:
        """For typer: a text, which `read` parses later, or a flag against the default (and a hidden one for it)."""
        from rich.markup import escape

        default, off = self.hyper.default, f"--no-{self.option[2:]}"
        shown = "" if self._flag or default in (inspect.Parameter.empty, None, ()) else f" [default: {default}]"
        text, panel = escape(f"{self.help}{shown}"), self.panel
        if not self._flag:
            option = typer.Option(self.option, help=text, rich_help_panel=panel, metavar=self._metavar())
            return [_parameter(self._key, str | None, option)]
        names = (off, self.option) if default is True else (self.option, off)
        if default is True:
            text = f"Not: {text}"
        seen = typer.Option(names[0], help=text, rich_help_panel=panel)
        return [
            _parameter(f"{self._key}{'__not' * (names[0] == off)}", bool | None, seen),
            _parameter(f"{self._key}{'__not' * (names[1] == off)}", bool | None, typer.Option(names[1], hidden=True)),
        ]

    def given(self, options: Mapping[str, Any]) -> Any:
        """What the command line says, or None."""
        if self._flag and options.get(f"{self._key}__not"):
            return False
        return options.get(self._key)

    def _metavar(self) -> str:
        names = {int: "INT", float: "FLOAT", Mapping: "A=B,...", Sequence: "A,B,..."}
        kinds = [k for k in self.hyper.kinds if isinstance(k, type)]
        return names.get(kinds[-1], "TEXT") if kinds else "TEXT"

    def read(self, given: Any) -> Any:
        """The value of a text of the command line, or of an entry of a recipe."""
        if isinstance(given, str) and self._takes(Sequence) and not all(split(given)):
            raise GraftError(
                f"{self.name}={given!r} has an empty entry: name one thing or several, with commas between"
            )
        for value in self._readings(given):
            if isinstance(value, dict) and all(self._accepts(v) for v in value.values()):
                return value  # by module, or a mapping
            if self._accepts(value):
                return value
        raise GraftError(f"{self.name} must be {self.hyper.allowed()}, not {given!r}")

    def _takes(self, kind: type) -> bool:
        return any(isinstance(k, type) and issubclass(k, kind) and k is not str for k in self.hyper.kinds)

    def _accepts(self, value: Any) -> bool:
        return self.hyper.accepts(value) and (not isinstance(value, str) or self._is_text())

    def _is_text(self) -> bool:
        """A text is a sequence for Python, but no list of names."""
        return str in self.hyper.kinds or not self._takes(Sequence)

    def _readings(self, given: Any) -> list[Any]:
        """What a text may mean, the likeliest first."""
        if not isinstance(given, str):
            return [given]
        parts = split(given)
        pairs = [part.partition("=") for part in parts]
        readings = [load_yaml(given), given, [load_yaml(part) for part in parts]]
        if given.lower() == "none":
            readings.insert(0, None)
        if self._takes(Sequence) and len(parts) > 1:
            readings.insert(0, readings[-1])
        if self._takes(Mapping) and all(equals and re.fullmatch(r"[\w-]+", k.strip()) for k, equals, _ in pairs):
            readings.insert(0, {k.strip(): load_yaml(v) for k, _, v in pairs})
        return readings


def _parameter(name: str, kind: Any, option: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind, option])


def parameters(known: Iterable[Setting]) -> list[inspect.Parameter]:
    """Of several settings, for typer."""
    return [p for setting in known for p in setting.parameters()]


def values(known: Iterable[Setting], options: Mapping[str, Any]) -> dict[str, Any]:
    """What a command line gives, by name."""
    return {s.name: s.read(given) for s in known if (given := s.given(options)) is not None}


def settings(
    function: Callable, panel: str, leave_out: Iterable[str] = (), like: Callable | None = None
) -> list[Setting]:
    """Of the keyword arguments of a library function; its docstring, or that of a function `like` it, explains them."""
    said = {**(documented(like) if like else {}), **documented(function)}
    return [Setting(n, h, h.doc or said.get(n, ""), panel) for n, h in keywords(function).items() if n not in leave_out]


def method_settings(cls: Any, taken: Iterable[str]) -> list[Setting]:
    """Of the hyperparameters of a method; where a name is `taken`, with the method's before it: --adalora.warmup."""
    taken = set(taken)
    return [
        Setting(f"{cls.name}.{n}" if n in taken else n, h, _said(h), f"The method {cls.name}")
        for n, h in hyperparameters(cls).items()
    ]


def _said(hyper: Hyper) -> str:
    """The meaning of a hyperparameter with its choices and bounds."""
    choices = "|".join(str(k) for k in hyper.kinds if not isinstance(k, type) and k is not None)
    bounds = ", ".join(filter(None, [choices, *map(str, hyper.ranges)]))
    return f"{hyper.doc} ({bounds})" if bounds else hyper.doc


def documented(function: Callable) -> dict[str, str]:
    """What a docstring says about arguments: lines `name, name   text`, and `; name: text` within such a text."""
    names = inspect.signature(function).parameters
    found: dict[str, str] = {}
    texts: list[tuple[list[str], str]] = []
    for line in inspect.cleandoc(function.__doc__ or "").splitlines():
        head = re.match(r"(\w+(?:, \w+)+|\w+(?=  )) +(.+)", line)
        if head and set(head[1].split(", ")) <= set(names):
            texts.append((head[1].split(", "), head[2]))
        elif line.startswith("  ") and texts:
            texts[-1] = (texts[-1][0], f"{texts[-1][1]} {line.strip()}")
    for own, text in texts:
        first, *others = re.split(rf"; (?=(?:{'|'.join(names)}): )", text)
        found |= dict.fromkeys(own, first)
        found |= {name: said for name, _, said in (other.partition(": ") for other in others)}
    return found


def split(text: str) -> list[str]:
    """At commas outside brackets."""
    return [part.strip() for part in re.split(r",(?![^\[\](){}]*[\])}])", text)]


# Recipe files


def read_recipe(path: str | Path) -> dict[str, Any]:
    """The entries of a YAML file, whose names are those of the options, with _ or -."""
    file = Path(path).expanduser()
    if not file.is_file():
        raise GraftError(f"there is no recipe {file}")
    try:
        content = load_yaml(file.read_text(encoding="utf-8"), whole=True)
    except ValueError as error:
        raise GraftError(f"{file} is no valid YAML: {error}") from None
    if not isinstance(content, dict):
        raise GraftError(f"{file} must hold entries `name: value`, such as `method: lora`")
    return {str(k).replace("-", "_"): v for k, v in content.items()}


def write_recipe(path: str | Path, values: Mapping[str, Any]) -> None:
    """The settings as a YAML file that `read_recipe` reads; those that are None are left out."""
    import yaml

    from ..catalogue import plain

    given = {k: v for k, v in values.items() if v is not None}
    write_whole(path, yaml.safe_dump(plain(given), sort_keys=False, allow_unicode=True))


def load_yaml(text: str, whole: bool = False) -> Any:
    """YAML as of version 1.2: 1e-4 is a number; yes, no and dates are texts. `whole`: refuse what is no YAML."""
    import yaml

    try:
        return yaml.load(text, Loader=_loader())
    except yaml.YAMLError as error:
        if whole:
            mark = getattr(error, "problem_mark", None)
            where = f" in line {mark.line + 1}" if mark else ""
            raise ValueError(f"{getattr(error, 'problem', None) or error}{where}") from None
        return text


def _loader() -> Any:
    import yaml

    class Loader(yaml.SafeLoader):
        yaml_implicit_resolvers = {}

    patterns = {
        "bool": (r"true|True|TRUE|false|False|FALSE", "tTfF"),
        "null": (r"null|Null|NULL|~|", ["n", "N", "~", ""]),
        "int": (r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
        "float": (r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.inf|\.nan", "-+.0123456789"),
    }  # fmt: skip
    for kind, (pattern, first) in patterns.items():
        Loader.add_implicit_resolver(f"tag:yaml.org,2002:{kind}", re.compile(rf"(?:{pattern})$"), list(first))
    return Loader
