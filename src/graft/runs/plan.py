"""What many runs in a folder are made for: settings that are kept, so that the same work goes on and no other does."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..core import disk
from ..core.errors import GraftError

FORMAT = 2


def known(place: Path, settings: Mapping[str, Any], *, resume: bool) -> dict[str, Any] | None:
    """The plan at `place`, a file NAME.json, if there is one and it has these settings."""
    folder, what = place.parent, place.stem
    if not place.exists():
        folder.mkdir(parents=True, exist_ok=True)
        return None
    try:
        found = json.loads(place.read_bytes())
        held, asked = found["format"], found["settings"]
        other = None if held != FORMAT else next((k for k, v in settings.items() if asked[k] != v), None)
    except (ValueError, KeyError, TypeError):
        raise GraftError(f"{place} is no plan of a {what}: choose another output") from None
    if held != FORMAT:
        raise GraftError(f"{place} has format {held}, and this version of Graft goes on with {FORMAT} alone: choose "
                         "another output")  # fmt: skip
    if other:
        raise GraftError(
            f"{folder} holds a {what} with {other}={asked[other]}, not {settings[other]}: choose another output"
        )
    if not resume:
        raise GraftError(f"{folder} holds this {what} already: resume it, or choose another output")
    return found


def write(place: Path, plan: Mapping[str, Any]) -> None:
    """A plan, as `known` gives it."""
    disk.replace(place, f"{json.dumps({'format': FORMAT, **plan}, indent=1)}\n".encode())
