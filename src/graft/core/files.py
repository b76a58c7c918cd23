"""Adapters as folders: adapter_model.safetensors, adapter_config.json and a model card, README.md.

Several adapters are one folder with a folder for each of them, and adapters.json, which holds the order of their chain.
The formats of other libraries are in formats/.
Nothing is ever unpickled, nothing is half-written, and a file that cannot be loaded leaves the model as it was.
"""

import functools
import os
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import nn

from ..version import __version__
from .adapter import HEADS, Adapter
from .card import card, chain_card, class_name
from .delta import is_finite
from .errors import GraftError
from .fingerprint import fingerprint
from .folder import (
    CARD,
    CHAIN,
    CONFIG,
    TENSORS,
    json_bytes,
    locate,
    own_file,
    read_json,
    read_tensors,
    write,
    write_file,
)
from .formats import FORMATS, Fingerprints, Format, Saved, file_names
from .formats import load as load_formats
from .formats.graft import FORMAT, check_format, checksum
from .host import base_modules
from .recipe import ByPath, Recipe
from .registry import NAME, activate, adapters, registry, unwrapped
from .targets import resolve


def save_adapter(
    adapter: Adapter,
    folder: str | os.PathLike,
    *,
    overwrite: bool = False,
    base_model: str | None = None,
    format: str = "graft",
) -> None:
    """Write `adapter` as a folder, or as one file where the format is one.

    overwrite   replace what is there already, one adapter or several (never a folder which holds anything else)
    base_model  the base's id on the Hugging Face hub or its folder; left out, what its configuration says
    format      "graft", or that of another library wherever it has the method: "peft" (Hugging Face PEFT), "vllm" (a
                LoRA that vLLM serves), "adapters" (the library of AdapterHub), "lycoris" or "kohya" (one .safetensors
                file)

    What is written is written beside its place and renamed: it is complete, or it is not there. GraftError if the
    place is taken, if a tensor holds NaN or infinity, or if the other library computes nothing of the kind.
    """
    place = Path(folder)
    files = _contents(adapter, place.resolve().name, base_model, format, fingerprints(adapter.model))
    if FORMATS[format].single:
        write_file(place, files[""], overwrite)
    else:
        write(place, files, overwrite, file_names())


def save(
    model: nn.Module,
    folder: str | os.PathLike,
    names: Iterable[str] | None = None,
    *,
    overwrite: bool = False,
    base_model: str | None = None,
    format: str = "graft",
) -> None:
    """Write the adapters on `model` as one folder: their order in the chain and which of them run come back with them.

    names  of the adapters to save; all of them if left out

    Each adapter is a folder inside, named like it, which can be loaded alone, in the `format` "peft" also by PEFT.
    The other arguments are those of `Adapter.save`; the whole is written beside its place and renamed. GraftError, and
    nothing is written, if one of the adapters cannot be saved.
    """
    place, found = Path(folder), registry(model)
    if found is None:
        raise GraftError(f"{class_name(model)} carries no adapter")
    wanted = list(found.adapters) if names is None else [names] if isinstance(names, str) else list(names)
    if unknown := [n for n in wanted if n not in found.adapters]:
        raise GraftError(f"no adapter is called {unknown[0]!r}; the model has {', '.join(found.adapters)}")
    if not wanted:
        raise GraftError(f"names is empty: the model has {', '.join(found.adapters)}")
    chosen = {name: adapter for name, adapter in found.adapters.items() if name in wanted}
    title, prints = place.resolve().name, fingerprints(found.model)
    files, entries = {}, []
    for name, adapter in chosen.items():
        own = _contents(adapter, f"{title}/{name}", base_model, format, prints)
        if FORMATS[format].single:
            raise GraftError(f"a file of the format {format!r} holds one adapter: save each with Adapter.save")
        files |= {f"{name}/{file}": content for file, content in own.items()}
        sums = {file: zlib.crc32(content) for file, content in own.items() if file != CARD}
        entries.append({"name": name, "active": name in found.active, "crc32": sums})
    chain = {"format": "graft", "format_version": FORMAT, "library_version": __version__, "adapters": entries}
    files[CHAIN] = json_bytes(chain | {"checksum": checksum(chain)})
    files[CARD] = chain_card(chosen, found.active, _base(found.model, base_model), FORMATS[format], title).encode()
    write(place, files, overwrite, file_names())


