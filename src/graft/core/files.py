"""An adapter as a folder: adapter_model.safetensors, adapter_config.json and a model card, README.md.

Formats of other libraries are in formats/: other names of files, or one file alone.

Nothing is ever unpickled, nothing is half-written, and a file that cannot be loaded leaves the model as it was.
"""

import hashlib
import json
import os
import secrets
import shutil
import warnings
import zlib
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from ..version import __version__
from . import formats
from .adapter import Adapter, adapters, registry, unwrapped
from .card import HUB_ID, card, class_name
from .delta import Delta, base_modules, is_finite
from .errors import GraftError
from .fingerprint import fingerprint
from .formats import CONFIG, FORMATS, TENSORS, Format, Saved, as_json, packed
from .hyper import hyperparameters
from .recipe import ByPath, Recipe, method

CARD = "README.md"
FORMAT = 1  # raised when the layout of the folder changes
MOST_CONFIG = 2**26  # bytes
PICKLES = (".bin", ".pt", ".pth", ".ckpt")


def save(
    adapter: Adapter,
    folder: str | os.PathLike,
    *,
    overwrite: bool = False,
    base_model: str | None = None,
    format: str = "graft",
) -> None:
    """Write `adapter` as a folder, or as one file where the format is one.

    overwrite   replace an adapter that is there already (never a folder which holds anything else)
    base_model  the base's id on the Hugging Face hub or its folder; left out, what its configuration says
    format      "graft", or that of another library wherever it has the method: "peft" (Hugging Face PEFT), "vllm" (a
                LoRA that vLLM serves), "adapters" (the library of AdapterHub), "lycoris" or "kohya" (one .safetensors
                file)

    What is written is written beside its place and renamed: it is complete, or it is not there. GraftError if the
    place is taken, if a tensor holds NaN or infinity, or if the other library computes nothing of the kind.
    """
    formats.load()
    if format not in FORMATS:
        raise GraftError(f"the format is {' or '.join(map(repr, FORMATS))}, not {format!r}")
    if found := registry(adapter.model):
        found.check_unmerged()
    state = adapter.state_dict()
    if not is_finite(state.values()):
        broken = next(key for key, value in state.items() if not is_finite([value]))
        raise GraftError(f"{broken} holds NaN or infinity: nothing was saved")
    base = base_model or getattr(getattr(adapter.model, "config", None), "_name_or_path", None) or None
    form, place = FORMATS[format], Path(folder)
    files = form.write(adapter, base)
    if form.single:
        return _write_file(place, files[""], overwrite)
    _write(place, files | {CARD: card(adapter, base, form, place.resolve().name).encode()}, overwrite)


def load(
    model: nn.Module,
    folder: str | os.PathLike,
    *,
    name: str | None = None,
    trainable: bool = False,
    allow_other_base: bool = False,
    revision: str | None = None,
) -> Adapter:
    """Put a saved adapter on `model`: a local folder or file or an id on the Hugging Face hub, in any format.

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
    form, config = _recognised(place)
    saved = form.read(model, _read(place, form, config))
    if config is not None and form.name == "graft" and not allow_other_base:
        _check_base(model, config)
    adapter = _build(model, saved, name or saved.name)
    adapter.load_state_dict(saved.tensors)
    adapter.task = saved.task
    if not trainable:
        adapter.requires_grad_(False)
    adapter.attach()
    return adapter


class _Graft(Format, name="graft"):
    """Our own folder."""

    library = "graft"
    sign = '"format": "graft"'

    def recognises(self, config):
        return config is not None and config.get("format") == "graft"

    def read(self, model, parts):
        return _from_graft(parts[CONFIG], parts[TENSORS])

    def write(self, adapter, base):
        tensors = packed(adapter.state_dict())
        config = _config(adapter, base) | {"tensors_crc32": zlib.crc32(tensors)}
        return {TENSORS: tensors, CONFIG: as_json(config | {"checksum": _checksum(config)})}

    def facts(self, config, keys):
        return {
            "method": config.get("method"),
            "base": config.get("base_model"),
            "base_fingerprint": config.get("base_fingerprint"),
            "sites": len(config.get("modules", ())) or None,
            "heads": config.get("heads") or [],
        }


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
        "dtype": str(_dtype(adapter)).removeprefix("torch."),
        "base_model": base,
        "base_class": class_name(adapter.model),
        "base_fingerprint": fingerprint(adapter.model, without),
        "fingerprint_without": without,
        "task": adapter.task,
    }


def _dtype(adapter: Adapter) -> torch.dtype:
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


def _build(model: nn.Module, saved: Saved, name: str) -> Adapter:
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


# Reading


def _locate(folder: str | os.PathLike, revision: str | None) -> Path:
    """The folder or file of an adapter; an id of the hub is fetched, if no local folder is called so."""
    formats.load()
    place = Path(folder)
    if place.is_dir() or (place.is_file() and place.suffix == ".safetensors"):
        return place
    if place.exists():
        hint = "; it is a pickle, which is never read: convert it to safetensors" if place.suffix in PICKLES else ""
        raise GraftError(f"{place} is no .safetensors file, nor a folder with {CONFIG}{hint}")
    if not HUB_ID.fullmatch(str(folder)):
        raise GraftError(f"there is no folder {str(place)!r}")
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise GraftError(f"there is no folder {str(place)!r}; to look on the hub, install huggingface-hub") from None
    try:
        wanted = sorted({name for form in FORMATS.values() for name in (*form.files, *form.optional)})
        return Path(snapshot_download(str(folder), revision=revision, allow_patterns=wanted))
    except Exception as error:  # of several libraries: no network, no such repository, no access, no such revision
        raise GraftError(
            f"there is no folder {str(place)!r}, and the Hugging Face hub did not give an adapter of that name: "
            f"{(str(error) or type(error).__name__).strip().splitlines()[0]}"
        ) from error


def _file(place: Path, name: str) -> Path:
    """A file of the folder itself: no link leads out of it, save the hub cache's to its own store."""
    file, root = place / name, place.resolve()
    if not file.exists():
        pickled = sorted(f.name for f in place.glob("*") if f.suffix in PICKLES) if place.is_dir() else []
        hint = f"; {pickled[0]} is a pickle, which is never read: convert it to safetensors" if pickled else ""
        raise GraftError(f"{place} holds no {name}{hint}")
    real = file.resolve()
    in_cache = root.parent.name == "snapshots" and real.is_relative_to(root.parent.parent / "blobs")
    if not real.is_file() or not (real.is_relative_to(root) or in_cache):
        raise GraftError(f"{file} is no file of that folder: it leads to {real}")
    return real


