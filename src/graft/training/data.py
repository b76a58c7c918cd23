"""Reading data: files, folders, data sets of the hub, tasks, and what is in memory already.

Data is a sequence of examples (dicts): a list, or a `datasets.Dataset`. It may know more, as the rows of a task do: its
`labels`; the names of its own `metrics`, their `score` of predictions, and `generation`, options to make these with.
"""

import importlib
import json
import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..core.errors import GraftError
from .messages import nearest, said

Examples = Sequence[Mapping[str, Any]]

# `NAME:...` is read by the function `read(rest, split)` of that module, which is loaded when it is asked for.
SCHEMES = {"task": "graft.tasks"}
READERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}
IMAGES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}


def read(source: Any, *, split: str = "train", columns: Mapping[str, str] | None = None) -> Examples:
    """The examples of `source`.

    source   a JSONL, JSON, CSV, TSV or Parquet file; a folder of such files (those named after `split` if any),
             of images in one folder a label, or written by `Dataset.save_to_disk`; "owner/name" or "owner/name:config"
             on the hub (downloaded); `task:NAME` or `task:NAME,KNOB=VALUE,...`, see `graft.tasks`; a list of dicts; a
             `datasets.Dataset` or `DatasetDict`
    split    which part of a data set that has several
    columns  {name that is needed: name in the data}, e.g. {"text": "sentence", "label": "class"}
    """
    examples = _read_path(str(source), split) if isinstance(source, str | Path) else source
    if hasattr(examples, "column_names") and isinstance(examples, Mapping):  # a DatasetDict
        if split not in examples:
            raise GraftError(f"the data has no split {split!r}; it has {', '.join(examples)}")
        examples = examples[split]
    if isinstance(examples, Mapping) or not (hasattr(examples, "__getitem__") and hasattr(examples, "__len__")):
        raise GraftError(
            f"data is a file, a folder, a hub name, a task, a list of dicts or a Dataset, not a {type(source).__name__}"
        )
    if not len(examples):
        raise GraftError(f"the data {_called(source)}is empty")
    if (
        isinstance(examples, list)
        and (odd := next((i for i, e in enumerate(examples) if not isinstance(e, Mapping)), -1)) >= 0
    ):
        raise GraftError(
            f"example {odd} of the data is a {type(examples[odd]).__name__}, not a dict with named columns"
        )
    return _rename(examples, columns) if columns else examples


def columns_of(examples: Examples) -> list[str]:
    """The names of the columns."""
    return list(getattr(examples, "column_names", None) or examples[0])


def column(examples: Examples, name: str) -> list[Any]:
    """One column, complete; a missing value is refused with its row."""
    if name not in columns_of(examples):
        raise GraftError(
            f"the data has no column {name!r}; it has {', '.join(map(repr, columns_of(examples)))}: "
            f"rename one with columns={{{name!r}: ...}}"
        )
    values = list(examples[name]) if hasattr(examples, "column_names") else [e.get(name) for e in examples]  # type: ignore
    if (row := next((i for i, v in enumerate(values) if v is None), -1)) >= 0:
        raise GraftError(f"row {row} of the data has no {name!r}")
    return values


def held_out(examples: Examples, fraction: float, seed: int) -> tuple[Examples, Examples]:
    """Train and validation part, drawn at random; the same for the same seed."""
    count = round(len(examples) * fraction)
    if not 0 < count < len(examples):
        raise GraftError(f"validation={fraction} of {len(examples)} examples leaves one of the two parts empty")
    return divided(examples, count, seed)


def divided(examples: Examples, count: int, seed: int) -> tuple[Examples, Examples]:
    """The rest, and `count` examples drawn at random, both in their order."""
    order = np.random.default_rng(seed).permutation(len(examples))
    return take(examples, sorted(order[count:].tolist())), take(examples, sorted(order[:count].tolist()))


def take(examples: Examples, rows: list[int]) -> Examples:
    """Some of the rows."""
    return examples.select(rows) if hasattr(examples, "select") else [examples[i] for i in rows]  # type: ignore


def _called(source: Any) -> str:
    return f"{str(source)!r} " if isinstance(source, str | Path) else ""


