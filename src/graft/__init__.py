"""Graft adapts pre-trained PyTorch models.

    import graft
    adapter = graft.attach(model, graft.LoRA(rank=8), targets="all-linear")
    graft.fit(model, data)
    adapter.save("my-adapter")
    graft.load(model, "my-adapter")

Every method of the catalogue is here under its class name (graft.LoRA, graft.DoRA, ...). Names load when first used.
"""

import importlib
from typing import Any

from .version import __version__

_PUBLIC = {
    "GraftError": "core.errors",
    "Delta": "core.delta",
    "Edit": "core.delta",
    "Paper": "core.delta",
    "METHODS": "core.delta",
    "Range": "core.hyper",
    "Recipe": "core.recipe",
    "Adapter": "core.adapter",
    "attach": "core.adapter",
    "adapters": "core.registry",
    "activate": "core.registry",
    "disabled": "core.registry",
    "route": "compose.route",
    "Bank": "compose.bank",
    "collect": "core.statistics",
    "save": "core.files",
    "load": "core.files",
    "fingerprint": "core.fingerprint",
    "verify": "core.verify",
    "quantise": "core.quantise",
    "dequantise": "core.dequantise",
    "merge": "core.merge",
    "merged_state_dict": "core.merge",
    "combine": "compose.combine",
    "convert": "compose.combine",
    "extract": "compose.extract",
    "Combination": "compose.combine",
    "fit": "training",
    "evaluate": "training",
    "predict": "training",
    "tune": "tuning",
    "load_adapted": "tuning",
    "sample": "tuning",
    "generate": "tuning",
    "compare": "comparison",
    "advise": "advice",
    "rank": "ranking",
    "allocate": "allocation",
    "search": "searching",
    "predict_cost": "prediction",
    "load_base": "models",
    "save_merged": "models",
}

_PACKAGES = ("bases", "tasks")

__all__ = ["__version__", *_PUBLIC, *_PACKAGES]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        value = getattr(importlib.import_module(f".{_PUBLIC[name]}", __name__), name)
    elif name in _PACKAGES:
        value = importlib.import_module(f".{name}", __name__)
    else:
        value = _methods().get(name) if name[0].isupper() else None
        if value is None:
            raise AttributeError(f"module 'graft' has no attribute {name!r}")
    globals()[name] = value
    return value


def _methods() -> dict[str, Any]:
    importlib.import_module(".methods", __name__).load()
    catalogue = importlib.import_module(".core.delta", __name__).METHODS
    return {cls.__name__: cls for cls in catalogue.values()}


def __dir__():
    return sorted({*globals(), *_PUBLIC, *_PACKAGES, *_methods()})
