"""Where records are kept: a folder with one file a run, and files of many runs for a repository."""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from ..catalogue import plain
from ..core import disk
from ..core.errors import GraftError
from .configuration import Configuration

FORMAT = 1
POINTS = 32  # of a loss curve in a file of many runs


@dataclass(frozen=True, kw_only=True)
class Record:
    """What one run gave.

    status       done or failed; reason: why it failed
    metrics      {split: {name: value}}
    baseline     {split: {name: value}}: what always giving the commonest answer of the train split gets on these rows
    curve        [[step, loss of training], ...]; in a file of many runs means over stretches that end at these steps
    parameters   how many numbers were trained; adapter_bytes: how many bytes they take on the disk
    seconds      of training, of a step (the median), of measuring, and in all
    peak_memory  bytes that the process held at most while it trained
    environment  versions, processor, threads
    figures      what `Configuration.also` asked for: `validation` [[step, seconds of training, loss], ...]; `latency`
                 {"unmerged", "merged"} in seconds, or None where nothing merges; `forgetting`, the loss on that data
    """

    configuration: Configuration
    status: str
    reason: str | None = None
    metrics: dict[str, dict[str, float]] = field(default_factory=dict)
    baseline: dict[str, dict[str, float]] = field(default_factory=dict)
    curve: list[list[float]] = field(default_factory=list)
    parameters: int | None = None
    adapter_bytes: int | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    peak_memory: int | None = None
    environment: dict[str, Any] = field(default_factory=dict)
    figures: dict[str, Any] = field(default_factory=dict)

    @property
    def done(self) -> bool:
        return self.status == "done"

    def json(self) -> str:
        """One line; numbers that are not finite are texts, which `float` reads."""
        content = {"format": FORMAT, "id": self.configuration.id, **asdict(self)}
        content = {k: v for k, v in content.items() if v or k != "figures"}
        content = plain(content | {"configuration": self.configuration.plain()})
        return json.dumps(content | {"sha256": _checksum(content)})

    @classmethod
    def of(cls, text: str) -> "Record":
        """From what `json` gives."""
        content = json.loads(text)
        if content.pop("sha256") != _checksum(content):
            raise ValueError("its checksum is wrong")
        made = Configuration.of(content.pop("configuration"))
        if content.pop("format") != FORMAT or content.pop("id") != made.id:
            raise ValueError("its format or its id is another one")
        for kind in ("metrics", "baseline"):
            content[kind] = {split: {k: float(v) for k, v in of.items()} for split, of in content[kind].items()}
        return cls(configuration=made, **content)


class Store:
    """A folder with one file `ID.json` a record, each written whole."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder).expanduser()
        if self.folder.exists() and not self.folder.is_dir():
            raise GraftError(f"{self.folder} is a file: choose a folder for the records")

    def put(self, record: Record) -> None:
        """Keep a record, in the place of an earlier one of the same configuration."""
        self.folder.mkdir(parents=True, exist_ok=True)
        file = self._file(record.configuration)
        disk.replace(file, f"{record.json()}\n".encode())
        for left in self.folder.glob(f".{file.name}.*.new"):  # of a process that was killed while it wrote
            left.unlink(missing_ok=True)

    def get(self, configuration: Configuration) -> Record | None:
        """The record of a configuration, if there is one."""
        file = self._file(configuration)
        return _read(file, file.read_bytes()) if file.is_file() else None

    def records(self) -> list[Record]:
        """All of them, in the order of their ids."""
        return [_read(file, file.read_bytes()) for file in sorted(self.folder.glob("[!.]*.json"))]

    def _file(self, configuration: Configuration) -> Path:
        return self.folder / f"{configuration.id}.json"


def read(file: str | Path) -> list[Record]:
    """The records of a file with one a line."""
    lines = Path(file).expanduser().read_bytes().splitlines()
    return [_read(f"{file}, line {i}", line) for i, line in enumerate(lines, 1)]


def archive(file: str | Path, records: Iterable[Record]) -> None:
    """Put records into a file with one a line, in the place of those with the same configuration; curves get short."""
    place = Path(file).expanduser()
    known = {r.configuration.id: r for r in (read(place) if place.exists() else [])}
    known |= {r.configuration.id: replace(r, curve=thinned(r.curve)) for r in records}
    order = sorted(known.values(), key=_order)
    place.parent.mkdir(parents=True, exist_ok=True)
    disk.replace(place, "".join(f"{record.json()}\n" for record in order).encode())


def thinned(curve: list[list[float]], points: int = POINTS) -> list[list[float]]:
    """At most so many points: the last step of each of as many equal stretches, with the mean loss of the stretch."""
    if len(curve) <= points:
        return curve
    borders = [round(i * len(curve) / points) for i in range(points + 1)]
    parts = [curve[a:b] for a, b in pairwise(borders)]
    return [[part[-1][0], float(f"{sum(loss for _, loss in part) / len(part):.5g}")] for part in parts]


def _order(record: Record) -> tuple:
    c = record.configuration
    return c.task, c.base, c.method, c.id


def _checksum(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _read(place: Any, text: bytes) -> Record:
    try:
        return Record.of(text.decode())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise GraftError(f"{place} is no record of a run ({error}): remove it, and the run is made again") from None
