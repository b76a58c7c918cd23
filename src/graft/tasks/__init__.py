"""Tasks: data with splits, a metric and a baseline, made on the spot. One file a task, found by itself.

    from graft import tasks
    rows = tasks.load("rewrites", split="test", seed=1, rules=64)
    rows.score(predictions)  # {"exact_match": 0.75}

Wherever data is named, `task:rewrites` is such data, `task:rewrites,rules=64,seed=1` with knobs and
`task:rewrites,split=seen` another split than the one that is asked for there.

A new task is a file here with a frozen dataclass that derives from `Task`. Its fields are its knobs, written like the
hyperparameters of a method. Other packages announce theirs under the entry point "graft.tasks".
"""

import functools
import hashlib
import inspect
import json
import random
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Annotated, Any, ClassVar

from .. import evidence
from ..core.errors import GraftError
from ..core.hyper import Hyper, Range, check, hyperparameters
from ..core.loading import load_all
from .metrics import exact_match

TASKS: dict[str, type["Task"]] = {}
SPLITS = ("train", "validation", "test")

Row = dict[str, Any]
Metric = Callable[[Sequence[str], Sequence[str]], float]


class Rows(list[Row]):
    """The rows of one split, which know the task that they are from.

    task, split  where they are from
    labels       the names of all classes of the task in their order, whether or not they occur here; or None
    metrics      the names of what `score` reports; of each of them more is better, and the first one decides
    generation   options for the model that writes answers: as many tokens as the longest right one has bytes, at least
    """

    def __init__(self, rows: Iterable[Row], task: "Task", split: str):
        super().__init__(rows)
        self.task, self.split = task, split

    @property
    def labels(self) -> tuple[str, ...] | None:
        return self.task.labels

    @property
    def metrics(self) -> tuple[str, ...]:
        return tuple(m.__name__ for m in self.task.metrics)

    @property
    def generation(self) -> dict[str, int]:
        return {"max_new_tokens": 2 + max(len(self.task.answer(row).encode()) for row in self)}

    def select(self, places: Iterable[int]) -> "Rows":
        """Some of the rows."""
        return Rows([self[i] for i in places], self.task, self.split)

    def score(self, predictions: Sequence[Any]) -> dict[str, float]:
        """The metrics of one prediction a row: a text, or {"label", ...} as `graft.predict` gives it."""
        if len(predictions) != len(self):
            raise GraftError(f"{len(predictions)} predictions for {len(self)} rows: give one a row, in their order")
        return self.task.score(self, [str(p["label"] if isinstance(p, Mapping) else p) for p in predictions])


