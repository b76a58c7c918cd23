"""What a run may take, asked before it is started."""

import re

from .. import tasks
from ..core.errors import GraftError
from ..prediction import predict_cost
from ..training.data import read
from .configuration import Configuration
from .single import DTYPE, UNTRAINED, recipes, train_rows

UNITS = {"": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "kB": 10**3, "MB": 10**6, "GB": 10**9}
METHODS = {"full-fine-tuning": None, "linear-probe": "full"}  # the controls that are trained, as `graft.tune` has them


def size(text: str) -> int:
    """Bytes, of "512MiB", "2GiB" or "4 GB"."""
    form = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(\w*)\s*", text)
    if not form or form[2] not in UNITS or not float(form[1]):
        raise GraftError(f"memory={text!r} is no size: write 512MiB or 2GiB")
    return int(float(form[1]) * UNITS[form[2]])


def misfit(configuration: Configuration, *, memory: int | None = None, parameters: int | None = None) -> str | None:
    """Why a run is not to be started, or None if it keeps within the limits.

    memory      bytes that its tensors may take at a time, as `graft.predict_cost` counts them
    parameters  how many numbers it may train

    A control that is not trained fits; a method that cannot be put on the model does not. Raises `GraftError` for a
    quantised base, of which nothing is known before.
    """
    c = configuration
    if c.quantise:
        raise GraftError(
            f"what a run takes on a base quantised by {c.quantise} is not known before: leave the limit out"
        )
    if c.method in UNTRAINED:
        return None
    task, training = tasks.task(c.task, **c.knobs), dict(c.training)
    examples = read(train_rows(task, c.train_rows), columns=training.pop("columns", None))
    try:
        chain = [] if c.method in METHODS else recipes(c)
        method = METHODS[c.method] if not chain else chain[0] if len(chain) == 1 else chain
        cost = predict_cost(
            c.base, examples, method=method, targets=c.targets, dtype=DTYPE, seed=c.seed, measure=False, **training
        )
    except GraftError as error:
        return f"not started: {error}"
    if memory is not None and (most := max(cost.peak, cost.start)) > memory:
        return f"not started: it would take {_words(most)} of memory, and {_words(memory)} are allowed"
    if parameters is not None and cost.parameters > parameters:
        return f"not started: it would train {cost.parameters:,} parameters, and {parameters:,} are allowed"
    return None


def _words(count: int) -> str:
    return f"{count / 2**20:,.1f} MiB"
