"""Engines: where the runs of a search are made. A file in this folder is one, with a function `run(study, ...)`."""

import importlib
import pkgutil
from collections.abc import Callable

from ...core.errors import GraftError


def names() -> list[str]:
    return sorted(m.name for m in pkgutil.iter_modules(__path__))


def find(name: str) -> Callable:
    """The function that makes the runs of a study until there are no more:

    run(study, store, jobs=, threads=, tell=, **its own options)
    """
    if name not in names():
        raise GraftError(f"there is no engine {name!r}; there are {', '.join(names())}")
    return importlib.import_module(f"{__name__}.{name}").run
