"""Folders of adapters on the disk: which files they have, found and read without trust, written whole or not at all."""

import json
import mmap
import os
import secrets
import shutil
import zlib
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from .card import CARD
from .delta import is_finite
from .errors import GraftError
from .names import HUB_ID

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
CHAIN = "adapters.json"  # of a folder of several adapters, each in a folder of its own inside
MOST_CONFIG = 2**26  # bytes
PICKLES = (".bin", ".pt", ".pth", ".ckpt")


# Reading


def locate(
    folder: str | os.PathLike, revision: str | None, parts: Callable[[Path], list[str]], files: Collection[str]
) -> Path:
    """The folder of adapters, or a single file; an id of the hub is fetched, if nothing local is called so.

    `parts` tells from a folder with the file CHAIN which folders inside belong to it, `files` what each may hold.
    """
    place = Path(folder)
    if place.is_dir() or (place.is_file() and place.suffix == ".safetensors"):
        return place
    if place.exists():
        hint = ": it is a pickle, which is never read; convert it to safetensors" if place.suffix in PICKLES else ""
        raise GraftError(f"{place} is neither a folder with {CONFIG} nor a .safetensors file{hint}")
    if not HUB_ID.fullmatch(str(folder)):
        raise GraftError(f"there is no folder {str(place)!r}")
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise GraftError(f"there is no folder {str(place)!r}; to look on the hub, install huggingface-hub") from None

    def fetch(*files: str) -> Path:
        return Path(snapshot_download(str(folder), revision=revision, allow_patterns=list(files)))

    try:
        place = fetch(CHAIN, *files)
        if (place / CHAIN).exists():
            place = fetch(CHAIN, *(f"{part}/{file}" for part in parts(place) for file in files))
        return place
    except GraftError:
        raise
    except Exception as error:  # of several libraries: no network, no such repository, no access, no such revision
        raise GraftError(
            f"there is no folder {str(folder)!r}, and the Hugging Face hub did not give an adapter of that name: "
            f"{(str(error) or type(error).__name__).strip().splitlines()[0]}"
        ) from error


def own_file(place: Path, name: str) -> Path:
    """A file of the folder itself: no link leads out of it, save the hub cache's to its own store."""
    file, root = place / name, place.resolve()
    if not file.exists():
        pickled = sorted(other.name for other in file.parent.glob("*") if other.suffix in PICKLES)
        hint = f"; {pickled[0]} is a pickle, which is never read: convert it to safetensors" if pickled else ""
        raise GraftError(f"{place} holds no {name}{hint}")
    real = file.resolve()
    in_cache = root.parent.name == "snapshots" and real.is_relative_to(root.parent.parent / "blobs")
    if not real.is_file() or not (real.is_relative_to(root) or in_cache):
        raise GraftError(f"{file} is no file of that folder: it leads to {real}")
    return real


def read_json(file: Path, crc32: Any = None) -> dict[str, Any]:
    """The object in a JSON file, as it stands."""

    def refuse(word: str):
        raise ValueError(f"{word} is no number")

    if file.stat().st_size > MOST_CONFIG:
        raise GraftError(f"{file} has {file.stat().st_size:,} bytes: no configuration is so large")
    try:
        content = file.read_bytes()
        _check_sum(file, content, crc32)
        config = json.loads(content.decode(), parse_constant=refuse)
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, GraftError):
            raise
        raise GraftError(f"{file} is no valid JSON: {error}") from None
    if not isinstance(config, dict):
        raise GraftError(f"{file} must hold an object, not a {type(config).__name__}")
    return config


