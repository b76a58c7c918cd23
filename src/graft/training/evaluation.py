"""Metrics and predictions of a model on data."""

import importlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..core.errors import GraftError
from ..core.sites.quantised import quantised_sites
from . import objectives
from .data import read, take
from .messages import said

PRECISIONS = ("auto", "fp32", "bf16")


def evaluate(
    model: nn.Module,
    data: Any,
    *,
    objective: str = "auto",
    processor: Any = None,
    columns: dict[str, str] | None = None,
    labels: Sequence[str] | None = None,
    max_length: int | None = None,
    batch_size: int = 32,
    precision: str = "auto",
) -> dict[str, float]:
    """The metrics of `objective` on `data`; arguments as in `fit`. `labels`: the names of the classes, in order.

    The rows of a task (`task:NAME`) have metrics of their own; where the objective has none of that name, the model
    answers each row, greedily, and they stand first.
    """
    given: Any = read(data, split="test")
    examples = read(given, columns=columns)
    chosen = choose(objective, examples, model)(
        model, processor_of(model, processor), max_length=max_length, labels=labels
    )
    device = next(model.parameters()).device
    metrics = measure(model, chosen, chosen.features(examples), batch_size, device, half(model, precision, device))
    if set(getattr(given, "metrics", ())) <= metrics.keys():
        return metrics
    said = predict(
        model, examples, objective=chosen.name, processor=chosen.processor, labels=chosen.labels, max_length=max_length,
        batch_size=batch_size, precision=precision, **(given.generation if chosen.generates else {}),
    )  # fmt: skip
    return given.score(said) | metrics


@torch.no_grad()
def predict(
    model: nn.Module,
    data: Any,
    *,
    objective: str = "auto",
    processor: Any = None,
    columns: dict[str, str] | None = None,
    labels: Sequence[str] | None = None,
    max_length: int | None = None,
    batch_size: int = 32,
    precision: str = "auto",
    **generation: Any,
) -> list[Any]:
    """What the model says about each example: {"label", "probability"}, a number, or the text it writes.

    `generation` (max_new_tokens, by default 128; do_sample, ...) goes to the `generate` of a language model.
    """
    examples = read(data, columns=columns, split="test")
    chosen = choose(objective, examples, model)(
        model, processor_of(model, processor), max_length=max_length, labels=labels
    )
    if generation and not chosen.generates:
        raise GraftError(f"{chosen.name} does not generate: {', '.join(generation)} has no meaning for it")
    if chosen.generates and not {"max_length", "generation_config"} & generation.keys():
        generation = {"max_new_tokens": 128} | generation
    device = next(model.parameters()).device
    order, predicted = sorted(range(len(examples)), key=lambda i: _letters(examples[i])), {}
    with evaluating(model), torch.autocast(device.type, torch.bfloat16, enabled=half(model, precision, device)):
        for i in range(0, len(order), batch_size):
            places = order[i : i + batch_size]
            predicted |= zip(places, chosen.predict(model, take(examples, places), **generation))
    return [predicted[i] for i in range(len(examples))]


@torch.no_grad()
def measure(
    model: nn.Module,
    objective: objectives.Objective,
    features: Sequence[dict[str, Any]],
    batch_size: int,
    device: torch.device,
    bf16: bool,
    process: int = 0,
    processes: int = 1,
) -> dict[str, float]:
    """The metrics over `features`, in batches of similar length; every process takes a share and knows all results."""
    order = sorted(range(len(features)), key=lambda i: length(features, i))
    batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    results = []
    with evaluating(model):
        for batch in batches[process::processes]:
            tensors = {k: v.to(device) for k, v in objective.collate([features[i] for i in batch]).items()}
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                loss, outputs = objective.loss(model, tensors)
            results.append((float(loss), objective.terms(tensors), objective.record(outputs, tensors)))
    if processes > 1:
        from accelerate.utils import gather_object

        results = gather_object(results)
    mean = sum(r[0] for r in results) / sum(r[1] for r in results)
    return objective.score([r[2] for r in results], mean)


def _letters(example: Any) -> int:
    """The letters of its texts: batches of similar length have little padding."""
    values = example.values() if isinstance(example, Mapping) else example if isinstance(example, list) else ()
    return len(example) if isinstance(example, str) else sum(map(_letters, values))


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Every module in evaluation mode, and afterwards as it was."""
    training = [m for m in model.modules() if m.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def choose(
    objective: str | type[objectives.Objective], examples: Any, architecture: Any = ""
) -> type[objectives.Objective]:
    """The objective of that name; "auto": what the examples and the model, or the name of its class, speak for."""
    if not isinstance(objective, str):
        return objective
    if objective != "auto":
        return objectives.find(objective)
    return objectives.guess(examples, architecture if isinstance(architecture, str) else type(architecture).__name__)


def processor_of(model: nn.Module, given: Any) -> Any:
    """What was given, or the tokenizer or image processor of the model's own id or folder."""
    if given is not None and not isinstance(given, str):
        return given
    name = given or getattr(getattr(model, "config", None), "_name_or_path", "")
    if not name:
        raise GraftError(f"{type(model).__name__} does not say which tokenizer it uses: pass processor=")
    from transformers import AutoImageProcessor, AutoTokenizer

    shipped = importlib.import_module("graft.bases").named(name)
    loader = AutoImageProcessor if getattr(model, "main_input_name", "") == "pixel_values" else AutoTokenizer
    try:
        return loader.from_pretrained(name if shipped is None else shipped.path())
    except Exception as error:
        raise GraftError(
            f"cannot load the tokenizer or image processor of {name!r}: {said(error)}; pass processor="
        ) from error


def half(model: nn.Module, precision: str, device: torch.device) -> bool:
    """Whether to compute in bfloat16; "auto": on a GPU that has it, or where the base is stored in it."""
    if precision not in PRECISIONS:
        raise GraftError(f"precision is one of {', '.join(PRECISIONS)}, not {precision!r}")
    if precision == "bf16" and (only := next((s for s in quantised_sites(model) if s.dtype), None)):
        kind = str(only.dtype).removeprefix("torch.")
        raise GraftError(f"{only.path} is quantised and computes in {kind} alone: leave precision='bf16' out")
    if precision != "auto":
        return precision == "bf16"
    stored = any(p.dtype == torch.bfloat16 for p in model.parameters())
    return stored or (device.type == "cuda" and torch.cuda.is_bf16_supported())


def length(features: Sequence[dict[str, Any]], i: int) -> int:
    """Tokens of an example; 1 where examples have no length, such as images."""
    ids = features[i].get("input_ids") if isinstance(features, list) else None
    return 1 if ids is None else len(ids)
