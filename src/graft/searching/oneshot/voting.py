"""The majority vote of models that were tuned in different ways."""

from collections import Counter
from collections.abc import Hashable, Sequence
from typing import TypeVar

from ...core.errors import GraftError

Answer = TypeVar("Answer", bound=Hashable)


def vote(answers: Sequence[Sequence[Answer]]) -> list[Answer]:
    """For each example what most models say; of equally many the answer of the model that comes first.

    answers  of each model, one for each example: [{"label": ...}["label"], ...] of `graft.predict`

    PEFT for Speech: Unveiling Optimal Placement, Merging Strategies, and Ensemble Techniques. Lin et al., 2024.
    https://arxiv.org/abs/2401.02122 found that this beats placement by DARTS, and one method alone.
    """
    if not answers or len({len(own) for own in answers}) > 1:
        raise GraftError(f"a vote needs as many answers of each model, not {[len(own) for own in answers]}")
    return [Counter(given).most_common(1)[0][0] for given in zip(*answers)]  # which keeps the order of equals
