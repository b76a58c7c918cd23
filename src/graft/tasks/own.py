"""Data of the user as a task."""

import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from ..core.errors import GraftError
from ..core.hyper import Range
from . import Metric, Reference, Row, Task
from .metrics import accuracy, exact_match

JUDGED: dict[str, tuple[Metric, ...]] = {"accuracy": (accuracy,), "exact_match": (exact_match,), "loss": ()}
ANSWERS = ("label", "completion", "target")  # columns, one of which holds the right answer; or the last message does


@dataclass(frozen=True, kw_only=True)
class Own(Task):
    """Data of your own, with splits that share no example.

    Files, folders and data sets of the hub as every command reads them. What is held out is drawn by the seed; rows
    that are alike in all but the answer stay together. What is measured follows from the columns: accuracy of a
    `label`, exact match of a `completion`, a `target` or the last message; of a plain `text`, or where a label is a
    number with a fraction, the loss alone.
    """

    name = "own"
    sources = "of the user"
    licence = "that of the data"
    splits = {
        "train": "what is left of the data",
        "validation": "held out of it, or data of its own",
        "test": "held out of it, or data of its own",
    }
    metrics: ClassVar[tuple[Metric, ...]] = ()
    reference = Reference(base="", steps=300)
    portable = False

    data: Annotated[str, "a file, a folder, or owner/name of a data set on the hub"]
    validation: Annotated[float | str, "other data of that kind, or the share to hold out", Range(above=0, below=1)] = (
        0.1
    )
    test: Annotated[float | str, "other data of that kind, or the share to hold out", Range(above=0, below=1)] = 0.1
    columns: Annotated[Mapping | None, "{name that is needed: name in the data}"] = None
    metric: Annotated[
        Literal["auto", "accuracy", "exact_match", "loss"], "what is measured; auto: what the columns speak for"
    ] = "auto"

    def __post_init__(self) -> None:
        for knob in ("validation", "test"):
            object.__setattr__(self, knob, _number(getattr(self, knob)))
        super().__post_init__()
        if self.metric == "auto":
            object.__setattr__(self, "metric", self._speaks_for())
        object.__setattr__(self, "metrics", self.judged({"metric": self.metric}))

    @classmethod
    def judged(cls, knobs: Mapping[str, Any]) -> tuple[Metric, ...]:
        return JUDGED[knobs["metric"]]

    @property
    def labels(self) -> tuple[str, ...] | None:
        if self.metric != "accuracy":
            return None
        from ..training.objectives.labelled import label_names

        names = label_names([row["label"] for rows in self._all.values() for row in rows])
        return tuple(map(str, names))

    def answer(self, row: Row) -> str:
        if "messages" in row:
            return row["messages"][-1]["content"]
        return str(next((row[column] for column in ANSWERS if column in row), ""))

    def items(self, row: Row) -> tuple[str]:
        """All but the answer."""
        asked = {k: v for k, v in row.items() if k not in ANSWERS}
        if "messages" in asked:
            asked["messages"] = asked["messages"][:-1]
        return (json.dumps(asked or row, sort_keys=True, default=_content),)

    def generate(self) -> dict[str, list[Row]]:
        rest = self._given
        held: dict[str, list[Row]] = {}
        shares = {split: getattr(self, split) for split in ("test", "validation")}
        total = len({item for row in rest for item in self.items(row)})
        for split, share in shares.items():
            if isinstance(share, str):
                held[split] = self._read(share, split)
                continue
            keys = sorted({item for row in rest for item in self.items(row)})
            self.draw(split).shuffle(keys)
            chosen = set(keys[: round(share * total)])
            held[split] = [row for row in rest if chosen.issuperset(self.items(row))]
            rest = [row for row in rest if not chosen.issuperset(self.items(row))]
            if not held[split] or not rest:
                raise GraftError(
                    f"{split}={share:g} of the {total} examples of {self.data} leaves {split if rest else 'train'} "
                    f"empty: take another share, or name other data for {split}"
                )
        return {"train": rest, "validation": held["validation"], "test": held["test"]}

    def fingerprint(self) -> str:
        """SHA-256 over all rows; of an image its pixels or its file count."""
        content = json.dumps(self._all, sort_keys=True, default=_content)
        paths = {row["image"] for rows in self._all.values() for row in rows if isinstance(row.get("image"), str)}
        files = [hashlib.sha256(Path(p).read_bytes()).hexdigest() for p in sorted(paths)]
        return hashlib.sha256(json.dumps([content, files]).encode()).hexdigest()

    def _speaks_for(self) -> str:
        from ..training.objectives import guess

        rows = self._given
        objective = guess(rows)
        if "accuracy" in objective.metrics:
            return "accuracy"
        return "exact_match" if objective.generates and "text" not in rows[0] else "loss"

    @functools.cached_property
    def _given(self) -> list[Row]:
        return self._read(self.data, "train")

    def _read(self, source: str, split: str) -> list[Row]:
        from ..training.data import read

        found = read(source, split=split, columns=self.columns)
        names = getattr((getattr(found, "features", None) or {}).get("label"), "names", None)
        return [_named(dict(row), names) for row in found]


def _named(row: Row, names: Sequence[str] | None) -> Row:
    """The row with its class as a text; a number with a fraction is no class."""
    label = row.get("label")
    if names and isinstance(label, int):
        return row | {"label": names[label]}
    return row if label is None or isinstance(label, float) else row | {"label": str(label)}


def _number(value: Any) -> Any:
    """A number that was written as a text."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return value


def _content(value: Any) -> Any:
    """What JSON can hold of an array, or of an image."""
    if hasattr(value, "tolist"):
        return value.tolist()
    return hashlib.sha256(value.tobytes()).hexdigest() if hasattr(value, "tobytes") else str(value)
