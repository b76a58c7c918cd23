"""What is checked before a run, and what a run must not leave behind or die of without a word."""

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..core.adapter import Adapter
from ..core.errors import GraftError
from .messages import nearest
from .objectives import Objective
from .text import IGNORED

_WHOLE = ("batch_size", "gradient_accumulation", "steps", "eval_every", "save_every", "patience", "seed", "max_length")
_LEAST = {"seed": 0, "max_length": 2}  # otherwise 1
_POSITIVE = ("learning_rate", "head_learning_rate", "loraplus_lr_ratio", "epochs", "clip", "gradient_dropout")
_NOT_NEGATIVE = ("weight_decay", "warmup")


def check_settings(given: Mapping[str, Any]) -> None:
    """Refuse numbers without a meaning, by name and value."""
    for name in _WHOLE:
        value, least = given[name], _LEAST.get(name, 1)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
            raise GraftError(f"{name} is a whole number of at least {least}, not {value!r}")
    for name in (*_POSITIVE, *_NOT_NEGATIVE):
        value = given[name]
        if value is None:
            continue
        if isinstance(value, bool | str) or not (value > 0 or (value == 0 and name in _NOT_NEGATIVE)):
            raise GraftError(
                f"{name} is a number {'of at least' if name in _NOT_NEGATIVE else 'above'} 0, not {value!r}"
            )
    if (given["gradient_dropout"] or 0) > 1:
        raise GraftError(f"gradient_dropout is at most 1, not {given['gradient_dropout']!r}")
    for at, times in (given["rate_changes"] or {}).items():
        if not str(at).isdecimal() or isinstance(times, bool | str) or not times > 0:
            raise GraftError(f"rate_changes are {{steps taken: a factor above 0}}, not {at!r}: {times!r}")
    if given["clip_by"] not in ("global", "component"):
        raise GraftError(f"clip_by is 'global' or 'component', not {given['clip_by']!r}")
    if given["keep"] not in ("best", "last"):
        raise GraftError(f"keep is 'best' or 'last', not {given['keep']!r}")
    if given["resume"] not in (True, False, "auto"):
        raise GraftError(f"resume is True, False or 'auto', not {given['resume']!r}")
    if isinstance(given["validation"], int):
        raise GraftError(f"validation is data, or a share of the data above 0 and below 1, not {given['validation']}")
    if given["patience"] is not None and given["validation"] is None:
        raise GraftError("patience needs validation data: pass validation=, for example 0.1 to hold out a tenth")


def check_trackers(names: Sequence[Any]) -> None:
    """Refuse what accelerate does not know, and what it would leave out without a word."""
    if not names:
        return
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    known, present = {str(n) for n in LOGGER_TYPE_TO_CLASS}, {str(n) for n in get_available_trackers()}
    for name in names:
        if isinstance(name, str) and name not in known:
            raise GraftError(f"no tracker is called {name!r}: {nearest(name, known)}")
        if isinstance(name, str) and name not in present:
            raise GraftError(f"the tracker {name} is not installed: pip install {name}")


def check_reached(trained: Iterable[Adapter]) -> None:
    """After a backward pass: warn of deltas that got no gradient, refuse an adapter of which no delta got one."""
    for adapter in trained:
        heads = dict(adapter.heads)
        missed, count = [], 0
        for path, delta in adapter.deltas.items():
            got = [p.grad is not None for p in delta.parameters() if p.requires_grad and not delta.resting]
            count += bool(got)
            # A head may have parts that the model does not use.
            if got and not (any(got) if path in heads else all(got)):
                missed.append(path)
        if missed:
            message = (
                f"in the first step no gradient reached {len(missed)} of the {count} trained deltas of adapter "
                f"{adapter.name!r}, among them that at {missed[0] or 'the model'}: its module did not run, or its "
                f"weight is read past its forward. graft.verify(model, batch, train=True) tells which"
            )
            if len(missed) == count:
                raise GraftError(message)
            warnings.warn(message, stacklevel=3)


@contextmanager
def training_mode(model: nn.Module) -> Iterator[None]:
    """Dropout on; a frozen batch normalisation keeps its running statistics, since the base does not change."""
    before = {m: m.training for m in model.modules()}
    model.train()
    for module in model.modules():
        frozen = not any(p.requires_grad for p in module.parameters(recurse=False))
        if getattr(module, "running_mean", None) is not None and frozen:
            module.eval()
    try:
        yield
    finally:
        for module, training in before.items():
            module.training = training


