"""Classes that arrive in steps: what class-incremental tasks share."""

from collections.abc import Mapping

from ..core.errors import GraftError
from . import Row, Task


def in_steps(task: Task, found: Mapping[str, list[Row]], steps: int, step: int) -> dict[str, list[Row]]:
    """Of the splits train, validation and test the rows whose class arrives in `step` of `steps`, counted from 1.

    The classes are divided, in an order that the seed draws, into steps whose sizes differ by one at most. A further
    split `seen` holds the test rows of all steps so far.
    """
    classes = list(task.labels or ())
    if not step <= steps <= len(classes):
        raise GraftError(
            f"step={step} of steps={steps}: there are {len(classes)} classes, so 1 <= step <= steps <= that"
        )
    if steps > 1:
        task.draw("steps").shuffle(classes)
    arrives = {label: i * steps // len(classes) + 1 for i, label in enumerate(classes)}
    parts = {split: [row for row in rows if arrives[row["label"]] == step] for split, rows in found.items()}
    return {**parts, "seen": [row for row in found["test"] if arrives[row["label"]] <= step]}