@dataclass(frozen=True, kw_only=True)
class Reference:
    """How a task is trained on where methods are compared (`graft.runs`): for less than a minute on one core.

    base        the base model
    steps       optimizer steps
    batch_size  examples in one of them
    max_length  tokens of an example, at most; None: what the model takes
    rows        of validation and of test, as many as are measured at most
    precision   of the products in training; parameters are float32
    columns     {name that is needed: name in the rows}
    """

    base: str
    steps: int
    batch_size: int = 16
    max_length: int | None = None
    rows: int = 256
    precision: str = "fp32"
    columns: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Task(ABC):
    """One task, with values for its knobs.

    A class says: its `name`; its `version`, one more with every change of content; `sources`, `licence`; `splits`, what
    is in each of them: train, validation and test share no item, further ones may say otherwise; `metrics`, functions
    of the answers given and the right ones, which stand in the column `target`; the `reference` training; and whether
    it is `portable`: the same rows on every machine, whose `digest` at the default knobs is then given. Its docstring
    is its description.
    """

    name: ClassVar[str]
    version: ClassVar[int] = 1
    sources: ClassVar[str]
    licence: ClassVar[str]
    splits: ClassVar[dict[str, str]]
    metrics: ClassVar[tuple[Metric, ...]] = (exact_match,)
    target: ClassVar[str] = "completion"
    reference: ClassVar[Reference] = Reference(base="graft:seedling-small", steps=120)
    portable: ClassVar[bool] = True
    digest: ClassVar[str] = ""

    seed: Annotated[int, "of the split and of all that is drawn", Range(0)] = 0

    def __init_subclass__(cls, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        if "name" in vars(cls):
            TASKS[cls.name] = cls

    def __post_init__(self) -> None:
        for knob in fields(self):
            check(type(self), knob.name, getattr(self, knob.name))

    @abstractmethod
    def generate(self) -> Mapping[str, list[Row]]:
        """The rows of every split; equal knobs give equal rows."""

    @abstractmethod
    def items(self, row: Row) -> Iterable[Hashable]:
        """What a row may share with no row of another of the splits train, validation and test."""

    @property
    def labels(self) -> tuple[str, ...] | None:
        """The names of the classes in their order, of tasks that have classes."""
        return None

    @functools.cached_property
    def _all(self) -> Mapping[str, list[Row]]:
        return self.generate()

    def rows(self, split: str) -> Rows:
        """The rows of one split."""
        if split not in self.splits:
            raise GraftError(f"the task {self.name} has no split {split!r}: {_nearest(split, self.splits)}")
        return Rows(self._all[split], self, split)

    @classmethod
    def judged(cls, knobs: Mapping[str, Any]) -> tuple[Metric, ...]:
        """The metrics of a task with these knobs, without making its rows."""
        return cls.metrics

    def answer(self, row: Row) -> str:
        """What a model should say of a row."""
        return row[self.target]

    def score(self, rows: Sequence[Row], answers: Sequence[str]) -> dict[str, float]:
        """The metrics of one answer a row."""
        right = [self.answer(row) for row in rows]
        return {metric.__name__: metric(answers, right) for metric in self.metrics}

    def baseline(self, rows: Rows | None = None) -> dict[str, float]:
        """The metrics, on the test split or on `rows`, of who always gives the commonest answer of the train split.

        Of equally common ones the first.
        """
        counts = Counter(self.answer(row) for row in self.rows("train"))
        rows = self.rows("test") if rows is None else rows
        return self.score(rows, [counts.most_common(1)[0][0]] * len(rows))

    def draw(self, purpose: str) -> random.Random:
        """A generator of random numbers that depends on the seed and the purpose: one draw more changes no other."""
        return random.Random(f"{self.name} {self.seed} {purpose}")

    def fingerprint(self) -> str:
        """SHA-256 over all rows of all splits, written as JSON."""
        content = {split: self.rows(split) for split in self.splits}
        return hashlib.sha256(json.dumps(content, sort_keys=True, default=_listed).encode()).hexdigest()


def task(name: str, **knobs: Any) -> Task:
    """The task called `name`, with values for its knobs; the others have their defaults."""
    cls = find(name)
    for knob in knobs:
        if knob not in hyperparameters(cls):
            raise GraftError(f"the task {name} has no knob {knob!r}: {_nearest(knob, hyperparameters(cls))}")
    if missing := [knob for knob, of in hyperparameters(cls).items() if of.required and knob not in knobs]:
        raise GraftError(f"the task {name} needs {missing[0]}: {name},{missing[0]}=...")
    return cls(**knobs)


def load(name: str, *, split: str = "train", **knobs: Any) -> Rows:
    """The rows of a split of the task called `name`: a list of dicts that training, evaluation and prediction take."""
    return task(name, **knobs).rows(split)


def read(text: str, split: str) -> Rows:
    """The rows that `task:...` names: NAME, or NAME,KNOB=VALUE,... with `split=...` in the place of `split`."""
    made, own = parse(text)
    return made.rows(own or split)


def parse(text: str) -> tuple[Task, str | None]:
    """The task that NAME,KNOB=VALUE,... names, and its split if one is named."""
    name, *settings = (part.strip() for part in text.split(","))
    given = {}
    for setting in settings:
        knob, equals, value = setting.partition("=")
        if not equals:
            raise GraftError(f"task:{text}: {setting!r} is no setting of a knob, such as seed=1")
        given[knob.strip()] = value.strip()
    split, known = given.pop("split", None), hyperparameters(find(name))
    return task(name, **{k: _value(v, known[k]) if k in known else v for k, v in given.items()}), split


def find(name: str) -> type[Task]:
    """The task's class."""
    _import()
    if name not in TASKS:
        raise GraftError(f"no task is called {name!r}: {_nearest(name, TASKS)}")
    return TASKS[name]


def catalogue() -> list[dict[str, Any]]:
    """What all tasks that are at hand say of themselves, by name, without making their rows.

    One whose data must be named, as those of `own`, is not among them.
    """
    _import()
    return [
        describe(cls) for _, cls in sorted(TASKS.items()) if not any(k.required for k in hyperparameters(cls).values())
    ]


def describe(cls: type[Task]) -> dict[str, Any]:
    """A task as plain data."""
    from ..catalogue import described

    doc = inspect.cleandoc(cls.__doc__ or "")
    return {
        "name": cls.name,
        "version": cls.version,
        "summary": " ".join(doc.split("\n\n")[0].split()),
        "doc": doc,
        "sources": cls.sources,
        "licence": cls.licence,
        "metrics": [m.__name__ for m in cls.metrics],
        "portable": cls.portable,
        "digest": cls.digest,
        "splits": cls.splits,
        "reference": asdict(cls.reference),
        "references": evidence.of(cls.name),
        "knobs": [described(h) for h in hyperparameters(cls).values()],
    }


def card(made: Task, examples: int = 2) -> dict[str, Any]:
    """The data card of a task with its knobs: what it says of itself, and sizes, examples and the baseline."""
    return {
        **describe(type(made)),
        "metrics": [m.__name__ for m in made.metrics],
        "values": {knob.name: getattr(made, knob.name) for knob in fields(made)},
        "labels": made.labels,
        "sizes": {split: len(made.rows(split)) for split in made.splits},
        "examples": [{k: _listed(v) for k, v in row.items()} for row in made.rows("train")[:examples]],
        "baseline": made.baseline(),
        "fingerprint": made.fingerprint(),
    }


def _import() -> None:
    load_all(__name__, "graft.tasks")


def _nearest(name: str, known: Iterable[str]) -> str:
    from ..training.messages import nearest  # imports torch

    return nearest(name, known)


def _value(text: str, knob: Hyper) -> Any:
    """What a text says: itself, if the knob takes that, or a number or truth value as JSON writes it."""
    try:
        return text if knob.accepts(text) else json.loads(text)
    except ValueError:
        return text


def _listed(value: Any) -> Any:
    """An array as lists."""
    return value.tolist() if hasattr(value, "tolist") else value