def _recognised(place: Path) -> tuple[Format, dict[str, Any] | None]:
    """The format of a folder, with its configuration, or of a single file."""
    config = read_config(place) if place.is_dir() else None
    for form in FORMATS.values():
        if form.recognises(config):
            return form, config
    signs = ", ".join(f"{form.name} has {form.sign}" for form in FORMATS.values() if form.sign)
    raise GraftError(f"{place / CONFIG} is of no format that is known here: {signs}")


def _read(place: Path, form: Format, config: dict[str, Any] | None) -> dict[str, dict[str, Any]]:
    """Tensors and JSON objects of a saved adapter, by file."""
    if config is None:
        return {"": _read_tensors(place)}
    names = [name for name in form.optional if (place / name).exists()]
    parts = {CONFIG: config}
    for name in {*form.files, *names} - {CONFIG}:
        file = _file(place, name)
        crc32 = config.get("tensors_crc32") if form.name == "graft" else None
        parts[name] = _read_json(file) if name.endswith(".json") else _read_tensors(file, crc32)
    return parts


def read_config(folder: str | os.PathLike, revision: str | None = None) -> dict[str, Any]:
    """The configuration of a saved adapter as it stands, {} of a single file: nothing of it is checked."""
    place = _locate(folder, revision)
    return _read_json(_file(place, CONFIG)) if place.is_dir() else {}


def _read_json(file: Path) -> dict[str, Any]:
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


def recognise(folder: str | os.PathLike, revision: str | None = None) -> tuple[Format, dict[str, Any] | None, Path]:
    """Format, configuration (None of a single file) and tensor file of a saved adapter; nothing of it is checked."""
    place = _locate(folder, revision)
    form, config = _recognised(place)
    return form, config, place if config is None else _file(place, next(n for n in form.files if n != CONFIG))


def _read_tensors(file: Path, crc32: Any = None) -> dict[str, Tensor]:
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
            _put(new / name, content)
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


def _write_file(file: Path, content: bytes, overwrite: bool) -> None:
    """Write one file: beside its place, flushed to the disk, then renamed."""
    file = file.resolve()
    if file.suffix != ".safetensors":
        raise GraftError(f"this format is a single file: {file.name!r} must end in .safetensors")
    if file.is_dir():
        raise GraftError(f"{file} is a folder: choose another place for the adapter")
    if file.exists() and not overwrite:
        raise GraftError(f"{file} is there already: pass overwrite=True to replace it")
    new = file.with_name(f".{file.name}.{secrets.token_hex(4)}.new")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        _put(new, content)
        os.replace(new, file)
        _flush(file.parent)
    except OSError as error:
        raise GraftError(f"{file} cannot be written: {error.strerror or error}") from error
    finally:
        new.unlink(missing_ok=True)


def _put(file: Path, content: bytes) -> None:
    with open(file, "wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())


def _flush(folder: Path) -> None:
    """Make the names in a folder durable, where the system has that."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
