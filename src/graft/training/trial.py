"""What a method may try out within a step of training: losses and gradients, of its own data and of examples aside."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..core.delta import is_finite
from ..core.errors import GraftError
from .batches import Plan
from .evaluation import evaluating
from .objectives import Objective

Batch = dict[str, Tensor]


class Aside:
    """The examples that a run keeps from training, in batches as large as those of its steps."""

    def __init__(
        self,
        accelerator: Any,
        model: nn.Module,
        task: Objective,
        features: Sequence[dict[str, Any]],
        plan: Plan,
        stream: Iterator[list[list[int]]],
        summed: Callable[[Batch], Tensor],
    ):
        """`stream` are the batches of each step, of `plan`; `summed` is the loss over the terms of a batch."""
        self.accelerator, self.model, self.task, self.features = accelerator, model, task, features
        self.stream, self.summed = stream, summed
        self.whole = plan.epoch(0)[accelerator.process_index :: accelerator.num_processes]

    def trial(self, own: list[Batch], learning_rate: float) -> "Trial":
        """For the next step, whose own data are the batches `own`."""
        return Trial(self, own, next(self.stream), learning_rate)

    def batches(self, rows: list[list[int]]) -> list[Batch]:
        return [self.task.collate([self.features[i] for i in some]) for some in rows]

    def total_of(self, value: Any) -> Tensor:
        """Over all processes."""
        value = torch.as_tensor(value, device=self.accelerator.device)
        return self.accelerator.reduce(value) if self.accelerator.num_processes > 1 else value


class Trial:
    """The losses of one step, see `Delta.review`. All processes ask for the same, in the same order."""

    def __init__(self, source: Aside, own: list[Batch], rows: list[list[int]], learning_rate: float):
        self.source, self.own, self.rows, self.learning_rate = source, own, rows, learning_rate

    @torch.no_grad()
    def loss(self) -> float:
        """The mean loss over all examples aside, in evaluation mode."""
        s = self.source
        with evaluating(s.model):
            sums = [(float(s.summed(b)), s.task.terms(b)) for b in s.batches(s.whole)]
        return float(s.total_of(sum(x for x, _ in sums))) / int(s.total_of(sum(n for _, n in sums)))

    def gradients(self, parameters: Sequence[Tensor], aside: bool = False) -> list[Tensor]:
        """Of the mean loss, without penalties, over this step's own data or over its batch of the examples aside."""
        s, found = self.source, [torch.zeros_like(p) for p in parameters]
        batches = s.batches(self.rows) if aside else self.own
        terms = int(s.total_of(sum(s.task.terms(b) for b in batches)))
        device = s.accelerator.device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            for batch in batches:
                given = torch.autograd.grad(s.summed(batch) / terms, parameters, allow_unused=True)
                for total, g in zip(found, given):
                    if g is not None:
                        total += g
        found = [s.total_of(g) for g in found]
        if not is_finite(found):
            raise GraftError(
                f"a gradient of the {'examples kept aside' if aside else 'step'} is not finite, at which "
                "parameters that were tried out: try a smaller learning rate, or precision='fp32'"
            )
        return found
