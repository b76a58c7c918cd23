"""What training would cost, before it begins.

cost = graft.predict_cost("graft:minilm", "task:chapters", method="lora", batch_size=8)
cost.peak, cost.parts, cost.step_seconds

The first steps of `graft.fit` itself are run on tensors without contents (see `dry.py`), which counts the memory; the
time of a step is measured on the model, where it fits.
"""

import math
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice, pairwise
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from ..core.adapter import Adapter
from ..models import Base, architecture, load_base
from ..training import fit
from ..training.batches import Plan
from ..training.data import Examples, read
from ..training.evaluation import choose, length
from ..training.objectives import Objective
from ..tuning import adapt
from .dry import Dry

DRY, TIMED = 2, 4  # steps: in the second one the optimizer has its state; the first one that is timed warms up
PARTS = ("weights", "adapter", "gradients", "optimizer", "saved", "temporary")


@dataclass(frozen=True)
class Cost:
    """What a run would cost. All sizes in bytes.

    peak          the most that tensors take at a time, from the first touch of the base on; largest batch of the run
    parts         what that is made of: weights of the base; the adapter, with its buffers; gradients; the state of the
                  optimizer; what is saved for backward; and what is temporary
    parameters    that are trained
    file          of the adapter's tensors
    steps         of the whole run
    flops         of a step: matrix products, convolutions and attention
    step_seconds  of a step with the largest batch
    measured      whether these seconds were measured on the model, or estimated: flops / flops per second of a product
                  of matrices on this machine
    batch         examples of the largest batch, and their longest length in tokens
    """

    peak: int
    parts: Mapping[str, int]
    parameters: int
    file: int
    steps: int
    flops: int
    step_seconds: float
    measured: bool
    batch: tuple[int, int]

    @property
    def seconds(self) -> float:
        """Of all steps, were each as large as the largest: without loading, evaluating and saving."""
        return self.steps * self.step_seconds


def predict_cost(
    model: str | Path | Base,
    data: Any,
    *,
    method: Any = "lora",
    targets: str | Mapping[str, Any] | Sequence[str] | None = None,
    heads: str | Sequence[str] | None = None,
    dtype: str = "auto",
    revision: str | None = None,
    examples_for_statistics: int = 64,
    measure: bool = True,
    **training: Any,
) -> Cost:
    """What `graft.tune` would cost with the same arguments.

    model    also a `Base`, as `graft.load_base` gives it
    measure  take the time of a few steps on the model; False: estimate it, and load no weights

    Nothing is allocated for the count of the memory but the data. Raises `GraftError` for what `graft.tune` refuses.
    """
    columns, seed = training.pop("columns", None), training.get("seed", 0)
    examples = read(data, columns=columns)
    asked, name = training.pop("objective", "auto"), model.name if isinstance(model, Base) else model
    kind = choose(asked, examples, model.model if isinstance(model, Base) else architecture(name, revision))

    def load(device: str | None) -> Base:
        return load_base(
            name, objective=kind.name, examples=examples, labels=training.get("labels"), dtype=dtype, device=device,
            revision=revision, seed=seed,
        )  # fmt: skip

    base = model if isinstance(model, Base) else load("meta")
    run = Rehearsal(
        base, kind, examples, training, method=method, targets=targets, heads=heads, seed=seed,
        examples_for_statistics=examples_for_statistics,
    )  # fmt: skip
    dry = Dry()
    twin = replace(base, model=dry.twin(base.model, _device()))
    with dry:
        adapters = run.adapt(twin)
        dry.mark("adapter", (t for a in adapters for m in a.modules().values() for t in _tensors(m)))
        before = dry.flops
        run.fit(twin.model, DRY, dry)
    peak, parts = dry.peak()
    flops = (dry.flops - before) // DRY
    found = Cost(
        peak=peak, parts={part: parts.get(part, 0) for part in PARTS},
        parameters=sum(p.numel() for p in twin.model.parameters() if p.requires_grad),
        file=sum(t.nbytes for a in adapters for t in a.packed().values()),
        steps=run.steps, flops=flops, step_seconds=flops * _seconds_per_flop(base.model), measured=False,
        batch=(len(run.batch), max(length(run.batch, i) for i in range(len(run.batch)))),
    )  # fmt: skip
    return found if not measure else replace(found, step_seconds=run.seconds(load(None)), measured=True)


