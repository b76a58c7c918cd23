"""Random search."""

from . import Remembering


class Random(Remembering):
    """Every value drawn evenly from its domain, and no point twice.

    Random Search for Hyper-Parameter Optimization. Bergstra, Bengio, 2012.
    https://jmlr.org/papers/v13/bergstra12a.html
    """

    name = "random"
    look = 8  # some of them may be known
