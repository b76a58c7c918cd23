"""The catalogue: a file in one of these folders is a method of the library, found without being listed anywhere."""

import functools
import importlib
import importlib.metadata
import pkgutil


@functools.cache
def load() -> None:
    """Import every method file, and those that installed packages announce under the entry point "graft.methods"."""
    for module in pkgutil.walk_packages(__path__, f"{__name__}."):
        importlib.import_module(module.name)
    for entry in importlib.metadata.entry_points(group="graft.methods"):
        entry.load()
