"""Quantised linear layers: a file in this folder is one quantiser, found without being listed anywhere.

Classes are named by their qualified names, so that no quantiser is imported before a model brings it.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn

from ..loading import load_all


class Scheme(NamedTuple):
    """A way to quantise one layer, for `graft.quantise`.

    about    what becomes of it, in a few words
    make     nn.Linear -> the quantised layer that takes its place
    package  what must be installed for it
    dtype    the only one in which such layers compute; None: that of the layer
    device   the only kind on which they do
    """

    about: str
    make: Callable[[nn.Linear], nn.Module]
    package: str | None = None
    dtype: torch.dtype | None = None
    device: str | None = None


SCHEMES: dict[str, Scheme] = {}


def schemes() -> dict[str, Scheme]:
    """Every way to quantise, by name."""
    load_all(__name__)
    return SCHEMES
