"""The catalogue: a file in one of these folders is a method of the library, found without being listed anywhere."""

from ..core.loading import load_all


def load() -> None:
    """Import every method file, and those that installed packages announce under the entry point "graft.methods"."""
    load_all(__name__, "graft.methods")
