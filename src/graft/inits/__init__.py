"""Initialisations: a file in this folder is one, found without being listed anywhere. See core/factored.py."""

from ..core.loading import load_all


def load() -> None:
    """Import every file, and those that installed packages announce under the entry point "graft.inits"."""
    load_all(__name__, "graft.inits")
