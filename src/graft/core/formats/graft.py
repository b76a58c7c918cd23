"""Graft's own folder: a configuration that says everything, with checksums, and the tensors of every method."""

import functools
import hashlib
import json
import warnings
import zlib
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ...version import __version__
from ..adapter import Adapter, tensors_by_path
from ..card import class_name
from ..delta import Delta
from ..errors import GraftError
from ..fingerprint import fingerprint
from ..folder import CONFIG, TENSORS, json_bytes, tensor_bytes
from ..host import base_modules
from ..hyper import hyperparameters
from ..quantise import scheme_of
from ..recipe import ByPath, Recipe, method
from ..registry import adapters
from ..site import site_for
from . import Fingerprints, Format, Saved

FORMAT = 1  # raised when the layout of the folder changes


class Graft(Format, name="graft"):
    """Our own folder."""

    title = "graft"
    library = "graft"
    sign = '"format": "graft"'
    as_it_is = True

    @classmethod
    def recognises(cls, config):
        return config is not None and config.get("format") == "graft"

    def read(self, model, parts):
        saved = _from_graft(parts[CONFIG], parts[TENSORS])
        if self.prints is not None:
            _check_base(model, parts[CONFIG], self.prints)
        return _unpacked(model, saved)

    def write(self, adapter, base):
        tensors = tensor_bytes(adapter.packed())
        config = _config(adapter, base, self.prints or functools.partial(fingerprint, adapter.model)) | {
            "tensors_crc32": zlib.crc32(tensors)
        }
        return {TENSORS: tensors, CONFIG: json_bytes(config | {"checksum": checksum(config)})}

    @classmethod
    def facts(cls, config, keys):
        return {
            "method": config.get("method"),
            "base": config.get("base_model"),
            "base_fingerprint": config.get("base_fingerprint"),
            "base_quantised": config.get("base_quantised"),
            "sites": len(config.get("modules", ())) or None,
            "heads": config.get("heads") or [],
        }


def _config(adapter: Adapter, base: str | None, prints: Fingerprints) -> dict[str, Any]:
    recipe, heads = adapter.recipe, [path for path, _ in adapter.heads]
    # What another adapter brings along is no part of the base either: a base loaded anew draws it at random.
    here = [adapter, *adapters(adapter.model).values()]
    rows = {path for a in here if a.recipe.method.brings_rows for path in a.deltas}
    without = tuple(sorted(rows | {path for a in here for path, _ in a.heads}))
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
        "dtype": str(adapter.dtype).removeprefix("torch."),
        "base_model": base,
        "base_class": class_name(adapter.model),
        "base_fingerprint": prints(without),
        "fingerprint_without": list(without),
        "base_quantised": scheme_of(adapter.model),
        "task": adapter.task,
    }


def checksum(config: dict[str, Any]) -> str:
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
    check_format(config, CONFIG)
    for name, kinds in _FIELDS.items():
        if name not in config:
            raise GraftError(f"{CONFIG} lacks the entry {name}")
        if not isinstance(config[name], kinds) or isinstance(config[name], bool):
            wanted = " or ".join("null" if k is type(None) else k.__name__ for k in kinds)
            raise GraftError(f"{CONFIG}: {name} must be a {wanted}, not {config[name]!r}")
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


def _unpacked(model: nn.Module, saved: Saved) -> Saved:
    """With the tensors that deltas need, from those that they keep in a file."""
    cls, modules, tensors = saved.recipe.method, base_modules(model), {}
    for path, own in tensors_by_path(saved.tensors).items():
        if path in saved.modules and path in modules:
            site = site_for(path, modules[path], cls.hosts)
            own = cls.unpacked(own, site, saved.recipe.at(site))
        tensors |= {f"{path}:{name}": t for name, t in own.items()}
    return replace(saved, tensors=tensors)


def check_format(config: dict[str, Any], file: str) -> None:
    """Refuse what a later version wrote, and what is not as it was written."""
    version = config.get("format_version")
    if isinstance(version, int) and version > FORMAT:
        raise GraftError(f"{file} has format {version}, here {FORMAT} is the latest: upgrade graft{_writer(config)}")
    if config.get("checksum", expected := checksum(config)) != expected:
        raise GraftError(
            f"{file} was damaged or edited after it was saved: its checksum does not fit (to load it as edited, "
            f"take its entry checksum out)"
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


def _check_base(model: nn.Module, config: dict[str, Any], prints: Fingerprints) -> None:
    here = prints(tuple(config["fingerprint_without"]))
    there = config["base_fingerprint"]
    if here is None or there is None:
        warnings.warn(
            f"whether this is the base which the adapter was trained on is not known: the weights of "
            f"{'this model' if here is None else 'the one it was trained on'} could not be read",
            stacklevel=4,
        )
    elif here.partition("-")[0] != there.partition("-")[0]:
        warnings.warn(
            f"whether this is the base which the adapter was trained on is not known: its fingerprint is of another "
            f"kind{_writer(config)}",
            stacklevel=4,
        )
    elif here != there:
        trained, own = f"{config['base_model'] or 'a base'} ({config['base_class']})", config.get("base_quantised")
        said = "" if own == scheme_of(model) else f", quantised by {own}" if own else ", which was not quantised"
        raise GraftError(
            f"the adapter was trained on {trained}{said}, and this {class_name(model)} has other weights: load that "
            f"base, or pass allow_other_base=True to use the adapter here all the same"
        )
