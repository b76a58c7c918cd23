"""What a run may take, asked before it is started."""

import re

from .. import tasks
from ..core.errors import GraftError
from ..prediction import Cost, predict_cost
from ..training.data import read
from .configuration import Configuration
from .single import DTYPE, UNTRAINED, recipes, train_rows

UNITS = {"": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "kB": 10**3, "MB": 10**6, "GB": 10**9}
CONTROLS = {"full-fine-tuning": None, "linear-probe": "full"}  # the controls that are trained, as methods


def size(text: str) -> int:
    """Bytes, of "512MiB", "2GiB" or "4 GB"."""
    form = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(\w*)\s*", text)
    if not form or form[2] not in UNITS or not float(form[1]):
        raise GraftError(f"memory={text!r} is no size: write 512MiB or 2GiB")
    return int(float(form[1]) * UNITS[form[2]])


def cost(configuration: Configuration) -> Cost:
    """What a run would cost, from a dry run; not for a control that is not trained.

    Raises `GraftError` for a method that cannot be put on the model.
    """
    c = configuration
    task, training = tasks.task(c.task, **c.knobs), dict(c.training)
    examples = read(train_rows(task, c.train_rows), columns=training.pop("columns", None))
    return predict_cost(
        c.base, examples, method=CONTROLS[c.method] if c.method in CONTROLS else recipes(c), targets=c.targets,
        dtype=DTYPE, seed=c.seed, measure=False, **training,
    )  # fmt: skip


def misfit(configuration: Configuration, *, memory: int) -> str | None:
    """Why a run is not to be started, or None if it keeps within so many bytes of memory.

    A control that is not trained fits; a method that cannot be put on the model does not. Raises `GraftError` for a
    quantised base, of which nothing is known before.
    """
    if configuration.quantise:
        raise GraftError(
            f"what a run takes on a base quantised by {configuration.quantise} is not known before: leave the limit out"
        )
    if configuration.method in UNTRAINED:
        return None
    try:
        why = excess(cost(configuration), memory)
    except GraftError as error:
        why = str(error)
    return why and f"not started: {why}"


def excess(cost: Cost, memory: int) -> str | None:
    """Why a run would need more than so many bytes for its tensors, or None if it would not."""
    most = max(cost.peak, cost.start)
    return None if most <= memory else f"it would take {_words(most)} of memory, and {_words(memory)} are allowed"


def _words(count: int) -> str:
    return f"{count / 2**20:,.1f} MiB"