@contextmanager
def recomputing(model: nn.Module, wanted: bool) -> Iterator[None]:
    """Gradient checkpointing without reentrance: the other kind finds no gradient behind a frozen base."""
    if not wanted or getattr(model, "is_gradient_checkpointing", False):
        yield
        return
    enable: Any = getattr(model, "gradient_checkpointing_enable", None)
    if enable is None or not getattr(model, "supports_gradient_checkpointing", True):
        raise GraftError(f"{type(model).__name__} cannot recompute its activations: leave checkpointing out")
    enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    try:
        yield
    finally:
        model.gradient_checkpointing_disable()  # type: ignore[operator]


@contextmanager
def plain_attention(model: nn.Module, device: torch.device, bf16: bool, longest: int) -> Iterator[None]:
    """On a CPU in bfloat16, short attention that is not fused.

    longest   tokens of an example; 1: unknown, as of images

    torch's fused one takes longer backward there (`benchmarks/attention.py`), and saves little memory while rows are
    short.
    """
    config: Any = getattr(model, "config", None)
    fused = getattr(config, "_attn_implementation", None) == "sdpa"
    if not (bf16 and device.type == "cpu" and fused and 1 < longest < 64):
        yield
        return
    model.set_attn_implementation("eager")  # type: ignore[operator]
    try:
        yield
    finally:
        model.set_attn_implementation("sdpa")  # type: ignore[operator]


@contextmanager
def within_memory(device: torch.device, batch_size: int) -> Iterator[None]:
    """Say what helps when memory runs out."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        exhausted = isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)
        if not exhausted:
            raise
        raise GraftError(
            f"out of memory on {device} with batch_size={batch_size}: use a smaller batch_size with more "
            "gradient_accumulation, a smaller max_length, checkpointing=True, precision='bf16', or a base in bfloat16"
        ) from error


def not_finite(loss: float, norm: float, step: int, rows: Sequence[Sequence[int]], losses: Sequence[torch.Tensor],
               epoch: int) -> GraftError:  # fmt: skip
    """What went wrong at `step`, and in which examples."""
    bad = [r for r, value in zip(rows, losses) if not bool(torch.isfinite(value))] or rows
    named = ", ".join(str(i) for r in bad for i in r[:8]) + (", ..." if any(len(r) > 8 for r in bad) else "")
    what = f"the loss is {loss}" if not torch.isfinite(torch.tensor(loss)) else f"the norm of the gradient is {norm}"
    return GraftError(
        f"{what} at step {step} (epoch {epoch}, training examples {named}): "
        "stopped before the parameters changed, and the last checkpoint is kept; "
        "try a smaller learning rate, a longer warmup, or precision='fp32'"
    )


@torch.no_grad()
def check_packing(
    model: nn.Module, task: Objective, features: Sequence[dict], device: torch.device, bf16: bool
) -> None:
    """Refuse a model that lets packed examples see each other or takes other positions: compare with separate rows.

    Some attend through a state or a window, compute positions themselves or add a prompt to each row; what a model does
    with mask and positions shows only when it runs. Logits must agree to 1 % of their spread (10 % in bfloat16).
    """
    row = next((f for f in features if (f["position_ids"] == 0).sum() > 1), None)
    if row is None:
        return
    starts = [*(row["position_ids"] == 0).nonzero()[0], len(row["input_ids"])]
    second = slice(starts[1], starts[2])
    was = {m: m.training for m in model.modules()}
    model.eval()
    try:
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            packed, alone = (
                [task.loss(model, {k: v.to(device) for k, v in task.collate([part]).items()})[1].float()][0]
                for part in (_only(row, second), {k: v[second] for k, v in row.items()})
            )
    finally:
        for module, training in was.items():
            module.training = training
    difference = float(
        (packed - alone).abs().mean() / (alone - alone.mean(-1, keepdim=True)).abs().mean().clamp_min(1e-12)
    )
    if not difference < (0.1 if bf16 else 0.01):
        raise GraftError(
            f"{type(model).__name__} computes something else for an example in a packed row than for the example alone "
            f"(logits differ by {difference:.1%} of their spread): leave packing out"
        )


def _only(row: dict, part: slice) -> dict:
    """The row with loss on one part only."""
    labels = row["labels"].copy()
    labels[: part.start] = labels[part.stop :] = IGNORED
    return {**row, "labels": labels}
