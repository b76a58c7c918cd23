"""The first steps of a run, with its largest batch."""

import inspect
import math
import statistics
import time
from collections.abc import Mapping
from itertools import chain, islice, pairwise
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from ..core.adapter import Adapter
from ..models import Base
from ..training import fit
from ..training.batches import Plan
from ..training.data import Examples, held_out
from ..training.evaluation import length
from ..training.guards import check_settings
from ..training.objectives import Objective
from ..tuning import adapt
from .dry import Dry


class Rehearsal:
    """What `graft.tune` would do at first, as often as wanted, with the same batch at every step.

    base      for which the examples are prepared; it may have no weights
    kind      the objective
    training  what `graft.fit` takes; adaptation: what `graft.tuning.adapt` takes beside
    batch     the features of the largest batch of the run; steps: of the whole run
    """

    def __init__(
        self, base: Base, kind: type[Objective], examples: Examples, training: Mapping[str, Any], **adaptation: Any
    ):
        given = inspect.signature(fit).bind(base.model, examples, **training)
        given.apply_defaults()
        known = dict(given.arguments)
        check_settings(known)
        self.kind, self.examples, self.adaptation = kind, examples, adaptation
        self.training = {**training, "processor": known["processor"] or base.processor}
        if isinstance(known["validation"], float):
            examples, _ = held_out(examples, known["validation"], known["seed"])
        self.task = kind(
            base.model, self.training["processor"], **{k: known[k] for k in ("max_length", "labels", "packing")}
        )
        features: Any = self.task.features(examples)
        lengths = [length(features, i) for i in range(len(features))]
        plan = Plan(lengths, known["batch_size"], seed=known["seed"], grouped=known["length_grouping"])
        self.micros, self.count = known["gradient_accumulation"], len(features)
        per_epoch = plan.steps(self.micros)
        self.steps = known["steps"] or max(1, math.ceil(known["epochs"] * per_epoch))
        batches = chain.from_iterable(islice(plan.stream(0, self.micros), min(self.steps, per_epoch)))
        self.batch = [features[i] for i in max(batches, key=lambda rows: len(rows) * max(lengths[i] for i in rows))]

    def adapt(self, base: Base) -> list[Adapter]:
        """Put the adapters on a base, innermost first."""
        if self.adaptation["method"] is None:
            base.model.requires_grad_(True)
            return []
        made = adapt(base, self.kind, self.examples, training=self.training, **self.adaptation)
        return list(made.values())

    def fit(self, model: nn.Module, count: int, dry: Dry | None = None) -> list[float]:
        """Take so many steps; gives the times at which they ended. Tells `dry` what tensors are for."""
        own, task, batch, ends = set(model.parameters()), self.task, self.batch, []

        class Again(self.kind):
            """The objective on features that are there."""

            def __init__(self, *args: Any, **kwargs: Any):
                vars(self).update(vars(task))

            def features(self, examples: Examples) -> list[dict[str, Any]]:
                return [batch[row["row"]] for row in examples]

        def parameters(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
            """Those of the run; none, if it is not its optimizer."""
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

        rows = [{"row": i % len(batch)} for i in range(max(self.count, self.micros * len(batch)))]
        settings = {**self.training, "objective": Again, "steps": max(self.steps, count), "batch_size": len(batch)}
        settings |= {"validation": None, "patience": None, "output": None, "trackers": (), "progress": False}
        hooks = register_optimizer_step_pre_hook(before), register_optimizer_step_post_hook(after)
        try:
            fit(model, rows, **settings)
        except _Enough:
            pass
        finally:
            for hook in hooks:
                hook.remove()
        return ends

    def seconds(self, base: Base, count: int) -> float:
        """Of a step on a base: the median over so many, without the first one. The adapters leave it again."""
        adapters = self.adapt(base)
        try:
            ends = self.fit(base.model, count)
        finally:
            for adapter in reversed(adapters):
                adapter.detach()
        return statistics.median(b - a for a, b in pairwise(ends))


class _Enough(Exception):
    """So many steps were taken."""