def read_tensors(file: Path, *crc32: Any) -> dict[str, Tensor]:
    """The tensors in a safetensors file, mapped into memory rather than read; none holds NaN or infinity."""
    try:
        with open(file, "rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
            for known in crc32:
                _check_sum(file, content, known)
        tensors = safetensors.torch.load_file(file)
        finite = is_finite(tensors.values())
    except GraftError:
        raise
    except Exception as error:  # the library's own and what torch says to types and sizes it does not know
        raise GraftError(f"{file} is no sound safetensors file: {error}") from error
    if not finite:
        broken = next(key for key, value in tensors.items() if not is_finite([value]))
        raise GraftError(f"{file}: {broken} holds NaN or infinity")
    return tensors


def _check_sum(file: Path, content: mmap.mmap | bytes, crc32: Any) -> None:
    if crc32 is not None and zlib.crc32(content) != crc32:
        raise GraftError(f"{file} was damaged or changed after it was saved: its checksum does not fit")


# Writing


def tensor_bytes(state: dict[str, Tensor]) -> bytes:
    plain = {key: value.detach().to("cpu", copy=True).contiguous() for key, value in state.items()}
    return safetensors.torch.save(plain, {"format": "pt"})


def json_bytes(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


def write(folder: Path, files: dict[str, bytes], overwrite: bool, known: Collection[str]) -> None:
    """Write the files {path inside: content} as one folder: beside its place, flushed to the disk, then renamed.

    `known` are the files that a folder which is replaced may hold.
    """
    folder = folder.resolve()
    inside = False
    if folder.exists():
        if not folder.is_dir():
            raise GraftError(f"{folder} is a file: choose another place for the adapter")
        if strange := _foreign(folder, known):
            raise GraftError(f"{folder} holds {strange}, which is no part of an adapter: choose another folder")
        inside = bool(os.listdir(folder))
        if inside and not overwrite:
            raise GraftError(f"{folder} holds an adapter already: pass overwrite=True to replace it")
    mark = secrets.token_hex(4)
    new, old = (folder.with_name(f".{folder.name}.{mark}.{end}") for end in ("new", "old"))
    try:
        new.mkdir(parents=True)
        for name, content in files.items():
            (new / name).parent.mkdir(exist_ok=True)
            _put(new / name, content)
        for place in {new, *((new / name).parent for name in files)}:
            _flush(place)
        if inside:
            os.rename(folder, old)
        try:
            os.rename(new, folder)
        except BaseException:
            if inside:
                os.rename(old, folder)
            raise
        _flush(folder.parent)
    except OSError as error:
        raise GraftError(f"{folder} cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(new, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)


def write_file(file: Path, content: bytes, overwrite: bool) -> None:
    """Write one file: beside its place, flushed to the disk, then renamed."""
    file = file.resolve()
    if file.suffix != ".safetensors":
        raise GraftError(f"this format is a single file: {file.name!r} must end in .safetensors")
    if file.is_dir():
        raise GraftError(f"{file} is a folder: choose another place for the adapter")
    if file.exists() and not overwrite:
        raise GraftError(f"{file} is there already: pass overwrite=True to replace it")
    new = file.with_name(f".{file.name}.{secrets.token_hex(4)}.new")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        _put(new, content)
        os.replace(new, file)
        _flush(file.parent)
    except OSError as error:
        raise GraftError(f"{file} cannot be written: {error.strerror or error}") from error
    finally:
        new.unlink(missing_ok=True)


def _put(file: Path, content: bytes) -> None:
    with open(file, "wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())


def _foreign(folder: Path, files: Collection[str]) -> str | None:
    """Something in the folder that is no part of one or several adapters, or None."""
    inside = sorted(os.listdir(folder))
    several = CHAIN in inside
    known = {CHAIN, CARD} if several else {CARD, *files} if CONFIG in inside else ()
    for name in inside:
        place = folder / name
        if name in known and place.is_file():
            continue
        if several and place.is_dir() and not place.is_symlink() and CHAIN not in os.listdir(place):
            if (strange := _foreign(place, files)) is None:
                continue
            name = f"{name}/{strange}"
        return name
    return None


def _flush(folder: Path) -> None:
    """Make the names in a folder durable, where the system has that."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
