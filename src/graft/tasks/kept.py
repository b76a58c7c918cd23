"""What takes seconds to make of the same input every time: kept in a cache folder from process to process."""

import contextlib
import hashlib
import inspect
import json
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from ..core.disk import replace


def folder() -> Path:
    """$GRAFT_CACHE, or `graft` in $XDG_CACHE_HOME, by default in ~/.cache."""
    own, shared = os.environ.get("GRAFT_CACHE"), os.environ.get("XDG_CACHE_HOME")
    return Path(own).expanduser() if own else Path(shared or "~/.cache").expanduser() / "graft"


def kept(make: Callable[[Iterable[tuple[str, bytes]]], Any], given: Iterable[tuple[str, bytes]]) -> Any:
    """What `make` gives for named contents, as JSON holds it: lists, dicts, texts, numbers.

    It is made anew where anything differs that it depends on: the contents, the interpreter, or the source code of the
    module of `make`. A file whose checksum is wrong counts as none, and a folder that cannot be written does no harm.
    """
    given, code = list(given), inspect.getsource(sys.modules[make.__module__])
    digest = hashlib.sha256(json.dumps([sys.version, code, [name for name, _ in given]]).encode())
    for _, content in given:
        digest.update(hashlib.sha256(content).digest())
    file = folder() / "tasks" / f"{make.__name__.strip('_')}-{digest.hexdigest()[:32]}.json"
    with contextlib.suppress(OSError, ValueError):
        checksum, content = file.read_bytes().split(b"\n", 1)
        if checksum.decode() == hashlib.sha256(content).hexdigest():
            return json.loads(content)
    content = json.dumps(make(given)).encode()
    with contextlib.suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        replace(file, hashlib.sha256(content).hexdigest().encode() + b"\n" + content)
    return json.loads(content)
