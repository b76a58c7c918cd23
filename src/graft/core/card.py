"""The model card of a saved adapter."""

import os
import re
from typing import TYPE_CHECKING, Any

from torch import nn

from ..version import __version__
from .hyper import hyperparameters

if TYPE_CHECKING:
    from .adapter import Adapter
    from .formats import Format

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def class_name(model: nn.Module) -> str:
    """The class of a model, also while it carries deltas itself."""
    return getattr(model, "host_class", type(model)).__name__


def card(adapter: "Adapter", base: str | None, form: "Format", title: str) -> str:
    """README.md, with the front matter that hubs read."""
    cls, recipe, model = adapter.recipe.method, adapter.recipe, adapter.model
    on_hub = base is not None and HUB_ID.fullmatch(base) and not os.path.exists(base)
    front = {"library_name": form.library, "tags": f"[{', '.join(dict.fromkeys((form.name, cls.name, 'adapter')))}]"}
    if on_hub:
        front |= {"base_model": base, "base_model_relation": "adapter"}
    kind = class_name(model)
    known = hyperparameters(cls)
    rows = [f"| {name} | {_words(value)} | {known[name].doc} |" for name, value in recipe.hyper.items()]
    heads = [path for path, _ in adapter.heads]
    count = sum(p.numel() for p in adapter.parameters())
    make = [f"model = ...  # the base, a {kind}"]
    if on_hub:
        make = [f"from transformers import {kind}", f"model = {kind}.from_pretrained({base!r})"]
    about = " ".join((cls.__doc__ or cls.name).strip().partition("\n\n")[0].split())
    lines = [
        "---",
        *(f"{key}: {value}" for key, value in front.items()),
        "---",
        "",
        f"# {title}",
        "",
        f"A {cls.__name__} adapter for {f'[{base}](https://huggingface.co/{base})' if on_hub else f'a {kind}'}: "
        f"{count:,} parameters at {len(adapter.deltas) - len(heads)} modules"
        + (f", with the trained heads {', '.join(f'`{h}`' for h in heads)}." if heads else "."),
        "",
        f"> {about}",
        "",
        "## How to load it",
        "",
        "```python",
        "import graft",
        *make,
        f"graft.load(model, {title!r})",
        "```",
        *(["", form.loading.format(title=title)] if form.loading else []),
        "",
        "## Hyperparameters",
        "",
        "| name | value | meaning |",
        "|---|---|---|",
        *rows,
        "",
        f"Seed {adapter.seed}; saved by graft {__version__}.",
        "",
        *(["## Papers", ""] if cls.papers else []),
        *(f"- {p.title}. {p.authors}, {p.year}. <{p.url}>" for p in cls.papers),
    ]
    return "\n".join(lines) + "\n"


def _words(value: Any) -> str:
    if isinstance(value, dict):
        return "by module: " + ", ".join(sorted({_words(v) for v in value.values()}))
    return f"`{value}`".replace("|", "\\|").replace("\n", " ")
