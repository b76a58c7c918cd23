"""Files that are complete or as they were, at whatever moment a process dies."""

import os
import secrets
from pathlib import Path


def put(file: Path, content: bytes) -> None:
    """Write a file and flush it to the disk."""
    with open(file, "wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())


def flush(folder: Path) -> None:
    """Make the names in a folder durable, where the system has that."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def replace(file: Path, content: bytes) -> None:
    """Write a file beside its place, under a name with a dot before it, flush it to the disk and rename it."""
    new = file.with_name(f".{file.name}.{secrets.token_hex(4)}.new")
    try:
        put(new, content)
        os.replace(new, file)
        flush(file.parent)
    finally:
        new.unlink(missing_ok=True)
