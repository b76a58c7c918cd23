"""What training would cost, before it begins.

cost = graft.predict_cost("graft:minilm", "task:chapters", method="lora", batch_size=8)
cost.peak, cost.parts, cost.step_seconds

rehearsal  the first steps of a run, with its largest batch, through `graft.tune`'s own code and `graft.fit`
dry        running that on tensors without contents, while their bytes are counted
"""

import copy
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException

from ..core.errors import GraftError
from ..core.recipe import Recipe
from ..models import Base, architecture, load_base
from ..training.data import read
from ..training.evaluation import choose, length
from .dry import Dry
from .rehearsal import Rehearsal

DRY, TIMED = 2, 4  # steps: the optimizer has its state from the second on; the first one that is timed warms up
PARTS = ("weights", "adapter", "gradients", "optimizer", "saved", "temporary")
SIDE = 512  # of the matrices whose product tells how fast a device is


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a run would cost. Sizes are in bytes.

    peak          the most that tensors take at a time while it trains, those of the base included. A process takes more
                  on a CPU: Python and its libraries, and what these allocate past torch
    start         the most before that, while the adapters are made, statistics taken for them included; without what
                  decompositions of matrices take within
    parts         of the peak: weights of the base; the adapter, with its buffers; gradients; state of the optimizer;
                  saved for the backward pass; temporary
    parameters    how many numbers are trained; file: bytes of what is saved of the adapter
    steps         of the run; flops: of a step, for matrix products, convolutions and attention
    step_seconds  of a step; measured: whether on the model itself, or estimated as flops by the speed of one matrix
                  product here, which leaves out all that is not a product
    batch         examples of the largest batch, and the tokens of its longest one (1 where they have no length)
    """

    peak: int
    start: int
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
        """Of all steps, each with the largest batch; without loading, evaluating and saving."""
        return self.steps * self.step_seconds


def predict_cost(
    model: str | Path | Base,
    data: Any,
    *,
    method: Any = "lora",
    targets: str | Mapping[str, Any] | Sequence[str] | None = None,
    heads: str | Sequence[str] | None = None,
    dtype: str = "auto",
    quantise: str | None = None,
    revision: str | None = None,
    examples_for_statistics: int = 64,
    measure: bool = True,
    **training: Any,
) -> Cost:
    """What `graft.tune` would cost with the same arguments.

    model    also a `Base`, as `graft.load_base` gives it; it is left as it was
    method   None: all parameters of the base
    measure  take the time of some steps on the model itself; False: estimate it, and load no weights

    The largest of the batches of the run is trained on without contents: two steps, since the optimizer has its state
    from the second one on. So phases of a method which come later in its schedule are not seen, nor are evaluation and
    saving. Where contents decide how large something is, a mask counts as full.

    Raises `GraftError` for what `graft.tune` refuses, for a method that cannot do without contents, and for a base to
    quantise: codes have sizes of their own.
    """
    if quantise is not None:
        raise GraftError(f"what a run takes on a base quantised by {quantise} cannot be predicted: leave quantise out")
    columns, seed = training.pop("columns", None), training.get("seed", 0)
    examples, name = read(data, columns=columns), model.name if isinstance(model, Base) else model
    shown = model.model if isinstance(model, Base) else architecture(name, revision)
    kind = choose(training.pop("objective", "auto"), examples, shown)

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
    device, dry = _device(), Dry()
    twin = replace(base, model=dry.twin(base.model, device))
    with warnings.catch_warnings():
        # Whether storages are one is asked by their address, which is of no consequence where nothing is computed.
        warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")
        try:
            with dry:
                adapters = run.adapt(twin)
                start, _ = dry.peak()
                dry.mark("adapter", (t for a in adapters for m in a.modules().values() for t in _tensors(m)))
                before, begun = dry.flops, len(dry.events) - 1
                run.fit(twin.model, DRY, dry)
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            methods = ", ".join(Recipe.of(m).method.name for m in (method if isinstance(method, list) else [method]))
            raise GraftError(
                f"what {methods} takes cannot be predicted: {error} depends on contents of tensors"
            ) from error
        (peak, parts), flops = dry.peak(begun), (dry.flops - before) // DRY
        found = Cost(
            peak=peak, start=start, parts={part: parts.get(part, 0) for part in PARTS},
            parameters=sum(p.numel() for p in twin.model.parameters() if p.requires_grad),
            file=sum(t.nbytes for a in adapters for t in a.packed().values()),
            steps=run.steps, flops=flops, measured=measure,
            step_seconds=0.0 if measure else flops * _seconds_per_flop(device, next(twin.model.parameters()).dtype),
            batch=(len(run.batch), max(length(run.batch, i) for i in range(len(run.batch)))),
        )  # fmt: skip
    if not measure:
        return found
    if not isinstance(model, Base):
        base = load(None)
    elif method is None:
        base = replace(base, model=copy.deepcopy(base.model))  # its steps change it
    return replace(found, step_seconds=run.seconds(replace(base), TIMED))


def _device() -> torch.device:
    from accelerate import PartialState

    return torch.device(str(PartialState().device))


def _tensors(module: nn.Module) -> Iterator[torch.Tensor]:
    yield from module.parameters()
    yield from module.buffers()


def _seconds_per_flop(device: torch.device, dtype: torch.dtype) -> float:
    """Of a product of matrices."""
    a, took = torch.randn(SIDE, SIDE, device=device, dtype=dtype), []
    for _ in range(3):
        begun = time.perf_counter()
        float((a @ a)[0, 0])
        took.append(time.perf_counter() - begun)
    return min(took) / (2 * SIDE**3)
