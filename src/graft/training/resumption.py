"""The state of a run: what a checkpoint holds, and whether an earlier run may be gone on with."""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ..core.adapter import Adapter
from ..core.errors import GraftError
from ..core.registry import adapters
from . import checkpoints

# Settings that change nothing about the parameters; and data, which is compared by its content.
_INDIFFERENT = {"output", "resume", "progress", "save_every", "data", "validation", "processor", "objective"}


def trained_adapters(model: nn.Module) -> dict[str, Adapter]:
    """The adapters that run and have something to train."""
    return {n: a for n, a in adapters(model).items() if a.active and any(p.requires_grad for p in a.parameters())}


def idle(model: nn.Module) -> set[nn.Parameter]:
    """The parameters of switched-off adapters that are not frozen: a run leaves them out."""
    off = [a for a in adapters(model).values() if not a.active]
    return {p for a in off for p in a.parameters() if p.requires_grad}


def tensors(model: nn.Module) -> dict[str, Any]:
    """A copy of all that training changes: trained adapters with their buffers, and what else requires gradients."""
    states = {name: dict(a.state_dict()) for name, a in trained_adapters(model).items()}
    held = {t.data_ptr() for s in states.values() for t in s.values()}
    rest = {n: p for n, p in model.named_parameters() if p.requires_grad and p.data_ptr() not in held}
    return {
        "adapters": {n: {k: t.detach().clone() for k, t in s.items()} for n, s in states.items()},
        "parameters": {n: p.detach().clone() for n, p in rest.items()},
    }


@torch.no_grad()
def set_tensors(model: nn.Module, saved: dict[str, Any]) -> None:
    """Put back what `tensors` copied, in place."""
    for name, state in saved["adapters"].items():
        adapters(model)[name].load_state_dict(state)
    own = dict(model.named_parameters())
    for name, value in saved["parameters"].items():
        own[name].copy_(value)


def identity(
    settings: Mapping[str, Any], changes: Sequence[tuple[int, float]], options: Mapping[str, Any], task: str,
    data: Sequence[Iterable[dict] | None], model: nn.Module, processes: int,
) -> dict[str, Any]:  # fmt: skip
    """What two runs must have in common to come to the same bits."""
    chain = [f"{n}: {a.recipe}" for n, a in adapters(model).items() if a.active]
    shapes = [(n, tuple(p.shape), str(p.dtype)) for n, p in model.named_parameters() if p.requires_grad]
    return {
        **{k: v for k, v in settings.items() if k not in _INDIFFERENT},
        "rate_changes": [list(change) for change in changes],
        "objective": task,
        "optimizer_options": json.dumps(dict(options), sort_keys=True, default=repr),
        "data": _digest(data[0]),
        "validation": _digest(data[1]),
        "chain of adapters": chain,
        "trainable parameters": hashlib.sha256(repr(shapes).encode()).hexdigest(),
        "processes": processes,
    }


def earlier(run: Path, resume: bool | str, identity: dict[str, Any], main: bool) -> dict[str, Any] | None:
    """The newest state of the run in the folder, if there is one and it may be gone on with."""
    if resume is False:
        if main:
            checkpoints.clear(run)
        return None
    found = checkpoints.newest(run)
    if found is None:
        if resume is True:
            raise GraftError(f"{run} holds no checkpoint to go on from: leave resume out to begin anew")
        return None
    before, identity = (_until(found[0], of) for of in (found[1]["identity"], identity))
    if changed := [k for k in identity if before.get(k) != identity[k]]:
        shown = f"{changed[0]} was {before.get(changed[0])!r} and is {identity[changed[0]]!r}"
        shown = (
            f"the {changed[0]} changed"
            if isinstance(identity[changed[0]], str) and len(identity[changed[0]]) == 64
            else shown
        )
        raise GraftError(
            f"the run in {run} was another one ({shown}): choose another output, or resume=False to begin anew"
        )
    return found[1]


def _until(step: int, identity: dict[str, Any]) -> dict[str, Any]:
    """An identity with the changes of the learning rate before so many steps: later ones may be others."""
    return {**identity, "rate_changes": [c for c in identity.get("rate_changes", ()) if c[0] < step]}


def history(run: Path, records: int) -> list[dict[str, Any]]:
    """The first `records` lines of history.jsonl; those after the checkpoint are written again."""
    path = run / "history.jsonl"
    lines = path.read_text().splitlines()[:records] if path.exists() else []
    return [json.loads(line) for line in lines]


def _digest(features: Iterable[dict] | None) -> str:
    digest = hashlib.sha256()
    for feature in features or ():
        for name, value in feature.items():
            if not isinstance(value, np.ndarray | str | int | float | list | tuple):
                continue  # an image: its label has to do
            digest.update(name.encode())
            digest.update(value.tobytes() if isinstance(value, np.ndarray) else repr(value).encode())
    return digest.hexdigest()
