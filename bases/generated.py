"""Short generated exercises for pre-training: copying, replacing, counting, arithmetic, looking up what was said.

They give a small model the skills that adaptation builds on. None of the tasks of the proving ground is among them:
the wordings, the names and the questions are others.
"""

import random
import string
from collections.abc import Iterator

NAMES = [
    "Anna",
    "Ben",
    "Clara",
    "David",
    "Emma",
    "Felix",
    "Grace",
    "Henry",
    "Iris",
    "Jack",
    "Kate",
    "Leo",
    "Mia",
    "Noah",
    "Olga",
    "Paul",
    "Rosa",
    "Sam",
    "Tina",
    "Victor",
]
THINGS = [
    "ball",
    "book",
    "box",
    "coin",
    "cup",
    "drum",
    "flag",
    "glove",
    "hat",
    "key",
    "kite",
    "lamp",
    "map",
    "pen",
    "ring",
    "rope",
    "shoe",
    "spoon",
    "stone",
    "toy",
]
COLOURS = ["red", "blue", "green", "yellow", "black", "white", "brown", "grey", "pink", "orange"]
ROOMS = ["kitchen", "garden", "office", "cellar", "attic", "hall", "library", "garage"]
WORDS = [
    *THINGS,
    *ROOMS,
    *COLOURS,
    *[
        "apple",
        "bread",
        "chair",
        "door",
        "egg",
        "fish",
        "grass",
        "house",
        "ink",
        "juice",
        "knife",
        "leaf",
        "moon",
        "nest",
    ],
]


def texts(split: str, room: float) -> Iterator[str]:
    """Exercises, several to a text, until `room` characters are full."""
    draw = random.Random(f"graft {split}")
    while room > 0:
        # One kind a text, so that the first lines show how the next ones go on.
        kind = draw.choice(KINDS)
        text = "\n".join(kind(draw) for _ in range(draw.randint(2, 10))) + "\n"
        room -= len(text)
        yield text


def copy(draw: random.Random) -> str:
    said = sequence(draw)
    return f"copy: {said} -> {said}"


def reverse(draw: random.Random) -> str:
    items = sequence(draw).split()
    return f"reverse: {' '.join(items)} -> {' '.join(items[::-1])}"


def substitute(draw: random.Random) -> str:
    items = sequence(draw).split()
    old, new = draw.choice(items), draw.choice(WORDS + list(string.ascii_lowercase))
    return f"{' '.join(items)} with {new} for {old}: {' '.join(new if i == old else i for i in items)}"


def method(draw: random.Random) -> str:
    text = sequence(draw)
    old, new = draw.choice(text.split()), draw.choice(string.ascii_lowercase)
    return f'>>> "{text}".replace("{old}", "{new}")\n\'{text.replace(old, new)}\''


def insert(draw: random.Random) -> str:
    items = sequence(draw).split()
    place, new = draw.randrange(len(items)), draw.choice(string.ascii_lowercase)
    return f"put {new} after {items[place]}: {' '.join(items)} -> " + " ".join(
        [*items[: (i := items.index(items[place]) + 1)], new, *items[i:]]
    )


def count(draw: random.Random) -> str:
    items = draw.choices(draw.sample(string.ascii_lowercase, 3), k=draw.randint(3, 9))
    one = draw.choice(items)
    return f"how many {one} in {' '.join(items)}? {items.count(one)}"


def ends(draw: random.Random) -> str:
    items = sequence(draw).split()
    which, found = draw.choice([("first", items[0]), ("last", items[-1]), ("second", items[1])])
    return f"the {which} of {' '.join(items)} is {found}"


def order(draw: random.Random) -> str:
    items = draw.sample(string.ascii_lowercase, draw.randint(3, 6))
    return f"sorted: {' '.join(items)} -> {' '.join(sorted(items))}"


def sums(draw: random.Random) -> str:
    a, b = draw.randint(0, 99), draw.randint(0, 99)
    sign, result = draw.choice([("+", a + b), ("-", a - b)])
    return f"{a} {sign} {b} = {result}"


def compare(draw: random.Random) -> str:
    a, b = draw.sample(range(100), 2)
    return f"is {a} more than {b}? {'yes' if a > b else 'no'}"


def story(draw: random.Random) -> str:
    """Several sentences, and questions on some of them."""
    people = draw.sample(NAMES, draw.randint(2, 4))
    has = {p: f"{draw.choice(COLOURS)} {draw.choice(THINGS)}" for p in people}
    where = {p: draw.choice(ROOMS) for p in people}
    said = [f"{p} has a {has[p]}." for p in people] + [f"{p} is in the {where[p]}." for p in people]
    draw.shuffle(said)
    asked = draw.choice(people)
    question = draw.choice(
        [f"What does {asked} have? A {has[asked]}.", f"In which room is {asked}? In the {where[asked]}."]
    )
    return f"{' '.join(said)} {question}"


def lookup(draw: random.Random) -> str:
    keys = draw.sample(WORDS, draw.randint(2, 5))
    values = {key: draw.choice(WORDS + [str(draw.randint(0, 99))]) for key in keys}
    asked = draw.choice(keys)
    pairs = ", ".join(f"{key}: {value}" for key, value in values.items())
    return f"{{{pairs}}} [{asked}] is {values[asked]}"


def sequence(draw: random.Random) -> str:
    """Letters or words with spaces between."""
    source = draw.choice([string.ascii_lowercase, string.ascii_lowercase, WORDS, string.digits])
    return " ".join(draw.choices(source, k=draw.randint(2, 10)))


KINDS = [copy, reverse, substitute, method, insert, count, ends, order, sums, compare, story, lookup]