def load(
    model: nn.Module,
    folder: str | os.PathLike,
    *,
    name: str | Mapping[str, str] | None = None,
    trainable: bool = False,
    heads: Any = None,
    allow_other_base: bool = False,
    revision: str | None = None,
) -> Any:
    """Put what was saved on `model`: a local folder or file or an id on the Hugging Face hub, in any format.

    name              of the adapter on the model, or {saved name: name} of several; by default as they were saved
    trainable         go on training; frozen if left out
    heads             modules to train whole, named as for `attach`, that begin with the model's own values, in place of
                      the heads that were saved: for another task than the one that the adapter comes from. So begun,
                      pre-trained on much data of a kindred task, adapters need fewer examples than from random values
                      (PVP: Pre-trained Visual Parameter-Efficient Tuning. Song et al., 2023.
                      https://arxiv.org/abs/2304.13639)
    allow_other_base  load onto weights it was not trained on, too; shapes must fit in any case
    revision          of a repository on the hub

    Returns the `Adapter`; for a folder of several adapters {name: Adapter}, innermost first. These come outside of
    those that are on the model, in the order and as active as they were saved.

    GraftError, and the model as it was, for whatever is not sound or not for this base.
    """
    model = unwrapped(model)
    if found := registry(model):
        found.check_unmerged()
    stored, prints, made = parts(folder, revision), fingerprints(model), {}
    names = _names(name, stored, adapters(model))
    for part, chosen in zip(stored, names):
        try:
            saved = read(model, part, None if allow_other_base else prints)
            if heads is not None:
                saved = _without_heads(saved, [path for path, _ in resolve(model, heads, HEADS)] if heads else [])
            adapter = build(model, saved, chosen or saved.name)
            new = {} if heads is None else {k: t for k, t in adapter.state_dict().items() if k not in saved.tensors}
            adapter.load_state_dict(saved.tensors | new)
        except GraftError as error:
            if not part.name:
                raise
            raise GraftError(f"adapter {part.name!r} of {part.root}: {error}") from error
        adapter.task = saved.task if heads is None else {}
        if not trainable:
            adapter.requires_grad_(False)
        made[adapter.name] = adapter
    _attach(model, made.values(), [own for own, part in zip(made, stored) if part.active])
    return made if stored[0].name else next(iter(made.values()))


@dataclass(frozen=True)
class Part:
    """A saved adapter: a file, a folder's only one, without a name, or one of several in the order of their chain."""

    root: Path
    name: str = ""  # and the folder inside `root`
    active: bool = True
    crc32: Mapping[str, int] = field(default_factory=dict)  # of its files

    def config(self) -> dict[str, Any]:
        """Its configuration as it stands, {} of a single file: nothing of it is checked."""
        return {} if self.root.is_file() else read_json(self.path(CONFIG), self.crc32.get(CONFIG))

    def form(self) -> type[Format]:
        """The format it is in."""
        load_formats()
        config = None if self.root.is_file() else self.config()
        for form in FORMATS.values():
            if form.recognises(config):
                return form
        signs = ", ".join(f"{form.name} has {form.sign}" for _, form in sorted(FORMATS.items()) if form.sign)
        raise GraftError(f"{self.root / self.name / CONFIG} is of no format that is known here: {signs}")

    def path(self, name: str) -> Path:
        """A file of its folder."""
        return own_file(self.root, str(Path(self.name, name)))

    def file(self) -> Path:
        """The file of its tensors."""
        return self.root if self.root.is_file() else self.path(next(n for n in self.form().files if n != CONFIG))

    def read(self) -> dict[str, dict[str, Any]]:
        """Tensors and JSON objects by file."""
        if self.root.is_file():
            return {"": read_tensors(self.root)}
        config, form = self.config(), self.form()
        read: dict[str, dict[str, Any]] = {CONFIG: config}
        there = [name for name in form.optional if (self.root / self.name / name).exists()]
        for name in (n for n in (*form.files, *there) if n != CONFIG):
            file, known = self.path(name), self.crc32.get(name)
            if name.endswith(".json"):
                read[name] = read_json(file, known)
            else:
                read[name] = read_tensors(file, known, config.get("tensors_crc32") if name == TENSORS else None)
        return read


