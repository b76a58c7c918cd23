"""What decides the result of a run."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from typing import Any

from ..catalogue import plain

LATER = {"later": True}  # of a field that came later: left out where it is empty, so that older names stay


@dataclass(frozen=True, kw_only=True)
class Configuration:
    """One run; equal ones give the same metrics on the same machine with as many threads.

    base      the base model; `weights` its fingerprint, so that other weights under that name are another run
    task      the name of a task, with its `version`, its `knobs` and the fingerprint `data` of its rows
    method    a method; a chain of them joined by +, innermost first; or one of `graft.runs.single.CONTROLS`
    options   its hyperparameters; of a chain {method: these}
    targets   modules to adapt; by default what the method is made for; of a chain {method: these} where they differ
    seed      of what is new in the model and of the order of the data; the task has its own among the knobs
    training  what `graft.fit` takes
    rows      as many rows of a split as are measured at most, drawn by the task's seed
    splits    what is measured, of the parameters after the last step
    train_rows  as many rows of the train split as are trained on at most; the smaller of two draws is within the larger
    also      what is measured beside that: `points` of a curve of the validation loss; `latency` (true) of one batch;
              the loss on the data of `forgetting`, {"data": name, "rows": at most, "fingerprint": of these}
    quantise  how the base's linear layers are quantised, see `graft.quantise`; full fine-tuning trains the plain ones
    """

    base: str
    weights: str | None = None
    task: str
    version: int = 1
    knobs: Mapping[str, Any] = field(default_factory=dict)
    data: str = ""
    method: str
    options: Mapping[str, Any] = field(default_factory=dict)
    targets: Any = None
    seed: int = 0
    training: Mapping[str, Any] = field(default_factory=dict)
    rows: int = 512
    splits: tuple[str, ...] = ("validation",)
    train_rows: int | None = field(default=None, metadata=LATER)
    also: Mapping[str, Any] = field(default_factory=dict, metadata=LATER)
    quantise: str | None = field(default=None, metadata=LATER)

    @property
    def model(self) -> str:
        """The base for a table: "graft:seedling", or "graft:seedling (int8)"."""
        return f"{self.base} ({self.quantise})" if self.quantise else self.base

    def plain(self) -> dict[str, Any]:
        """As JSON holds it."""
        empty = {f.name for f in fields(self) if f.metadata == LATER and not getattr(self, f.name)}
        return plain({k: v for k, v in asdict(self).items() if k not in empty})

    @classmethod
    def of(cls, content: Mapping[str, Any]) -> "Configuration":
        """From what `plain` gives."""
        return cls(**{**content, "splits": tuple(content["splits"])})

    @cached_property
    def id(self) -> str:
        """Its name: 16 digits of the SHA-256 over all of it."""
        return hashlib.sha256(json.dumps(self.plain(), sort_keys=True).encode()).hexdigest()[:16]
