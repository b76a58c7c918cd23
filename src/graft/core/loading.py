"""Parts that are found by themselves: a file in their folder, or in a package that announces it, is one."""

import functools
import importlib
import importlib.metadata
import pkgutil


@functools.cache
def load_all(package: str, group: str | None = None) -> None:
    """Import every module below `package`, and what installed packages announce under the entry point `group`."""
    for module in pkgutil.walk_packages(importlib.import_module(package).__path__, f"{package}."):
        importlib.import_module(module.name)
    for entry in importlib.metadata.entry_points(group=group) if group else ():
        entry.load()
