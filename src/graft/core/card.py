"""The model cards of saved adapters."""

import os
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from torch import nn

from ..version import __version__
from .hyper import hyperparameters
from .names import HUB_ID, SHIPPED
from .quantise import scheme_of

if TYPE_CHECKING:
    from .adapter import Adapter
    from .formats import Format

CARD = "README.md"


def class_name(model: nn.Module) -> str:
    """The class of a model, also while it carries deltas itself."""
    return getattr(model, "host_class", type(model)).__name__


def card(adapter: "Adapter", base: str | None, form: "type[Format]", title: str) -> str:
    """README.md of one adapter, with the front matter that hubs read."""
    cls, recipe, model = adapter.recipe.method, adapter.recipe, adapter.model
    known = hyperparameters(cls)
    rows = [f"| {name} | {_words(value)} | {known[name].doc} |" for name, value in recipe.hyper.items()]
    heads = [path for path, _ in adapter.heads]
    about = " ".join((cls.__doc__ or cls.name).strip().partition("\n\n")[0].split())
    lines = [
        *_top([cls.name], base, form, title),
        f"A {cls.__name__} adapter for {_named(model, base)}: "
        f"{_count(adapter):,} parameters at {len(adapter.deltas) - len(heads)} modules"
        + (f", with the trained heads {', '.join(f'`{h}`' for h in heads)}." if heads else "."),
        "",
        f"> {about}",
        "",
        *_loading(model, base, title),
        *(["", form.loading.format(title=title)] if form.loading else []),
        "",
        "## Hyperparameters",
        "",
        "| name | value | meaning |",
        "|---|---|---|",
        *rows,
        "",
        f"Seed {adapter.seed}; saved by graft {__version__}.",
        *_papers([adapter]),
    ]
    return "\n".join(lines) + "\n"


def chain_card(
    adapters: dict[str, "Adapter"], active: tuple[str, ...], base: str | None, form: "type[Format]", title: str
) -> str:
    """README.md of a folder of several adapters, innermost first."""
    model = next(iter(adapters.values())).model
    methods = [a.recipe.method for a in adapters.values()]
    rows = [
        f"| [{name}]({name}/{CARD}) | {a.recipe.method.__name__} | {'yes' if name in active else 'no'} | "
        f"{_count(a):,} | {len(a.deltas) - len(a.heads)} | {', '.join(f'`{path}`' for path, _ in a.heads)} |"
        for name, a in adapters.items()
    ]
    lines = [
        *_top([cls.name for cls in methods], base, form, title),
        f"{len(adapters)} adapters for {_named(model, base)}, in the order of their chain, innermost first:",
        "",
        "| adapter | method | runs | parameters | modules | heads |",
        "|---|---|---|---|---|---|",
        *rows,
        "",
        *_loading(model, base, title),
        "",
        f"The order is part of what they compute, and `graft.load` restores it. Each folder is an adapter of its own: "
        f"`graft.load(model, {f'{title}/{next(iter(adapters))}'!r})`.",
        "",
        f"Saved by graft {__version__}.",
        *_papers(adapters.values()),
    ]
    return "\n".join(lines) + "\n"


def _on_hub(base: str | None) -> bool:
    return base is not None and HUB_ID.fullmatch(base) is not None and not os.path.exists(base)


def _ships(base: str | None) -> bool:
    return base is not None and base.startswith(SHIPPED)


def _named(model: nn.Module, base: str | None) -> str:
    if _ships(base):
        return f"`{base}`"
    return f"[{base}](https://huggingface.co/{base})" if _on_hub(base) else f"a {class_name(model)}"


def _top(methods: Iterable[str], base: str | None, form: "type[Format]", title: str) -> list[str]:
    tags = ", ".join(dict.fromkeys((form.name, *methods, "adapter")))
    front = {"library_name": form.library, "tags": f"[{tags}]"}
    if _on_hub(base):
        front |= {"base_model": base, "base_model_relation": "adapter"}
    return ["---", *(f"{key}: {value}" for key, value in front.items()), "---", "", f"# {title}", ""]


def _loading(model: nn.Module, base: str | None, title: str) -> list[str]:
    if _ships(base):
        load = f"base = graft.load_adapted({base!r}, {title!r})  # base.model, base.processor"
        return ["## How to load it", "", "```python", "import graft", load, "```"]
    kind = class_name(model)
    make = [f"model = ...  # the base, a {kind}"]
    if _on_hub(base):
        make = [f"from transformers import {kind}", f"model = {kind}.from_pretrained({base!r})"]
    if scheme := scheme_of(model):
        make.append(f"graft.quantise(model, {scheme!r})  # as it was in training")
    return ["## How to load it", "", "```python", "import graft", *make, f"graft.load(model, {title!r})", "```"]


def _papers(adapters: Iterable["Adapter"]) -> list[str]:
    papers = dict.fromkeys(p for a in adapters for p in a.recipe.method.papers)
    return [
        *(["", "## Papers", ""] if papers else []),
        *(f"- {p.title}. {p.authors}, {p.year}. <{p.url}>" for p in papers),
    ]


def _count(adapter: "Adapter") -> int:
    return sum(p.numel() for p in adapter.parameters())


def _words(value: Any) -> str:
    if isinstance(value, dict):
        return "by module: " + ", ".join(sorted({_words(v) for v in value.values()}))
    return f"`{value}`".replace("|", "\\|").replace("\n", " ")
