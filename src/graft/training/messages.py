"""Parts of error messages."""

import difflib
from collections.abc import Iterable


def nearest(name: str, known: Iterable[str], most: int = 12) -> str:
    """Half a sentence with the names most like `name`, or with all of them where they are few."""
    known = sorted(known)
    like = {n.lower(): n for n in known}
    close = [like[n] for n in difflib.get_close_matches(str(name).lower(), like, n=3, cutoff=0.6)]
    if close:
        return f"did you mean {' or '.join(close)}?"
    return f"known are {', '.join(known[:most])}{', ...' if len(known) > most else ''}"


def said(error: BaseException) -> str:
    """The first line of another library's error."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
