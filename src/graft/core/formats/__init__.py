"""Formats of saved adapters: a file in this folder is one, found without being listed anywhere.

A method says in a table, an attribute of its class, how a format stores it (see peft.py, lycoris.py, adapter_hub.py).
What a file of another library holds and we have not is refused by name, never left out; so is what we hold and the
other library has not.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..errors import GraftError
from ..folder import CONFIG, TENSORS
from ..loading import load_all

if TYPE_CHECKING:
    from ..adapter import Adapter
    from ..delta import Delta
    from ..recipe import Recipe
    from ..site import Site

OWN = "save it in graft's own format"
FORMATS: dict[str, type["Format"]] = {}
Fingerprints = Callable[[tuple[str, ...]], str | None]  # of one model, by the modules that do not count


@dataclass
class Saved:
    """What a file or folder holds, in whatever format."""

    recipe: "Recipe"
    modules: list[str]
    heads: list[str]
    tensors: dict[str, Tensor]  # as in Adapter.state_dict
    targets: Any = None  # as the user gave them
    name: str = "default"
    seed: int = 0
    dtype: torch.dtype | None = None
    task: dict[str, Any] = field(default_factory=dict)


class Format:
    """One way to keep an adapter on disk: `class KohyaFormat(Format, name="kohya")` registers it.

    A format does not touch the disk: folder.py does, which checks names, sizes and links and never unpickles.
    `prints` gives the fingerprint of the base; without it, none is written and any base is taken.
    """

    name: str
    title = ""  # how people call the library
    table = ""  # the attribute of a method's class that tells how the library stores it, or in words why it does not
    single = False  # one .safetensors file instead of a folder
    as_it_is = False  # whether deltas are kept in the form that training gave them, see `Delta.absorbed`
    files: tuple[str, ...] = (CONFIG, TENSORS)  # what a folder holds
    optional: tuple[str, ...] = ()  # what it may hold besides
    sign = ""  # what in adapter_config.json tells it, for people
    library = ""  # how model hubs call the library that reads it
    loading = ""  # a sentence of the model card, with {title} for the folder

    def __init_subclass__(cls, name: str = "", **kwargs):
        super().__init_subclass__(**kwargs)
        if name:
            cls.name = name
            FORMATS[name] = cls

    @classmethod
    def stored(cls, method: type["Delta"]) -> Any:
        """How the library stores a method; None, or the reason in words, where it does not."""
        return getattr(method, cls.table, None)

    @classmethod
    def check(cls, method: type["Delta"]) -> Any:
        """`stored`, refusing a method that the library does not store."""
        found = cls.stored(method)
        if found is None or isinstance(found, str):
            raise GraftError(f"{cls.title} has no format for {method.name}{f' ({found})' if found else ''}: {OWN}")
        return found

    def __init__(self, prints: Fingerprints | None = None):
        self.prints = prints

    @classmethod
    def recognises(cls, config: dict[str, Any] | None) -> bool:
        """Whether a folder with this adapter_config.json, or a single file (None), is of this format."""
        return False

    def read(self, model: nn.Module, parts: dict[str, dict[str, Any]]) -> Saved:
        """The adapter for `model` in `parts`: tensors and JSON objects by file; of a single file by ""."""
        raise NotImplementedError

    def write(self, adapter: "Adapter", base: str | None) -> dict[str, bytes]:
        """The content of the files, by name as in `read`. `base` is the base's id or folder, if known."""
        raise NotImplementedError

    @classmethod
    def facts(cls, config: dict[str, Any], keys: list[str]) -> dict[str, Any]:
        """method, base, base_fingerprint, sites (a number) and heads, as far as configuration and names of tensors
        tell."""
        return {}


@dataclass(frozen=True)
class As:
    """A tensor in another library's files: its name there, and how its values are laid out."""

    name: str
    write: Callable[["Site", Tensor], Tensor] = lambda site, value: value  # ours at the site -> theirs
    read: Callable[["Site", Tensor], Tensor] = lambda site, value: value  # theirs -> ours
    optional: bool = False  # whether some sites lack it


def load() -> None:
    """Import every format."""
    load_all(__name__)


def file_names() -> list[str]:
    """What a folder of an adapter may hold beside the model card, in whatever format."""
    load()
    return sorted({name for form in FORMATS.values() for name in (*form.files, *form.optional)})
