"""Checkpoints that survive a kill at any moment: tensors in safetensors, the rest in JSON, nothing pickled.

A checkpoint is a folder `checkpoint-00000120` with `tensors.safetensors` and `state.json`. It is written under another
name, flushed to the disk and renamed, so under its own name it is complete; a checksum catches what a disk loses later.
"""

import hashlib
import json
import os
import random
import shutil
import uuid
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..core.errors import GraftError

KEPT = 2
_ASIDE = ".aside-"  # what is being written or removed; of no value to a later run


def save(folder: Path, step: int, state: Any) -> Path:
    """Write `state` (nested dicts, lists, tuples, tensors, numbers, strings, None) as the checkpoint of `step`."""
    from safetensors.torch import save_file

    tensors: dict[str, torch.Tensor] = {}
    tree = flatten(state, tensors)
    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.glob(f"{_ASIDE}*"):
        shutil.rmtree(left, ignore_errors=True)
    aside = folder / f"{_ASIDE}{uuid.uuid4().hex}"
    aside.mkdir()
    save_file(tensors, aside / "tensors.safetensors")
    record = {"format": 1, "step": step, "sha256": _digest(aside / "tensors.safetensors", tree), "state": tree}
    (aside / "state.json").write_text(json.dumps(record))
    for path in (aside / "tensors.safetensors", aside / "state.json", aside):
        _flush(path)
    target = folder / f"checkpoint-{step:08d}"
    _remove(target)
    os.rename(aside, target)
    _flush(folder)
    for old in sorted(folder.glob("checkpoint-*"))[:-KEPT]:
        _remove(old)
    return target


def newest(folder: Path) -> tuple[int, Any] | None:
    """Step and state of the newest checkpoint that is whole, or None."""
    from safetensors.torch import load_file

    for path in sorted(folder.glob("checkpoint-*"), reverse=True):
        try:
            record = json.loads((path / "state.json").read_text())
            if record["format"] == 1 and record["sha256"] == _digest(path / "tensors.safetensors", record["state"]):
                return record["step"], _restore(record["state"], load_file(path / "tensors.safetensors"))
        except (OSError, ValueError, KeyError, TypeError):
            pass  # torn: the one before counts
    return None


def clear(folder: Path) -> None:
    """Remove all checkpoints."""
    for path in [*folder.glob("checkpoint-*"), *folder.glob(f"{_ASIDE}*")]:
        _remove(path)


def random_state(device: torch.device) -> dict[str, Any]:
    """The generators that training draws from: Python's, numpy's, torch's on the CPU and on `device`."""
    state = {"python": random.getstate(), "numpy": np.random.get_state(), "cpu": torch.get_rng_state()}
    if device.type != "cpu":
        state["device"] = torch.get_device_module(device).get_rng_state()
    return state


def set_random_state(state: dict[str, Any], device: torch.device) -> None:
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["cpu"])
    if device.type != "cpu":
        torch.get_device_module(device).set_rng_state(state["device"])


def flatten(tree: Any, tensors: dict[str, torch.Tensor]) -> Any:
    """`tree` as JSON; tensors and arrays go into `tensors`."""
    if torch.is_tensor(tree) or isinstance(tree, np.ndarray):
        name = str(len(tensors))
        if torch.is_tensor(tree) and tree.dim() > 1 and not tree.is_contiguous():
            order = sorted(range(tree.dim()), key=tree.stride, reverse=True)  # products depend on it in the last bit
            tensors[name] = tree.detach().to("cpu", copy=True).permute(order).contiguous()
            return {"permuted": [name, order]}
        tensors[name] = torch.as_tensor(tree).detach().to("cpu", copy=True).contiguous()
        return {"tensor": name} if torch.is_tensor(tree) else {"array": name}
    if isinstance(tree, dict):
        return {"dict": [[flatten(k, tensors), flatten(v, tensors)] for k, v in tree.items()]}
    if isinstance(tree, list | tuple):
        return {"tuple" if isinstance(tree, tuple) else "list": [flatten(v, tensors) for v in tree]}
    if isinstance(tree, np.generic):
        return tree.item()
    if isinstance(tree, torch.dtype):
        return {"dtype": str(tree).removeprefix("torch.")}
    if tree is None or isinstance(tree, str | bool | int | float):
        return tree
    raise GraftError(f"a {type(tree).__name__} has no place in a checkpoint")


def _restore(tree: Any, tensors: dict[str, torch.Tensor]) -> Any:
    if not isinstance(tree, dict):
        return tree
    ((kind, value),) = tree.items()
    if kind == "tensor":
        return tensors[value]
    if kind == "permuted":
        name, order = value
        return tensors[name].permute(sorted(range(len(order)), key=order.__getitem__))
    if kind == "array":
        return tensors[value].numpy()
    if kind == "dtype":
        return getattr(torch, value)
    if kind == "dict":
        return {_restore(k, tensors): _restore(v, tensors) for k, v in value}
    return (tuple if kind == "tuple" else list)(_restore(v, tensors) for v in value)


def _digest(path: Path, tree: Any) -> str:
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256")
    digest.update(json.dumps(tree).encode())
    return digest.hexdigest()


def _flush(path: Path) -> None:
    """Onto the disk: a file's content, or a folder's names (not offered on Windows)."""
    if path.is_dir() and os.name == "nt":
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _remove(path: Path) -> None:
    """Take a folder away at once, then delete it at leisure."""
    if path.exists():
        aside = path.parent / f"{_ASIDE}{uuid.uuid4().hex}"
        os.rename(path, aside)
        shutil.rmtree(aside, ignore_errors=True)