def parts(folder: str | os.PathLike, revision: str | None = None) -> list[Part]:
    """The adapters in a folder or in a repository on the hub, innermost first."""
    place = locate(folder, revision, lambda place: [part.name for part in _chain(place)], file_names())
    return _chain(place) if (place / CHAIN).exists() else [Part(place)]


def _chain(place: Path) -> list[Part]:
    chain = read_json(own_file(place, CHAIN))
    if chain.get("format") != "graft":
        raise GraftError(f'{place / CHAIN} is not graft\'s: it lacks "format": "graft"')
    check_format(chain, CHAIN)
    entries = chain.get("adapters")
    if not isinstance(entries, list) or not entries or not all(map(_is_entry, entries)):
        raise GraftError(f"{CHAIN}: adapters must be a list of objects with name, active and crc32, not {entries!r}")
    if len({entry["name"] for entry in entries}) < len(entries):
        raise GraftError(f"{CHAIN}: adapters names one of them twice")
    return [Part(place, entry["name"], entry["active"], entry["crc32"]) for entry in entries]


def _is_entry(entry: Any) -> bool:
    return (
        isinstance(entry, dict)
        and isinstance(entry.get("name"), str)
        and NAME.fullmatch(entry["name"]) is not None
        and isinstance(entry.get("active"), bool)
        and isinstance(entry.get("crc32"), dict)
    )


def content(adapter: Adapter) -> Saved:
    """What a folder of the adapter would hold; the tensors are its own."""
    heads = [path for path, _ in adapter.heads]
    modules = [path for path in adapter.deltas if path not in heads]
    return Saved(
        adapter.recipe, modules, heads, adapter.state_dict(), adapter.targets, seed=adapter.seed,
        dtype=adapter.dtype, task=adapter.task,
    )  # fmt: skip


# Writing


def _contents(
    adapter: Adapter, title: str, base_model: str | None, format: str, prints: Fingerprints
) -> dict[str, bytes]:
    """The files of one adapter."""
    load_formats()
    if format not in FORMATS:
        raise GraftError(f"the format is {' or '.join(map(repr, sorted(FORMATS)))}, not {format!r}")
    if found := registry(adapter.model):
        found.check_unmerged()
    state = adapter.state_dict()
    if not is_finite(state.values()):
        broken = next(key for key, value in state.items() if not is_finite([value]))
        raise GraftError(f"{broken} of adapter {adapter.name!r} holds NaN or infinity: nothing was saved")
    form, base = FORMATS[format], _base(adapter.model, base_model)
    stored = adapter if form.as_it_is else _plain(adapter)
    return {CARD: card(adapter, base, form, title).encode()} | form(prints).write(stored, base)


