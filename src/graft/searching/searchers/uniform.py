"""Random search."""

from . import FEW, Remembering


class Random(Remembering):
    """Every value drawn evenly from its domain, and no point twice.

    Random Search for Hyper-Parameter Optimization. Bergstra, Bengio, 2012.
    https://jmlr.org/papers/v13/bergstra12a.html
    """

    name = "random"
    look = FEW
