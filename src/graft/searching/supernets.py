"""A one-shot search as the first half of a search: what a supernet finds, and the space around it."""

import re
from collections.abc import Mapping
from typing import Any

from .. import tasks
from ..catalogue import plain
from ..core.recipe import ByPath
from ..runs.configuration import Configuration
from ..runs.single import load, train_rows
from ..training.data import read
from . import oneshot
from .space import Alternative, Choice, Domain, Member, Space, domain_of

ROWS = 20  # of the paths that were looked at, kept beside what was found


def train(
    name: str, common: Configuration, rate: float | str, *, cap: float | None, seed: int, progress: bool
) -> dict[str, Any]:
    """What the one-shot search `name` finds on the train split, as plain data.

    common  a configuration, whose base, data, steps and batches are those of the supernet
    rate    learning rates as `graft.search` takes them; the middle one trains the supernet
    cap     trained parameters at most, new heads included
    """
    columns, training = (
        common.training.get("columns"),
        {"learning_rate": domain_of(rate, f"learning_rate={rate}").at(0.5)},
    )
    training |= {"progress": progress} | {
        k: common.training[k] for k in ("batch_size", "max_length") if common.training.get(k)
    }
    task = tasks.task(common.task, **common.knobs)
    examples = read(train_rows(task, common.train_rows), columns=columns)
    base = load(common)
    heads = sum(p.numel() for path in base.heads for p in base.model.get_submodule(path).parameters())
    most = None if cap is None else int(cap) - heads
    budget = oneshot.Budget(steps=common.training["steps"], cap=most, seed=seed, training=training)
    found = oneshot.find(name)().find(base, examples, budget)
    return plain({**_found(found), "others": [_found(other) for other in found.others], "paths": found.table[:ROWS]})


def _found(found: oneshot.Found) -> dict[str, Any]:
    members = [
        {"name": r.method.name, "options": {k: _by_path(v) for k, v in r.hyper.items()}, "targets": where}
        for r, where in zip(found.recipes, found.targets)
    ]
    return {"members": members, "parameters": found.parameters}


def space(found: Mapping[str, Any], training: Mapping[str, Any]) -> Space:
    """The chains that were found, with the domains of training."""
    alternatives = []
    for one in (found, *found["others"]):
        members = tuple(
            Member(m["name"], {k: Choice((v,)) for k, v in m["options"].items()}, Choice((m["targets"],)))
            for m in one["members"]
        )
        alternatives.append(Alternative("+".join(m.name for m in members), members))
    domains: dict[str, Domain] = {name: domain_of(text, f"{name}={text}") for name, text in training.items()}
    return Space(alternatives, domains)


def _by_path(value: Any) -> Any:
    return {re.escape(path): v for path, v in value.items()} if isinstance(value, ByPath) else value
