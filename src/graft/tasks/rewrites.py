"""Following instructions: rules that rewrite strings."""

import string
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Annotated

from ..core.errors import GraftError
from ..core.hyper import Range
from . import Reference, Row, Task

LEFT, RIGHT = 2, 3  # letters that a rule looks for; at most so many that it writes
UNSEEN, TESTED = 128, 512  # rules and rows of each split but train

Rule = tuple[str, str]


@dataclass(frozen=True, kw_only=True)
class Rewrites(Task):
    """Rewrite a string by the rules of the instruction, each at its leftmost place, one after the other.

    `Rewrite a b as c, then c d as f = x a b d` in the prompt, the new string in the completion. Letters stand apart, so
    that each is a token of its own for most tokenizers. Every rule of an instruction applies. At a fixed number of
    `examples` the number of `rules` says how diverse the instructions are: rules that were never seen are followed once
    there are enough others (papers below), so validation and test hold only such rules.

    Instruction Diversity Drives Generalization To Unseen Tasks. Zhang, Wang, Charton, 2024.
    https://arxiv.org/abs/2402.10891. From Symbolic Tasks to Code Generation: Diversification Yields Better Task
    Performers. Zhang, Wang, Charton, 2024. https://arxiv.org/abs/2405.19787
    """

    name = "rewrites"
    sources = "generated"
    licence = "CC0-1.0"
    reference = Reference(base="graft:seedling-small", steps=120)
    splits = {
        "train": "instructions with the rules to learn from",
        "validation": "rules that no other split has",
        "test": "rules that no other split has",
        "seen": "the rules of train, in instructions that train does not have",
        "deeper": "the rules of train, one more in each instruction",
    }
    digest = "e9cf0d27dd82271865639695e3806f68b1edffda279e093215ed2dae477dc4f1"

    rules: Annotated[int, "different rules in the train split", Range(1)] = 512
    examples: Annotated[int, "rows of the train split", Range(1)] = 4096
    depth: Annotated[int, "rules of one instruction, applied one after the other", Range(1)] = 1
    length: Annotated[int, "letters of a string before it is rewritten", Range(LEFT)] = 8
    letters: Annotated[int, "size of the alphabet", Range(4, 26)] = 12
    skew: Annotated[float, "exponent s of the rules' frequencies in train, 1 / rank^s; 0: all alike", Range(0)] = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.length < LEFT * (self.depth + 1):
            raise GraftError(
                f"length={self.length}: instructions of depth={self.depth}, and one deeper, need at least "
                f"{LEFT * (self.depth + 1)} letters"
            )
        rights = sum(self.letters**n for n in range(1, RIGHT + 1)) - 1
        if (possible := rights * self.letters**LEFT) < self.rules + 2 * UNSEEN:
            raise GraftError(
                f"rules={self.rules}: letters={self.letters} make {possible} rules, of which {2 * UNSEEN} are held out"
            )

    def items(self, row: Row) -> Iterable[Hashable]:
        """The rules."""
        return read(row["prompt"])[0]

    def generate(self) -> dict[str, list[Row]]:
        count, rules = self.rules + 2 * UNSEEN, {}
        draw = self.draw("rules")
        while len(rules) < count:
            left, right = self._string(draw, LEFT), self._string(draw, draw.randint(1, RIGHT))
            if left != right:
                rules[left, right] = True
        pool = list(rules)
        known, held, last = pool[: self.rules], pool[self.rules : -UNSEEN], pool[-UNSEEN:]
        rank = [(i + 1) ** -self.skew for i in range(len(known))]
        prompts: set[str] = set()
        return {
            "train": self._rows("train", known, rank, self.examples, self.depth, prompts),
            "validation": self._rows("validation", held, None, TESTED, self.depth, prompts),
            "test": self._rows("test", last, None, TESTED, self.depth, prompts),
            "seen": self._rows("seen", known, None, TESTED, self.depth, prompts),
            "deeper": self._rows("deeper", known, None, TESTED, self.depth + 1, prompts),
        }

    def _rows(
        self,
        split: str,
        rules: Sequence[Rule],
        weights: Sequence[float] | None,
        count: int,
        depth: int,
        taken: set[str],
    ) -> list[Row]:
        """So many rows, whose prompts are added to those `taken`."""
        draw, rows, failed = self.draw(split), [], 0
        while len(rows) < count:
            chosen = draw.choices(rules, weights, k=depth)
            text = self._holding(draw, [left for left, _ in chosen])
            prompt, failed = write(chosen, text), failed + 1
            if prompt not in taken and (said := apply(chosen, text)):
                taken.add(prompt)
                failed = 0
                rows.append({"prompt": prompt, "completion": spaced(said)})
            elif failed > 1000:
                raise GraftError(
                    f"length={self.length}, letters={self.letters}: there are hardly {count} different instructions of "
                    f"depth {depth} with {len(rules)} rules: take longer strings, more rules or fewer examples"
                )
        return rows

    def _string(self, draw: Random, length: int) -> str:
        return "".join(draw.choices(string.ascii_lowercase[: self.letters], k=length))

    def _holding(self, draw: Random, parts: Sequence[str]) -> str:
        """A random string that holds all `parts`, in a random order."""
        loose = self.length - sum(map(len, parts))
        pieces = [*parts, *self._string(draw, loose)]
        draw.shuffle(pieces)
        return "".join(pieces)


def write(rules: Sequence[Rule], text: str) -> str:
    """The instruction."""
    return f"Rewrite{', then'.join(f'{spaced(left)} as{spaced(right)}' for left, right in rules)} ={spaced(text)} ="


def read(prompt: str) -> tuple[list[Rule], str]:
    """The rules and the string of an instruction."""
    given, text, _ = prompt.removeprefix("Rewrite").split("=")
    pairs = [part.split(" as ") for part in given.split(", then")]
    return [(joined(left), joined(right)) for left, right in pairs], joined(text)


def apply(rules: Sequence[Rule], text: str) -> str | None:
    """The string after all rules, one after the other; None if one of them does not apply."""
    for left, right in rules:
        if left not in text:
            return None
        text = text.replace(left, right, 1)
    return text


def spaced(text: str) -> str:
    """Each letter with a space before it."""
    return "".join(f" {letter}" for letter in text)


def joined(text: str) -> str:
    return "".join(text.split())
