"""Ways to combine changes entry by entry: a file NAME.py holds a function NAME, found without being listed anywhere.

    def NAME(changes, *, density=0.2) -> Tensor

takes the changes of one tensor, one for each adapter that has one, its weight multiplied in, and gives the combined
change. Keyword arguments are what the user may set; they are described as the hyperparameters of a method are.
"""

import importlib
import pkgutil
from collections.abc import Callable


def names() -> list[str]:
    return sorted(m.name for m in pkgutil.iter_modules(__path__))


def find(name: str) -> Callable:
    return getattr(importlib.import_module(f".{name}", __name__), name)
