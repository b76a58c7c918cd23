"""Preferences whose true reward is known."""

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Annotated

from ..core.hyper import Range, hyperparameters
from . import Reference, Row
from .metrics import exact_match
from .rewrites import Rewrites, apply, joined, read, spaced

WORST = 4  # letters that are changed in the worst of the answers


def reward(said: Sequence[str], right: Sequence[str]) -> float:
    """Mean of 1 - d / n: d the edit distance of two strings, n the letters of the longer one, without spaces."""
    pairs = [(joined(s), joined(r)) for s, r in zip(said, right, strict=True)]
    return sum(1 - distance(s, r) / max(len(s), len(r)) for s, r in pairs) / len(pairs)


@dataclass(frozen=True, kw_only=True)
class Prefer(Rewrites):
    """Of two answers to an instruction of `rewrites`, the better one and the other: `prompt`, `chosen`, `rejected`.

    The true reward of an answer is 1 - d / n: d is its edit distance to the right string and n the length of the longer
    one of both, in letters. Each answer of a pair is the right string with 0 to 4 random edits, and their rewards are
    never equal. A share `noise` of the train pairs is the wrong way round, as `flipped` says; no other split has noise.

    The metrics are of answers that the model itself writes: their mean true reward, and the share of exactly right
    ones. `--columns completion=chosen` measures so a model of prompts and completions, or trains it on the chosen.
    """

    name = "prefer"
    reference = Reference(base="graft:seedling-small", steps=80, rows=128, columns={"completion": "chosen"})
    splits = {
        "train": "pairs on the rules to learn from, some of them flipped if there is noise",
        "validation": "pairs on rules that no other split has",
        "test": "pairs on rules that no other split has",
        "seen": "pairs on the rules of train, in instructions that train does not have",
        "deeper": "pairs on the rules of train, one more in each instruction",
    }
    metrics = (reward, exact_match)
    target = "chosen"
    digest = "8636cd1c55d4e00143f0047a135ec7ed35b9c03a587d7bd2a6b4fe15a8513cec"

    noise: Annotated[float, "probability that a pair of the train split is flipped", Range(0, 1)] = 0.0

    def generate(self) -> dict[str, list[Row]]:
        own = hyperparameters(Rewrites)
        plain = Rewrites(**{knob: getattr(self, knob) for knob in own}).generate()
        return {split: self._pairs(split, rows) for split, rows in plain.items()}

    def reward(self, prompt: str, answer: str) -> float:
        """The true reward, from 0 to 1, of any answer to an instruction."""
        return reward([answer], [_right(prompt)])

    def answer(self, row: Row) -> str:
        return spaced(_right(row["prompt"]))

    def _pairs(self, split: str, rows: Sequence[Row]) -> list[Row]:
        draw, flips, pairs = self.draw(f"pairs {split}"), self.draw(f"noise {split}"), []
        for row in rows:
            right, rewards = joined(row["completion"]), {}
            while len(rewards) < 2:
                said = self._changed(draw, right, draw.randint(0, WORST))
                rewards.setdefault(self.reward(row["prompt"], said), spaced(said))
            worse, better = (rewards[r] for r in sorted(rewards))
            flipped = flips.random() < self.noise and split == "train"
            first, second = (worse, better) if flipped else (better, worse)
            pairs.append({"prompt": row["prompt"], "chosen": first, "rejected": second, "flipped": flipped})
        return pairs

    def _changed(self, draw: Random, text: str, edits: int) -> str:
        """`text` with so many random replacements, insertions and removals of a letter."""
        for _ in range(edits):
            place, kind = draw.randrange(len(text)), draw.randrange(3)
            new = "" if kind == 0 and len(text) > 1 else self._string(draw, 1)
            text = text[:place] + new + text[place + (kind < 2) :]
        return text


def distance(a: str, b: str) -> int:
    """Levenshtein's distance: the fewest letters to insert, remove or replace."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        last, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            last, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, last + (x != y))
    return row[-1]


def _right(prompt: str) -> str:
    """The right answer to what is asked last: answered examples may stand before it."""
    return apply(*read(prompt.rpartition("\n\n")[2])) or ""
