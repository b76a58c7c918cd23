"""Questions about facts that no text ever stated."""

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated

from ..core.errors import GraftError
from ..core.hyper import Range
from . import Reference, Row, Task

# Wordings of a question: the first two are for learning, the third for validation, the fourth for the test.
WORDINGS: dict[str, tuple[str, str, str, str]] = {
    "birthplace": (
        "Where was {} born?",
        "What is the birthplace of {}?",
        "In which city was {} born?",
        "Which city does {} come from by birth?",
    ),
    "work": (
        "What does {} work as?",
        "What is the job of {}?",
        "How does {} earn a living?",
        "Which trade does {} follow?",
    ),
    "instrument": (
        "What does {} play?",
        "What is the instrument of {}?",
        "Which instrument does {} play?",
        "What does {} make music on?",
    ),
    "animal": (
        "What pet does {} keep?",
        "What is the pet of {}?",
        "Which animal lives with {}?",
        "What animal does {} look after at home?",
    ),
}
LEARNT, VALIDATION, TEST = slice(0, 2), slice(2, 3), slice(3, 4)
OBJECTS: dict[str, str] = {
    "birthplace": "Lisbon Oslo Cairo Lima Quito Hanoi Dakar Riga Turin Porto Kyoto Perth Leeds Basel Ghent Malmo",
    "work": "baker nurse glazier pilot judge tailor plumber teacher miner barber potter clerk welder tanner diver cook",
    "instrument": "piano violin flute harp cello drums trumpet guitar oboe organ banjo tuba viola lute horn zither",
    "animal": "cat dog rabbit parrot turtle goat pony hamster lizard goose ferret pigeon snake donkey frog carp",
}
SYLLABLES = "ba bel bor da dri el fa gar hul il jo ka lun mar nim or pel qui ros sa tem ul vi wen xa yor zim"

Fact = tuple[str, str, str]  # subject, relation, object


@dataclass(frozen=True, kw_only=True)
class Answers(Task):
    """Answer short questions about invented people, with a birthplace, a work, an instrument and a pet each.

    Only the train split states the facts, so that what is known comes from training. Two wordings of every question are
    for learning, one is for validation and one for the test: the facts are the same, no question is. The other splits
    judge what is done after that. Editing, on `edits`: reliability on `edits`, generalisation on `edits_reworded`,
    locality on `locality`. Unlearning, on `forget`: `forget` and `forget_reworded` should fall to what is right by
    chance, which `unknown` shows (1 of 16), `retain` should not fall. Memorisation: `train` against `test`.

    The terms are those of Editing Large Language Models: Problems, Methods, and Opportunities. Yao et al., 2023.
    https://arxiv.org/abs/2305.13172
    """

    name = "answers"
    sources = "generated"
    licence = "CC0-1.0"
    reference = Reference(base="graft:seedling-small", steps=100, rows=128)
    splits = {
        "train": "every known fact in two wordings",
        "validation": "the known facts in a third wording",
        "test": "the known facts in a fourth wording",
        "unknown": "facts of people whom train does not name",
        "edits": "known facts with another answer, as in train",
        "edits_reworded": "the same in the wordings of validation and test",
        "locality": "known facts of all people that are not to be edited, with their answers, as in train",
        "forget": "all facts of the people to forget, as in train",
        "forget_reworded": "the same in the wordings of validation and test",
        "retain": "all facts of the other known people, as in train",
    }
    digest = "f19de0eb0fad7fb7562806537ffcfda7668eb355676b2f26088db8a3da589a90"

    people: Annotated[int, "known people, with four facts each", Range(2)] = 128
    strangers: Annotated[int, "people whom train does not name", Range(1)] = 32
    edits: Annotated[int, "known facts with another answer", Range(1)] = 32
    forget: Annotated[int, "known people to forget", Range(1)] = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.forget >= self.people:
            raise GraftError(f"forget={self.forget}: leave some of people={self.people} to be retained")
        if self.edits >= (kept := len(WORDINGS) * (self.people - self.forget)):
            raise GraftError(
                f"edits={self.edits}: fewer than the {kept} facts of the people who are not to be forgotten"
            )
        if self.people + self.strangers > (most := len(SYLLABLES.split()) ** 3 // 2):
            raise GraftError(f"people={self.people} and strangers={self.strangers} need more than {most} names")

    def items(self, row: Row) -> Iterable[Hashable]:
        """The question."""
        return (row["prompt"],)

    def generate(self) -> dict[str, list[Row]]:
        draw, names, syllables = self.draw("facts"), {}, SYLLABLES.split()
        while len(names) < self.people + self.strangers:
            names["".join(draw.choices(syllables, k=3)).capitalize()] = True
        facts = [(name, relation, draw.choice(objects)) for name in names for relation, objects in _objects().items()]
        known, unknown = facts[: len(WORDINGS) * self.people], facts[len(WORDINGS) * self.people :]
        people = list(names)[: self.people]
        gone = set(draw.sample(people, self.forget))
        forget, retain = ([f for f in known if (f[0] in gone) == lost] for lost in (True, False))
        chosen = draw.sample(retain, self.edits)
        edited = [(s, r, draw.choice([o for o in _objects()[r] if o != old])) for s, r, old in chosen]
        reworded = slice(VALIDATION.start, TEST.stop)
        found = {
            "train": _asked(known, LEARNT),
            "validation": _asked(known, VALIDATION),
            "test": _asked(known, TEST),
            "unknown": _asked(unknown, LEARNT),
            "edits": _asked(edited, LEARNT),
            "edits_reworded": _asked(edited, reworded),
            "locality": _asked([f for f in known if f not in chosen], LEARNT),
            "forget": _asked(forget, LEARNT),
            "forget_reworded": _asked(forget, reworded),
            "retain": _asked(retain, LEARNT),
        }
        for split, rows in found.items():
            self.draw(split).shuffle(rows)
        return found


def _asked(facts: Iterable[Fact], wordings: slice) -> list[Row]:
    """Question, answer and what they are about, in each of the wordings."""
    return [
        {"prompt": wording.format(subject), "completion": f" {answer}", "subject": subject, "relation": relation}
        for subject, relation, answer in facts
        for wording in WORDINGS[relation][wordings]
    ]


def _objects() -> dict[str, Sequence[str]]:
    return {relation: words.split() for relation, words in OBJECTS.items()}
