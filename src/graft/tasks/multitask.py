"""Eight tasks whose relatedness is known."""

import math
from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from typing import Annotated, Literal

from ..core.errors import GraftError
from ..core.hyper import Range
from . import Reference, Row, Task

DIRECTIONS = ("north", "northeast", "east", "southeast", "south", "southwest", "west", "northwest")
WORDS = (
    "anchor basket candle desert engine forest garden hammer island jacket kettle ladder magnet needle orchid pencil "
    "quartz ribbon saddle temple umbrella valley window yellow arrow bridge circle dragon eagle feather glass harbor"
)
COUNT = len(WORDS.split())
HELD = 512  # rows of a task in validation and in test
CLEAR = 1e-9  # nearer to the border than this, rounding would decide


@dataclass(frozen=True, kw_only=True)
class Multitask(Task):
    """Say whether a journey leads to the north (northeast, east, ...): eight yes-or-no tasks on the same texts.

    Each of 32 words is a step of length 1 in a direction of its own, evenly spread around the circle in an order that
    the seed draws. A text is a journey of different steps; the answer to a task is yes if their sum lies on the side
    of that direction. Two tasks whose directions are an angle a apart give the same answer for a share 1 - a / 180° of
    the texts, exactly by symmetry and up to chance in a sample: so their `relatedness` is known, 3/4 for neighbours,
    then 1/2 (nothing in common), 1/4, and 0 for opposites. With `task=all` the rows of the eight tasks stand in one
    split, each text under all of them; the prompt always names the task.
    """

    name = "multitask"
    sources = "generated"
    licence = "CC0-1.0"
    reference = Reference(base="graft:seedling-small", steps=80, rows=128)
    splits = {
        "train": "journeys to learn from",
        "validation": "journeys that no other split has in any order",
        "test": "journeys that no other split has in any order",
    }
    digest = "a485eb7282a6dc69577c79759a8f90d0407d71a4b882966568ab114d25b0c23e"

    task: Annotated[
        Literal["all", "north", "northeast", "east", "southeast", "south", "southwest", "west", "northwest"],
        "one of the eight tasks, or all of them together",
    ] = "all"
    examples: Annotated[int, "journeys in the train split", Range(1, 100_000)] = 1024
    length: Annotated[int, "steps of a journey", Range(3, COUNT // 2)] = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        if (possible := math.comb(COUNT, self.length)) < 2 * (self.examples + 2 * HELD):
            raise GraftError(
                f"examples={self.examples}: there are {possible} journeys of length={self.length}, "
                f"take at most {possible // 2 - 2 * HELD} or longer ones"
            )

    def items(self, row: Row) -> Iterable[Hashable]:
        """The steps of the journey, in any order."""
        return (frozenset(row["prompt"].partition(":")[0].split()),)

    def generate(self) -> dict[str, list[Row]]:
        angles, draw, journeys, words = self.directions(), self.draw("journeys"), {}, WORDS.split()
        while len(journeys) < self.examples + 2 * HELD:
            steps = draw.sample(words, self.length)
            sums = [sum(math.cos(angles[w] - toward(name)) for w in steps) for name in DIRECTIONS]
            if min(map(abs, sums)) > CLEAR:
                journeys.setdefault(frozenset(steps), (steps, sums))
        rows = [
            [
                {"prompt": f"{' '.join(steps)}: {name}?", "completion": " yes" if s > 0 else " no", "task": name}
                for name, s in zip(DIRECTIONS, sums)
                if self.task in ("all", name)
            ]
            for steps, sums in journeys.values()
        ]
        found = {"train": rows[: -2 * HELD], "validation": rows[-2 * HELD : -HELD], "test": rows[-HELD:]}
        return {split: [row for group in groups for row in group] for split, groups in found.items()}

    def directions(self) -> dict[str, float]:
        """The angle of each word, in radians from the east."""
        order = WORDS.split()
        self.draw("words").shuffle(order)
        return {word: 2 * math.pi * i / len(order) for i, word in enumerate(order)}


def toward(task: str) -> float:
    """The angle of a task's direction, in radians from the east."""
    return math.pi / 2 - DIRECTIONS.index(task) * math.pi / 4


def relatedness() -> list[list[float]]:
    """Share of texts for which two tasks have the same answer, 1 - a / 180°; rows and columns as `DIRECTIONS`."""
    apart = [[min((i - j) % 8, (j - i) % 8) for j in range(8)] for i in range(8)]
    return [[1 - steps / 4 for steps in row] for row in apart]
