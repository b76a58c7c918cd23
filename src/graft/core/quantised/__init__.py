"""Quantised linear layers: a file in this folder is one quantiser, found without being listed anywhere.

Classes are named by their qualified names, so that no quantiser is imported before a model brings it.
"""

import importlib
import pkgutil


def load() -> None:
    for module in pkgutil.iter_modules(__path__, f"{__name__}."):
        importlib.import_module(module.name)
