"""Initialisations: a file in this folder is one, found without being listed anywhere. See core/factored.py."""

import functools
import importlib
import importlib.metadata
import pkgutil


@functools.cache
def load() -> None:
    """Import every file, and those that installed packages announce under the entry point "graft.inits"."""
    for module in pkgutil.iter_modules(__path__, f"{__name__}."):
        importlib.import_module(module.name)
    for entry in importlib.metadata.entry_points(group="graft.inits"):
        entry.load()