class Rehearsal:
    """The first steps of a run with its largest batch, as `graft.tune` would take them."""

    def __init__(
        self, base: Base, kind: type[Objective], examples: Examples, training: Mapping[str, Any], **adaptation: Any
    ):
        training = {**training, "processor": training.get("processor") or base.processor}
        self.kind, self.examples, self.training, self.adaptation = kind, examples, training, adaptation
        self.task = kind(
            base.model, training["processor"], max_length=training.get("max_length"), labels=training.get("labels"),
            packing=training.get("packing", False),
        )  # fmt: skip
        features: Any = self.task.features(examples)
        lengths = [length(features, i) for i in range(len(features))]
        grouped, each = training.get("length_grouping", True), training.get("gradient_accumulation", 1)
        plan = Plan(lengths, training.get("batch_size", 8), seed=training.get("seed", 0), grouped=grouped)
        per_epoch = plan.steps(each)
        self.count = len(features)
        self.steps = training.get("steps") or max(1, math.ceil(training.get("epochs", 3) * per_epoch))
        batches = chain.from_iterable(islice(plan.stream(0, each), min(self.steps, per_epoch)))
        self.batch = [features[i] for i in max(batches, key=lambda rows: len(rows) * max(lengths[i] for i in rows))]

    def adapt(self, base: Base) -> list[Adapter]:
        return list(adapt(base, self.kind, self.examples, training=self.training, **self.adaptation).values())

    def fit(self, model: nn.Module, count: int, dry: Dry | None = None) -> list[float]:
        """Take so many steps; gives the times at which they ended."""
        own, task, batch, ends = set(model.parameters()), self.task, self.batch, []

        class Again(self.kind):
            """The same batch at every step."""

            def __init__(self, *args: Any, **kwargs: Any):
                vars(self).update(vars(task))

            def features(self, examples: Examples) -> list[dict[str, Any]]:
                return [batch[row["row"]] for row in examples]

        def parameters(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
            """Those of the run; none if it is another optimizer."""
            return [p for group in optimizer.param_groups for p in group["params"] if p in own]

        def before(optimizer: torch.optim.Optimizer, *_: Any) -> None:
            if dry is not None:
                dry.mark("gradients", (p.grad for p in parameters(optimizer)))

        def after(optimizer: torch.optim.Optimizer, *_: Any) -> None:
            if found := parameters(optimizer):
                if dry is not None:
                    dry.mark("optimizer", (t for p in found for t in optimizer.state.get(p, {}).values()))
                ends.append(time.perf_counter())
                if len(ends) == count:
                    raise _Enough

        size = len(batch) * self.training.get("gradient_accumulation", 1)
        rows = [{"row": i % len(batch)} for i in range(max(self.count, size))]
        settings = {**self.training, "objective": Again, "steps": self.steps, "batch_size": len(batch)}
        hooks = register_optimizer_step_pre_hook(before), register_optimizer_step_post_hook(after)
        try:
            fit(model, rows, **{**settings, "validation": None, "patience": None, "progress": False})
        except _Enough:
            pass
        finally:
            for hook in hooks:
                hook.remove()
        return ends

    def seconds(self, base: Base) -> float:
        """Of a step on a base: the median of some."""
        self.adapt(base)
        ends = self.fit(base.model, min(TIMED, self.steps))
        return statistics.median(b - a for a, b in pairwise(ends))


class _Enough(Exception):
    """So many steps were taken."""


def _device() -> torch.device:
    from accelerate import PartialState

    return torch.device(str(PartialState().device))


def _tensors(module: nn.Module) -> Iterator[torch.Tensor]:
    yield from module.parameters()
    yield from module.buffers()


def _seconds_per_flop(model: nn.Module) -> float:
    """Of a product of matrices as large as the host's widest ones."""
    a = torch.randn(512, 512, device=_device(), dtype=next(model.parameters()).dtype)
    took = []
    for _ in range(3):
        begun = time.perf_counter()
        float((a @ a).sum())
        took.append(time.perf_counter() - begun)
    return min(took) / (2 * 512**3)