def _plain(adapter: Adapter) -> Adapter:
    """The adapter in the form which other libraries know: a copy, not on the model, where a delta has another one."""
    absorbed = {path: found for path, delta in adapter.deltas.items() if (found := delta.absorbed()) is not None}
    if not absorbed:
        return adapter
    saved, cls = content(adapter), adapter.recipe.method
    own = {path: adapter.recipe.at(adapter.deltas[path].site) for path in saved.modules}
    own |= {path: own[path] | hyper for path, (hyper, _) in absorbed.items()}
    state = {k: t for k, t in saved.tensors.items() if k.rpartition(":")[0] not in absorbed}
    state |= {f"{path}:{name}": t for path, (_, tensors) in absorbed.items() for name, t in tensors.items()}
    names = {k: ByPath({path: hyper[k] for path, hyper in own.items()}) for k in adapter.recipe.hyper}
    plain = build(adapter.model, replace(saved, recipe=Recipe(cls, names), tensors=state), adapter.name)
    plain.load_state_dict(state)
    plain.task = saved.task
    return plain


def _base(model: nn.Module, given: str | None) -> str | None:
    return given or getattr(getattr(model, "config", None), "_name_or_path", None) or None


def fingerprints(model: nn.Module) -> Fingerprints:
    return functools.cache(functools.partial(fingerprint, model))


# Building


def _names(name: str | Mapping[str, str] | None, stored: list[Part], taken: Iterable[str]) -> list[str | None]:
    """What the adapters in a folder are to be called, where it is known before they are read."""
    held = [part.name for part in stored]
    if held == [""]:
        if isinstance(name, Mapping):
            raise GraftError(f"{stored[0].root} holds one adapter: its name is a text, not {name!r}")
        return [name]
    if isinstance(name, str):
        raise GraftError(f"the folder holds several adapters: name each of them, name={{{held[0]!r}: {name!r}, ...}}")
    table = dict(name or {})
    if unknown := [n for n in table if n not in held]:
        raise GraftError(f"no adapter in the folder is called {unknown[0]!r}; it holds {', '.join(held)}")
    names = [table.get(n, n) for n in held]
    for i, own in enumerate(names):
        if own in taken or own in names[:i]:
            raise GraftError(
                f"the model has an adapter called {own!r} already: detach it, or rename this one with "
                f"name={{{held[i]!r}: another name}}"
            )
    return [*names]


def read(model: nn.Module, part: Part, prints: Fingerprints | None) -> Saved:
    """What a folder or file holds; without `prints` for any base."""
    return part.form()(prints).read(model, part.read())


def _without_heads(saved: Saved, heads: list[str]) -> Saved:
    """With other heads, for which there are no tensors."""
    tensors = {k: t for k, t in saved.tensors.items() if k.rpartition(":")[0] not in {*saved.heads, *heads}}
    return replace(saved, heads=heads, modules=[p for p in saved.modules if p not in heads], tensors=tensors)


def _attach(model: nn.Module, made: Iterable[Adapter], running: list[str]) -> None:
    """Put the adapters on the model, outside those there, and run `running` of them beside those that run; or none."""
    found = registry(model)
    before, done = found.active if found else (), []
    try:
        for adapter in made:
            adapter.attach()
            done.append(adapter)
        activate(model, *before, *running)
    except BaseException:
        for adapter in reversed(done):
            adapter.detach()
        raise


def build(model: nn.Module, saved: Saved, name: str) -> Adapter:
    """The adapter, not yet on the model, with the values of its construction."""
    here = base_modules(model)
    if missing := [path for path in (*saved.modules, *saved.heads) if path not in here]:
        raise GraftError(f"the model has no module {missing[0]!r}, which the adapter adapts: is it another base?")
    try:
        adapter = Adapter(
            model,
            saved.recipe,
            saved.modules,
            name,
            heads=saved.heads,
            seed=saved.seed,
            dtype=saved.dtype,
            saved=saved.tensors,
        )
    except GraftError:
        raise
    except Exception as error:  # values which a constructor never met: sizes that overflow, that fit no memory
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise GraftError(f"the saved {saved.recipe.method.name} adapter cannot be built here: {reason}") from error
    adapter.targets = saved.targets
    return adapter