def _rename(examples: Examples, columns: Mapping[str, str]) -> Examples:
    present = columns_of(examples)
    if missing := [old for old in columns.values() if old not in present]:
        raise GraftError(f"the data has no column {missing[0]!r}: {nearest(missing[0], present)}")
    if hasattr(examples, "rename_columns"):
        taken = [new for new in columns if new in present and new not in columns.values()]
        return examples.remove_columns(taken).rename_columns({o: n for n, o in columns.items()})  # type: ignore
    kept = [k for k in present if k not in columns and k not in columns.values()]
    return [{k: e.get(k) for k in kept} | {new: e.get(old) for new, old in columns.items()} for e in examples]


def _read_path(source: str, split: str) -> Any:
    scheme, colon, rest = source.partition(":")
    if colon and scheme in SCHEMES:
        return importlib.import_module(SCHEMES[scheme]).read(rest, split)
    path = Path(source).expanduser()
    if path.is_dir():
        return _read_folder(path, split)
    if path.is_file():
        if path.suffix.lower() not in READERS:
            raise GraftError(f"{source} is not of a kind that can be read: {', '.join(READERS)}")
        return _read_files([path])
    if path.suffix.lower() not in READERS and re.fullmatch(r"[\w.-]+/[\w.-]+(:[\w.-]+)?", source):
        return _read_hub(source, split)
    beside = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    hint = f": {nearest(path.name, beside)}" if beside else ""
    raise GraftError(f"no such file: {source}{hint}")


def _read_folder(folder: Path, split: str) -> Any:
    import datasets

    if (folder / "dataset_dict.json").exists() or (folder / "dataset_info.json").exists():
        return datasets.load_from_disk(str(folder))
    files = sorted(p for p in folder.iterdir() if p.suffix.lower() in READERS)
    if named := [p for p in files if re.match(rf"{re.escape(split)}(?![a-z])", p.name.lower())]:
        return _read_files(named)
    if files:
        return _read_files(files)
    root = folder / split if (folder / split).is_dir() else folder
    images = sorted(p for p in root.glob("*/*") if p.suffix.lower() in IMAGES)
    if images:
        return [{"image": str(p), "label": p.parent.name} for p in images]
    raise GraftError(f"the folder {folder} holds neither {', '.join(READERS)} files nor images in one folder a label")


def _read_files(files: list[Path]) -> Any:
    import datasets

    if len({READERS[p.suffix.lower()] for p in files}) > 1:
        raise GraftError(
            f"{files[0].parent} holds files of several kinds, such as {files[0].name} and {files[-1].name}: name one"
        )
    kind = READERS[files[0].suffix.lower()]
    reader = getattr(datasets.Dataset, f"from_{kind}")
    options = {"sep": "\t"} if files[0].suffix.lower() == ".tsv" else {}
    if not any(p.stat().st_size for p in files):
        raise GraftError(f"{files[0]} is empty")
    hidden, level = datasets.are_progress_bars_disabled(), datasets.logging.get_verbosity()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what is wrong is said once, by us
    try:
        with tempfile.TemporaryDirectory() as cache:  # read into memory, so that a changed file is never seen as before
            return reader([str(p) for p in files], cache_dir=cache, keep_in_memory=True, **options)
    except Exception as error:
        raise GraftError(f"cannot read {files[0]}: {_reason(files, error)}") from error
    finally:
        datasets.logging.set_verbosity(level)
        if not hidden:
            datasets.enable_progress_bars()


def _reason(files: list[Path], error: Exception) -> str:
    """Where JSON lines break off, or what the reader said."""
    for path in files:
        if path.suffix.lower() == ".jsonl":
            for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1):
                try:
                    json.loads(line or "null")
                except json.JSONDecodeError as broken:
                    return f"line {number} of {path.name} is not JSON ({broken.msg})"
    return said(error.__cause__ or error)


def _read_hub(source: str, split: str) -> Any:
    import datasets

    name, _, config = source.partition(":")
    try:
        return datasets.load_dataset(name, config or None, split=split)
    except Exception as error:
        raise GraftError(
            f"{source!r} is neither a local file or folder nor a data set that the hub gives: {said(error)}"
        ) from error
