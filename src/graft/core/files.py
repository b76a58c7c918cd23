"""An adapter as a folder: adapter_model.safetensors, adapter_config.json and a model card, README.md.

Nothing is ever unpickled, nothing is half-written, and a file that cannot be loaded leaves the model as it was.
"""

import hashlib
import json
import os
import secrets
import shutil
import warnings
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from ..version import __version__
from . import peft
from .adapter import Adapter, adapters, registry, unwrapped
from .card import HUB_ID, card, class_name
from .delta import Delta, base_modules, is_finite
from .errors import GraftError
from .fingerprint import fingerprint
from .hyper import hyperparameters
from .recipe import ByPath, Recipe, method

CONFIG, TENSORS, CARD = "adapter_config.json", "adapter_model.safetensors", "README.md"
FORMAT = 1  # raised when the layout of the folder changes
FORMATS = ("graft", "peft")
MOST_CONFIG = 2**26  # bytes


def save(
    adapter: Adapter,
    folder: str | os.PathLike,
    *,
    overwrite: bool = False,
    base_model: str | None = None,
    format: str = "graft",
) -> None:
    """Write `adapter` as a folder.

    overwrite   replace an adapter that is there already (never a folder which holds anything else)
    base_model  the base's id on the Hugging Face hub or its folder; left out, what its configuration says
    format      "graft", or "peft" for Hugging Face PEFT, wherever PEFT has the method

    The folder is written beside its place and renamed: it is complete, or it is not there. GraftError if the place is
    taken, if a tensor holds NaN or infinity, or if PEFT has no such method.
    """
    if format not in FORMATS:
        raise GraftError(f"the format is {' or '.join(map(repr, FORMATS))}, not {format!r}")
    if found := registry(adapter.model):
        found.check_unmerged()
    state = adapter.state_dict()
    if not is_finite(state.values()):
        broken = next(key for key, value in state.items() if not is_finite([value]))
        raise GraftError(f"{broken} holds NaN or infinity: nothing was saved")
    base = base_model or getattr(getattr(adapter.model, "config", None), "_name_or_path", None) or None
    if format == "peft":
        config, state = peft.write(adapter)
        config["base_model_name_or_path"] = base
        tensors = _bytes(state)
    else:
        tensors = _bytes(state)
        config = _config(adapter, base) | {"tensors_crc32": zlib.crc32(tensors)}
        config["checksum"] = _checksum(config)
    text = json.dumps(config, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    _write(
        Path(folder),
        {
            TENSORS: tensors,
            CONFIG: text.encode(),
            CARD: card(adapter, base, format, Path(folder).resolve().name).encode(),
        },
        overwrite,
    )


def load(
    model: nn.Module,
    folder: str | os.PathLike,
    *,
    name: str | None = None,
    trainable: bool = False,
    allow_other_base: bool = False,
    revision: str | None = None,
) -> Adapter:
    """Put a saved adapter on `model`: a local folder or an id on the Hugging Face hub, in our format or in PEFT's.

    name              of the adapter on the model; the one it was saved under if left out
    trainable         go on training it; frozen if left out
    allow_other_base  load onto weights it was not trained on, too; shapes must fit in any case
    revision          of a repository on the hub

    GraftError, and the model as it was, for whatever is not a sound adapter for this base.
    """
    model = unwrapped(model)
    if found := registry(model):
        found.check_unmerged()
    place = _locate(folder, revision)
    config = read_config(place)
    tensors = _read_tensors(place, config.get("tensors_crc32"))
    if "peft_type" in config:
        recipe, modules, heads, state = peft.read(model, config, tensors)
        saved = Saved(recipe, modules, heads, state, targets=config.get("target_modules"))
    else:
        saved = _from_graft(config, tensors)
        if not allow_other_base:
            _check_base(model, config)
    adapter = build(model, saved, name or saved.name)
    if not trainable:
        adapter.requires_grad_(False)
    adapter.attach()
    return adapter


@dataclass
class Saved:
    """What a folder holds, in either format."""

    recipe: Recipe
    modules: list[str]
    heads: list[str]
    tensors: dict[str, Tensor]  # as in Adapter.state_dict
    targets: Any = None  # as the user gave them
    name: str = "default"
    seed: int = 0
    dtype: torch.dtype | None = None
    task: dict[str, Any] = field(default_factory=dict)


# The configuration


def _config(adapter: Adapter, base: str | None) -> dict[str, Any]:
    recipe, heads = adapter.recipe, [path for path, _ in adapter.heads]
    others = adapters(adapter.model).values()
    without = [p for a in (adapter, *others) if a.recipe.method.brings_rows for p in a.deltas if p not in heads]
    without = sorted({*heads, *without})
    targets = adapter.targets
    return {
        "format": "graft",
        "format_version": FORMAT,
        "library_version": __version__,
        "name": adapter.name,
        "method": recipe.method.name,
        "method_version": recipe.method.version,
        "hyperparameters": recipe.hyper,
        "targets": targets if isinstance(targets, str) else None if callable(targets) else list(targets),
        "modules": [path for path in adapter.deltas if path not in heads],
        "heads": heads,
        "seed": adapter.seed,
        "dtype": str(dtype_of(adapter)).removeprefix("torch."),
        "base_model": base,
        "base_class": class_name(adapter.model),
        "base_fingerprint": fingerprint(adapter.model, without),
        "fingerprint_without": without,
        "task": adapter.task,
    }


def dtype_of(adapter: Adapter) -> torch.dtype:
    """Of the tensors of the method itself, without those of heads."""
    own = [m for path, m in adapter.modules().items() if path not in dict(adapter.heads)]
    return next((t.dtype for m in own for t in m.state_dict().values() if t.is_floating_point()), torch.float32)


def _checksum(config: dict[str, Any]) -> str:
    rest = {key: value for key, value in config.items() if key != "checksum"}
    rest = json.loads(json.dumps(rest))  # as it will be read: JSON has no keys but texts, and no tuples
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


_FIELDS: dict[str, tuple[type, ...]] = {
    "format_version": (int,),
    "library_version": (str,),
    "name": (str,),
    "method": (str,),
    "method_version": (int,),
    "hyperparameters": (dict,),
    "targets": (str, list, type(None)),
    "modules": (list,),
    "heads": (list,),
    "seed": (int,),
    "dtype": (str,),
    "base_model": (str, type(None)),
    "base_class": (str,),
    "base_fingerprint": (str, type(None)),
    "fingerprint_without": (list,),
    "task": (dict,),
}
_DTYPES = {str(d).removeprefix("torch."): d for d in (torch.float32, torch.float64, torch.bfloat16, torch.float16)}


def _from_graft(config: dict[str, Any], tensors: dict[str, Tensor]) -> Saved:
    """Check a configuration in our format, entry by entry."""
    if config.get("format") != "graft":
        raise GraftError(f'{CONFIG} is neither graft\'s ("format": "graft") nor PEFT\'s ("peft_type": ...)')
    version = config.get("format_version")
    if isinstance(version, int) and version > FORMAT:
        raise GraftError(f"{CONFIG} has format {version}, here {FORMAT} is the latest: upgrade graft{_writer(config)}")
    for name, kinds in _FIELDS.items():
        if name not in config:
            raise GraftError(f"{CONFIG} lacks the entry {name}")
        if not isinstance(config[name], kinds) or isinstance(config[name], bool):
            wanted = " or ".join("null" if k is type(None) else k.__name__ for k in kinds)
            raise GraftError(f"{CONFIG}: {name} must be a {wanted}, not {config[name]!r}")
    if config.get("checksum", expected := _checksum(config)) != expected:
        raise GraftError(
            f"{CONFIG} was damaged or edited after it was saved: its checksum does not fit (to load it as edited, "
            f"take its entry checksum out)"
        )
    modules, heads = config["modules"], config["heads"]
    paths = [*modules, *heads]
    if not all(isinstance(path, str) for path in (*paths, *config["fingerprint_without"])) or len(set(paths)) < len(
        paths
    ):
        raise GraftError(f"{CONFIG}: modules and heads must be paths of modules, each of them once")
    if not modules:
        raise GraftError(f"{CONFIG}: modules names no module")
    if config["dtype"] not in _DTYPES:
        raise GraftError(f"{CONFIG}: dtype is one of {', '.join(_DTYPES)}, not {config['dtype']!r}")
    if not -(2**63) <= config["seed"] < 2**64:
        raise GraftError(f"{CONFIG}: seed must fit 64 bits, not {config['seed']}")
    return Saved(
        _recipe(config),
        modules,
        heads,
        tensors,
        modules if config["targets"] is None else config["targets"],
        config["name"],
        config["seed"],
        _DTYPES[config["dtype"]],
        config.get("task", {}),
    )


def _writer(config: dict[str, Any]) -> str:
    """Who wrote a file, where that may explain what is wrong with it."""
    writer = config["library_version"] if isinstance(config.get("library_version"), str) else "unknown"
    return "" if writer == __version__ else f"; it was written by graft {writer}, this is {__version__}"


def _recipe(config: dict[str, Any]) -> Recipe:
    try:
        cls = method(config["method"])
        values = {name: _value(cls, name, v, config["modules"]) for name, v in config["hyperparameters"].items()}
        recipe = Recipe(cls, values)
    except GraftError as error:
        raise GraftError(f"{CONFIG}: {error}{_writer(config)}") from None
    if config["method_version"] != cls.version:
        raise GraftError(
            f"{CONFIG}: {cls.name} was saved as version {config['method_version']} of the method, here is version "
            f"{cls.version}, whose files mean something else{_writer(config)}"
        )
    lacking = hyperparameters(cls).keys() - values.keys()
    if lacking and config["library_version"] == __version__:  # an older version may not have had it: the default then
        raise GraftError(f"{CONFIG} lacks the hyperparameter {min(lacking)} of {cls.name}")
    return recipe


def _value(cls: type[Delta], name: str, value: Any, modules: list[str]) -> Any:
    """A hyperparameter as its method wants it: JSON knows no tuples, and a table is one by path."""
    if isinstance(value, dict):
        if lacking := [path for path in modules if path not in value]:
            raise GraftError(f"{name} has no value for {lacking[0]}")
        return ByPath({path: _value(cls, name, v, modules) for path, v in value.items()})
    known = hyperparameters(cls).get(name)
    return tuple(value) if isinstance(value, list) and known and tuple in known.kinds else value


def _check_base(model: nn.Module, config: dict[str, Any]) -> None:
    here = fingerprint(model, config["fingerprint_without"])
    there = config["base_fingerprint"]
    if here is None or there is None:
        warnings.warn(
            f"whether this is the base which the adapter was trained on is not known: the weights of "
            f"{'this model' if here is None else 'the one it was trained on'} could not be read",
            stacklevel=3,
        )
    elif here.partition("-")[0] != there.partition("-")[0]:
        warnings.warn(
            f"whether this is the base which the adapter was trained on is not known: its fingerprint is of another "
            f"kind{_writer(config)}",
            stacklevel=3,
        )
    elif here != there:
        trained = f"{config['base_model'] or 'a base'} ({config['base_class']})"
        raise GraftError(
            f"the adapter was trained on {trained}, and this {class_name(model)} has other weights: load that base, "
            f"or pass allow_other_base=True to use the adapter here all the same"
        )


# Building


def build(model: nn.Module, saved: Saved, name: str) -> Adapter:
    """The adapter `saved`, not yet on the model."""
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
    adapter.load_state_dict(saved.tensors)
    adapter.targets, adapter.task = saved.targets, saved.task
    return adapter


# Reading


def _locate(folder: str | os.PathLike, revision: str | None) -> Path:
    """The folder of an adapter; an id of the hub is fetched, if no local folder is called so."""
    place = Path(folder)
    if place.is_dir():
        return place
    if place.exists():
        raise GraftError(f"{place} is a file: an adapter is a folder with {CONFIG} and {TENSORS}")
    if not HUB_ID.fullmatch(str(folder)):
        raise GraftError(f"there is no folder {str(place)!r}")
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise GraftError(f"there is no folder {str(place)!r}; to look on the hub, install huggingface-hub") from None
    try:
        return Path(snapshot_download(str(folder), revision=revision, allow_patterns=[CONFIG, TENSORS]))
    except Exception as error:  # of several libraries: no network, no such repository, no access, no such revision
        raise GraftError(
            f"there is no folder {str(place)!r}, and the Hugging Face hub did not give an adapter of that name: "
            f"{(str(error) or type(error).__name__).strip().splitlines()[0]}"
        ) from error


def _file(place: Path, name: str) -> Path:
    """A file of the folder itself: no link leads out of it, save the hub cache's to its own store."""
    file, root = place / name, place.resolve()
    if not file.exists():
        pickled = [f for f in ("adapter_model.bin", "adapter_model.pt", "pytorch_model.bin") if (place / f).exists()]
        hint = f"; {pickled[0]} is a pickle, which is never read: convert it to safetensors" if pickled else ""
        raise GraftError(f"{place} holds no {name}{hint}")
    real = file.resolve()
    in_cache = root.parent.name == "snapshots" and real.is_relative_to(root.parent.parent / "blobs")
    if not real.is_file() or not (real.is_relative_to(root) or in_cache):
        raise GraftError(f"{file} is no file of that folder: it leads to {real}")
    return real


def read_config(folder: str | os.PathLike, revision: str | None = None) -> dict[str, Any]:
    """The configuration of a saved adapter, in our format or PEFT's, as it stands: nothing of it is checked."""
    file = _file(_locate(folder, revision), CONFIG)

    def refuse(word: str):
        raise ValueError(f"{word} is no number")

    if file.stat().st_size > MOST_CONFIG:
        raise GraftError(f"{file} has {file.stat().st_size:,} bytes: no configuration is so large")
    try:
        config = json.loads(file.read_text("utf-8"), parse_constant=refuse)
    except (OSError, ValueError, RecursionError) as error:
        raise GraftError(f"{file} is no valid JSON: {error}") from None
    if not isinstance(config, dict):
        raise GraftError(f"{file} must hold an object, not a {type(config).__name__}")
    return config


def tensors_file(folder: str | os.PathLike, revision: str | None = None) -> Path:
    """The safetensors file of a saved adapter."""
    return _file(_locate(folder, revision), TENSORS)


def _read_tensors(place: Path, crc32: Any) -> dict[str, Tensor]:
    file = _file(place, TENSORS)
    try:
        content = file.read_bytes()
        if crc32 is not None and zlib.crc32(content) != crc32:
            raise GraftError(f"{file} was damaged or changed after it was saved: its checksum does not fit")
        tensors = safetensors.torch.load(content)
        finite = is_finite(tensors.values())
    except GraftError:
        raise
    except Exception as error:  # the library's own and what torch says to types and sizes it does not know
        raise GraftError(f"{file} is no sound safetensors file: {error}") from error
    if not finite:
        broken = next(key for key, value in tensors.items() if not is_finite([value]))
        raise GraftError(f"{file}: {broken} holds NaN or infinity")
    return tensors


# Writing


def _bytes(state: dict[str, Tensor]) -> bytes:
    plain = {key: value.detach().to("cpu", copy=True).contiguous() for key, value in state.items()}
    return safetensors.torch.save(plain, {"format": "pt"})


def _write(folder: Path, files: dict[str, bytes], overwrite: bool) -> None:
    """Write the files as one folder: beside its place, flushed to the disk, then renamed."""
    folder = folder.resolve()
    inside = set()
    if folder.exists():
        if not folder.is_dir():
            raise GraftError(f"{folder} is a file: choose another place for the adapter")
        inside = set(os.listdir(folder))
        strange = {i for i in inside if i not in files or not (folder / i).is_file()} if CONFIG in inside else inside
        if strange:
            raise GraftError(f"{folder} holds {min(strange)}, which is no part of an adapter: choose another folder")
        if inside and not overwrite:
            raise GraftError(f"{folder} holds an adapter already: pass overwrite=True to replace it")
    mark = secrets.token_hex(4)
    new, old = (folder.with_name(f".{folder.name}.{mark}.{end}") for end in ("new", "old"))
    try:
        new.mkdir(parents=True)
        for name, content in files.items():
            with open(new / name, "wb") as stream:
                stream.write(content)
                stream.flush()
                os.fsync(stream.fileno())
        _flush(new)
        if inside:
            os.rename(folder, old)
        try:
            os.rename(new, folder)
        except BaseException:
            if inside:
                os.rename(old, folder)
            raise
        _flush(folder.parent)
    except OSError as error:
        raise GraftError(f"{folder} cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(new, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)


def _flush(folder: Path) -> None:
    """Make the names in a folder durable, where the system has that."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
