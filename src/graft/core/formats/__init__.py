"""Formats of saved adapters: a file in this folder is one, found without being listed anywhere.

A method says in a table, an attribute of its class, how a format stores it (see peft.py, lycoris.py, adapter_hub.py).
What a file of another library holds and we have not is refused by name, never left out; so is what we hold and the
other library has not.
"""

import functools
import importlib
import json
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import safetensors.torch
import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from ..adapter import Adapter
    from ..recipe import Recipe
    from ..site import Site

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
OWN = "save it in graft's own format"
FORMATS: dict[str, "Format"] = {}


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
    """One way to keep an adapter on disk: `class Kohya(Format, name="kohya")`, of which one object is registered.

    A format does not touch the disk: files.py does, which checks names, sizes and links and never unpickles.
    """

    name: str
    single = False  # one .safetensors file instead of a folder
    files: tuple[str, ...] = (CONFIG, TENSORS)  # what a folder holds
    optional: tuple[str, ...] = ()  # what it may hold besides
    sign = ""  # what in adapter_config.json tells it, for people
    library = ""  # how model hubs call the library that reads it
    loading = ""  # a sentence of the model card, with {title} for the folder

    def __init_subclass__(cls, name: str = "", **kwargs):
        super().__init_subclass__(**kwargs)
        if name:
            cls.name = name
            FORMATS[name] = cls()

    def recognises(self, config: dict[str, Any] | None) -> bool:
        """Whether a folder with this adapter_config.json, or a single file (None), is of this format."""
        return False

    def read(self, model: nn.Module, parts: dict[str, dict[str, Any]]) -> Saved:
        """The adapter for `model` in `parts`: tensors and JSON objects by file; of a single file by ""."""
        raise NotImplementedError

    def write(self, adapter: "Adapter", base: str | None) -> dict[str, bytes]:
        """The content of the files, by name as in `read`. `base` is the base's id or folder, if known."""
        raise NotImplementedError

    def facts(self, config: dict[str, Any] | None, keys: list[str]) -> dict[str, Any]:
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


@functools.cache
def load() -> None:
    """Import every format."""
    for module in pkgutil.iter_modules(__path__, f"{__name__}."):
        importlib.import_module(module.name)


def packed(state: dict[str, Tensor]) -> bytes:
    """A safetensors file."""
    plain = {key: value.detach().to("cpu", copy=True).contiguous() for key, value in state.items()}
    return safetensors.torch.save(plain, {"format": "pt"})


def as_json(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()
