"""What to train with so much compute: which base, which method, how many steps.

graft.allocate(["graft:seedling", "graft:seedling-small"], "task:rewrites", compute=1e14)
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from torch import nn

from .comparison import task_of
from .core.errors import GraftError
from .core.hyper import Range
from .models import load_base
from .ranking import terms
from .runs import limits, pool
from .runs.configuration import Configuration
from .runs.contestants import title
from .runs.reference import chosen, tuning
from .runs.single import DTYPE
from .scaling import Frontier, frontier

SHARES = (4, 8, 16)  # the compute of the runs that are made: so many times less than what is asked about
LEAST = 8  # steps of a run


@dataclass(frozen=True)
class Allocated:
    """One method.

    method         with its options
    foretold       its loss with all of the compute, in nats a row of the data
    base           whose size is nearest to the best one foretold
    steps          that the compute gives with it; epochs: passes over the rows of train
    learning_rate  that was best for it
    measured       {compute: (base, loss)} of the best run at each
    frontier       the lines through these, see `graft.scaling.frontier`
    failure        why nothing is foretold, or None
    """

    method: str
    foretold: float | None = None
    base: str | None = None
    steps: int | None = None
    epochs: float | None = None
    learning_rate: float | None = None
    measured: Mapping[float, tuple[str, float]] | None = None
    frontier: Frontier | None = None
    failure: str | None = None


def allocate(
    models: Sequence[str],
    data: Any,
    *,
    compute: Annotated[float, "floating point operations of the whole training", Range(above=0)],
    methods: Annotated[Sequence[str], "methods with options if any: lora(rank=16), and full-fine-tuning"] = (
        "full-fine-tuning",
        "lora",
    ),
    learning_rates: Annotated[
        Sequence[float] | None, "to try with the most compute; by default those of the method"
    ] = None,
    batch_size: Annotated[int | None, "examples of a step; by default that of the task", Range(1)] = None,
    max_length: Annotated[int | None, "tokens of an example; by default that of the task", Range(1)] = None,
    seed: Annotated[int, "of what is new in the models and of the order of the data"] = 0,
    validation: Annotated[Any, "own data: other data to measure on, or the share to hold out"] = 0.1,
    columns: Annotated[Mapping | None, "own data: {name that is needed: name in the data}"] = None,
    output: Annotated[str | Path, "folder of the records; runs that it has are not made again"] = "runs/allocate",
    jobs: Annotated[int, "runs at a time, each in a process of its own", Range(1)] = 1,
    threads: Annotated[int, "of each run", Range(1)] = 1,
    progress: bool = True,
) -> list[Allocated]:
    """Foretell for each method its loss with so much compute, on which base and after how many steps; best one first.

    Every method trains every base with 1/4, 1/8 and 1/16 of the compute, with as many steps as that gives. Of each
    method the best base at each counts, and lines in log-log space through these give the loss and the size of the
    base at all of the compute (sizes without embeddings). Learning rates are tried with the most compute, and judged
    on the validation split.

    What a step costs is counted, as `graft.predict_cost` does, for the largest batch of a run, where the paper reckons
    a token of N parameters of which T are trained as 6 N for full fine-tuning, 4 N + 2 T for LoRA and biases, and
    2 N + 4 T for the last blocks.

    Repurposing Language Models into Embedding Models: Finding the Compute-Optimal Recipe. Ziarko et al., 2024.
    https://arxiv.org/abs/2406.04165 (the best of a grid at each compute and a line for each method: its Figure 1 and
    abstract; operations: its authors' code. Its own fitted constants are of contrastive training and not used; that
    the best size lies on a line too is of Training Compute-Optimal Large Language Models. Hoffmann et al., 2022)

    Raises `GraftError` for no or unknown models or methods, and for a compute too small for the runs.
    """
    if not models or isinstance(models, str):
        raise GraftError(f"models={models!r}: name at least one base in a list")
    if not methods or isinstance(methods, str):
        raise GraftError(f"methods={methods!r}: name at least one method in a list")
    folder = Path(output).expanduser()
    made = task_of(data, folder, {"validation": validation, "test": 0.1, "columns": columns})
    plans, sizes = [], {}
    for base in dict.fromkeys(models):
        sizes[base] = _size(load_base(base, dtype=DTYPE, device="meta").model)
        plans += tuning(
            made, method=methods, base=base, seed=seed, learning_rates=learning_rates, batch_size=batch_size,
            max_length=max_length,
        )  # fmt: skip
    failures, flops = {}, {}
    for first in (plan[0] for plan in plans):
        try:
            flops[_key(first)] = limits.cost(first).flops
        except GraftError as error:
            failures[_name(first)] = str(error)
    _enough(compute, flops)

    def at(share: int, wanted: Sequence[Configuration]) -> list[Configuration]:
        steps = {key: int(compute / share / each) for key, each in flops.items()}
        own = [(c, steps[_key(c)]) for c in wanted if _key(c) in steps]
        return [replace(c, training={**c.training, "steps": n}) for c, n in own if n >= LEAST]

    with pool.forks(threads) as forks:
        options: dict[str, Any] = {"jobs": jobs, "threads": threads, "progress": progress, "within": forks}
        most = [own for plan in plans if (own := at(SHARES[0], plan))]
        tried = pool.run([c for plan in most for c in plan], folder / "runs", **options)
        best = chosen(most, tried)
        wanted = {compute / share: at(share, best) for share in SHARES}
        records = pool.run([c for of in wanted.values() for c in of], folder / "runs", **options)
    failures |= {_name(r.configuration): str(r.reason) for r in (*tried, *records) if not r.done}
    unit = {c.base: terms(c, made) for c in best}
    losses = {
        r.configuration.id: r.metrics["validation"]["loss"] * unit[r.configuration.base] for r in records if r.done
    }
    found = []
    for name in dict.fromkeys(_name(plan[0]) for plan in plans):
        runs = [(at, c, losses[c.id]) for at, of in wanted.items() for c in of if _name(c) == name and c.id in losses]
        if len({at for at, _, _ in runs}) < 2:
            why = failures.get(name, f"compute={compute:g} gives too few steps for a line")
            found.append(Allocated(name, failure=why))
            continue
        line = frontier([at for at, _, _ in runs], [sizes[c.base] for _, c, _ in runs], [loss for *_, loss in runs])
        wished = math.log(line.size(compute))
        _, c, _ = min(runs, key=lambda r: (abs(math.log(sizes[r[1].base]) - wished), -r[0], r[2]))
        steps = int(compute / flops[_key(c)])
        tops = {at: min((loss, c.base) for own, c, loss in runs if own == at) for at, _, _ in runs}
        found.append(Allocated(
            name, line.loss(compute), c.base, steps, steps * c.training["batch_size"] / len(made.rows("train")),
            c.training.get("learning_rate"), {at: (base, loss) for at, (loss, base) in tops.items()}, line,
        ))  # fmt: skip
    return sorted(found, key=lambda a: math.inf if a.foretold is None else a.foretold)


def _enough(compute: float, flops: Mapping[Any, int]) -> None:
    """Refuse a compute with which no line can be drawn."""
    needs = SHARES[1] * LEAST * min(flops.values(), default=0)
    if flops and compute < needs:
        raise GraftError(
            f"compute={compute:g} is too small: a line needs runs of {LEAST} steps with 1/{SHARES[1]} of it, and a "
            f"step takes {min(flops.values()):.3g} operations at least: {needs:.3g} would do"
        )


def _size(model: nn.Module) -> int:
    """The parameters without those of embeddings."""
    embeddings = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    return sum(p.numel() for p in model.parameters() if id(p) not in embeddings)


def _name(c: Configuration) -> str:
    return title(c.method, c.options)


def _key(c: Configuration) -> tuple[str, str]:
    return _name(c), c.base
