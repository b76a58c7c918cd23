"""From names to a trained adapter, and from a saved one to a model that answers: what the commands do, in Python."""

import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import nn

from .core import files
from .core.adapter import Adapter, attach
from .core.errors import GraftError
from .core.hyper import Range
from .core.recipe import Recipe
from .core.site import site_for
from .core.statistics import collect
from .core.targets import resolve
from .models import Base, architecture, load_base
from .training import Result, fit, objectives, predict
from .training.batches import Plan
from .training.data import Examples, read, take
from .training.evaluation import choose, length

HEAD = 0.02  # standard deviation with which transformers draws the weights of new heads


@dataclass
class Tuned:
    """What `tune` gives: the base with the adapters on it, these by name, and what the run showed."""

    base: Base
    adapters: dict[str, Adapter]
    result: Result

    @property
    def adapter(self) -> Adapter:
        """The adapter; of several the outermost."""
        return list(self.adapters.values())[-1]


def tune(
    model: str | Path,
    data: Any,
    *,
    method: Any = "lora",
    targets: str | Mapping[str, Any] | Sequence[str] | None = None,
    heads: str | Sequence[str] | None = None,
    output: str | Path | None = None,
    resume: bool = False,
    dtype: str = "auto",
    quantise: str | None = None,
    revision: str | None = None,
    examples_for_statistics: int = 64,
    **training: Any,
) -> Tuned:
    """Load a base model, put one or several new adapters on it, train them together on data and save them.

    model      a folder, the id of a model on the hub, or graft:NAME, see `load_base`
    data       a JSONL, JSON, CSV, TSV or Parquet file, a folder of such files, "owner/name" on the hub, `task:NAME`, a
               list of dicts
    method     graft.LoRA(rank=8), or the name of a method; a list of these is a chain, innermost first, whose adapters
               are called like their methods and saved as one folder
    targets    modules to adapt: a preset (all-linear, attention, mlp, qv, blocks, ...), regular expressions over the
               paths of modules, or a list of them; {name of an adapter: its targets} where those of a chain differ; by
               default what each method is made for
    heads      modules to train whole beside the method (the outermost one), named like targets; by default those which
               the checkpoint lacks, such as a new classifier
    output     folder for what is learnt; it must not exist. Until it is complete, the run has a folder beside it, with
               .run at the end of its name
    resume     go on with a run that was stopped, from its last checkpoint and to the same bits
    dtype      of the base's weights: auto (as stored), float32, bfloat16, float16
    quantise   the base's linear layers: int8, or int8-weights and nf4 with the extra `quantised`, see `graft.quantise`
    revision   of the model on the hub
    examples_for_statistics  from how many examples a method that looks at the data before it starts may learn
    training   what `graft.fit` takes: objective, validation, epochs, batch_size, learning_rate, ...

    The outputs of the model follow the data: a classifier with new outputs is a head saved with the adapter.
    """
    place = None if output is None else Path(output).expanduser()
    run = place and place.with_name(f"{place.name}.run")
    if place and run:
        _check_places(place, run, resume)
    columns, seed = training.pop("columns", None), training.get("seed", 0)
    examples = read(data, columns=columns)
    if isinstance(training.get("validation"), str | Path):
        training["validation"] = read(training["validation"], split="validation", columns=columns)
    task = choose(training.get("objective", "auto"), examples, architecture(model, revision))
    base = load_base(
        model, objective=task.name, examples=examples, labels=training.get("labels"),
        dtype=dtype, quantise=quantise, revision=revision, seed=seed,
    )  # fmt: skip
    training |= {"objective": task.name, "processor": training.get("processor") or base.processor}
    made = adapt(base, task, examples, method, targets, heads, seed, examples_for_statistics, training)
    try:
        result = fit(base.model, examples, output=run, resume="auto" if resume else False, **training)
    except GraftError:
        if run and not _begun(run):
            shutil.rmtree(run, ignore_errors=True)  # there is nothing in it to go on from
        raise
    base.max_length = training.get("max_length")
    base.model.eval()
    if place and run:
        # Made whole inside the run's folder and renamed: a run that is killed here can still be resumed.
        whole, kept = run / place.name, [p for p in run.iterdir() if not p.name.startswith((".", "checkpoint-"))]
        shutil.rmtree(whole, ignore_errors=True)
        if len(made) == 1:
            made["default"].save(whole, base_model=base.name)
        else:
            files.save(base.model, whole, base_model=base.name)
        for file in (p for p in kept if p != whole):
            (shutil.copytree if file.is_dir() else shutil.copyfile)(file, whole / file.name)
        whole.rename(place)
        shutil.rmtree(run)
    return Tuned(base, made, result)


def adapt(
    base: Base,
    task: type[objectives.Objective],
    examples: Examples,
    method: Any,
    targets: str | Mapping[str, Any] | Sequence[str] | None,
    heads: str | Sequence[str] | None,
    seed: int,
    examples_for_statistics: int,
    training: Mapping[str, Any],
) -> dict[str, Adapter]:
    """Put the new adapters of `tune` on a base: by name, innermost first."""
    made, new = {}, [base.model.get_submodule(path) for path in base.heads]
    for name, recipe, where, whole in _chain(base, method, targets, heads):
        hosts, stats = _hosts(base.model, recipe, where), None
        if needs := _needs(recipe, hosts):
            batches, loss = _batches(base, task, examples, examples_for_statistics, training)
            with _drawn(new, seed):
                stats = collect(base.model, batches, needs, lambda path, module, hosts=hosts: path in hosts, loss)
        made[name] = attach(base.model, recipe, where, name=name, heads=whole, seed=seed, stats=stats)
    return made


def trained(
    base: Base,
    method: Any,
    targets: str | Mapping[str, Any] | Sequence[str] | None = None,
    heads: str | Sequence[str] | None = None,
) -> int | None:
    """How many numbers `tune` would train on a base, new heads included; None where a method looks at the data first.

    The adapters are put on the base and leave it again. method: None, all parameters of the base.

    Raises `GraftError` where a method cannot be put on the base.
    """
    if method is None:
        return sum(p.numel() for p in base.model.parameters())
    made = []
    try:
        for name, recipe, where, whole in _chain(base, method, targets, heads):
            if _needs(recipe, _hosts(base.model, recipe, where)):
                return None
            made.append(attach(base.model, recipe, where, name=name, heads=whole))
        return sum(p.numel() for adapter in made for p in adapter.parameters())
    finally:
        for adapter in reversed(made):
            adapter.detach()


def _chain(base: Base, method: Any, targets: Any, heads: Any) -> Iterator[tuple[str, Recipe, Any, Any]]:
    """Of each adapter its name, its recipe, its targets and the modules that are trained whole beside it."""
    chain = _named([Recipe.of(m) for m in (method if isinstance(method, list | tuple) else [method])])
    if isinstance(targets, Mapping) and (unknown := targets.keys() - chain.keys()):
        raise GraftError(f"targets: no adapter is called {min(unknown)!r}; there are {', '.join(chain)}")
    new, last = base.heads, list(chain)[-1]
    for name, recipe in chain.items():
        where = targets.get(name) if isinstance(targets, Mapping) else targets
        if where is None and recipe.method.targets == "head" and new:
            where, new = new, []  # the method itself is for heads
        yield name, recipe, where, () if name != last else new if heads is None else heads


def _hosts(model: nn.Module, recipe: Recipe, where: Any) -> dict[str, nn.Module]:
    """The modules that an adapter is for, by path."""
    return dict(resolve(model, where or recipe.method.targets, recipe.method.hosts))


def _needs(recipe: Recipe, hosts: Mapping[str, nn.Module]) -> list[str]:
    """The statistics of the data that a recipe asks for there."""
    cls = recipe.method
    asked = (cls.asks(recipe.at(site_for(path, host, cls.hosts))) for path, host in hosts.items())
    return sorted({need for some in asked for need in some})


@contextmanager
def _drawn(heads: Sequence[nn.Module], seed: int) -> Iterator[None]:
    """Draw what is zero in new heads, as transformers does: no gradient would pass them. They are zero again after."""
    zero = [p for head in heads for p in head.parameters() if p.ndim > 1 and not p.any()]
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(seed)
        for p in zero:
            p.normal_(std=HEAD)
    try:
        yield
    finally:
        for p in zero:
            p.detach().zero_()


def _named(recipes: list[Recipe]) -> dict[str, Recipe]:
    """The recipes by the names of their adapters."""
    if not recipes:
        raise GraftError("method is an empty list: name a method, such as graft.LoRA(rank=8)")
    if len(recipes) == 1:
        return {"default": recipes[0]}
    methods = [recipe.method.name for recipe in recipes]
    numbers = [methods[:i].count(name) + 1 for i, name in enumerate(methods)]
    return {name if n == 1 else f"{name}-{n}": recipe for name, n, recipe in zip(methods, numbers, recipes)}


def load_adapted(
    model: str | Path,
    adapter: str | Path | None = None,
    *,
    objective: str | None = None,
    labels: Sequence[str] | None = None,
    dtype: str = "auto",
    device: str | None = None,
    quantise: str | None = "auto",
    revision: str | None = None,
    allow_other_base: bool = False,
) -> Base:
    """Load a base model with a saved adapter on it, for the task that the adapter was trained for.

    model             as for `load_base`
    adapter           a folder of one or several adapters, which Graft or Hugging Face PEFT wrote, or an id on the hub;
                      none: the base alone
    objective         what the model is for; by default what the adapter was trained for, the outermost that runs
    labels            names of the classes, in order; by default those that the adapter was trained with
    dtype             of the base's weights: auto (as stored), float32, bfloat16, float16
    device            cpu, cuda, ...; by default the accelerator, if there is one
    quantise          the base's linear layers: int8, or int8-weights and nf4 with the extra `quantised`, or none; auto:
                      as the base was that the adapter was trained on
    revision          of the model on the hub
    allow_other_base  use the adapter on weights it was not trained on, too
    """
    configs = [] if adapter is None else [part.config() for part in files.parts(adapter) if part.active]
    task = next((dict(c["task"]) for c in reversed(configs) if c.get("task")), {})
    task |= {} if objective is None else {"objective": objective}
    if quantise == "auto":
        quantise = next((own for c in configs if isinstance(own := c.get("base_quantised"), str)), None)
    base = load_base(
        model, objective=task.get("objective"), labels=labels, config=None if labels else task.get("config"),
        dtype=dtype, device=device, quantise=quantise, revision=revision,
    )  # fmt: skip
    if adapter is None and objective and base.heads:
        warnings.warn(f"{base.name} has no {', '.join(base.heads)}: a new one, not trained, answers", stacklevel=2)
    if adapter is not None:
        files.load(base.model, adapter, allow_other_base=allow_other_base)
    base.max_length = task.get("max_length")
    return base


def generate(
    base: Base,
    prompts: Sequence[str],
    *,
    chat: Annotated[bool, "ask through the chat template of the tokenizer"] = False,
    system: Annotated[str | None, "with --chat: the system message"] = None,
    max_new_tokens: Annotated[int, "longest answer, in tokens", Range(1)] = 128,
    temperature: Annotated[float | None, "sample from softmax(logits / temperature)", Range(above=0)] = None,
    top_k: Annotated[int | None, "sample among the k likeliest tokens", Range(1)] = None,
    top_p: Annotated[float | None, "sample among the likeliest tokens with this share", Range(above=0, high=1)] = None,
    repetition_penalty: Annotated[float, "above 1: tokens that occurred get less likely", Range(above=0)] = 1.0,
    num_beams: Annotated[int, "hypotheses to follow", Range(1)] = 1,
    seed: Annotated[int, "of sampling", Range(0)] = 0,
) -> list[str]:
    """What a language model writes after each prompt; it samples if temperature, top_k or top_p is given."""
    if not getattr(base.model, "can_generate", lambda: False)():
        raise GraftError(f"{type(base.model).__name__} does not generate text: predict with it")
    if system is not None and not chat:
        raise GraftError("a system message needs the chat template: ask with chat")
    sampling = {"temperature": temperature or 1.0, "top_k": top_k or 0, "top_p": top_p or 1.0}
    drawn = any(v is not None for v in (temperature, top_k, top_p))
    before = [] if system is None else [{"role": "system", "content": system}]
    two_parts = bool(getattr(base.model.config, "is_encoder_decoder", False))
    if chat and not getattr(base.processor, "chat_template", None):
        raise GraftError(f"the tokenizer of {base.name} has no chat template: leave chat out")
    rows: list[Any] = [
        {"messages": [*before, {"role": "user", "content": p}]} if chat else {"input" if two_parts else "prompt": p}
        for p in prompts
    ]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return predict(
            base.model, rows, objective="seq2seq" if two_parts else "causal-lm", processor=base.processor,
            max_new_tokens=max_new_tokens, num_beams=num_beams, repetition_penalty=repetition_penalty,
            do_sample=drawn, **(sampling if drawn else {}),
        )  # fmt: skip


def sample(
    base: Base,
    labels: Sequence[str],
    *,
    count: Annotated[int, "images of each label", Range(1)] = 8,
    steps: Annotated[int, "of the sampler", Range(1)] = 32,
    guidance: Annotated[float, "how far beyond the model to go towards the label; 1 is the model as it is"] = 1.0,
    seed: Annotated[int, "of the noise", Range(0)] = 0,
) -> torch.Tensor:
    """Images that a model draws, [labels x count, channels, height, width] from -1 to 1, label by label."""
    if not hasattr(base.model, "sample"):
        raise GraftError(f"{type(base.model).__name__} does not draw images: use a model that does, such as graft:dew")
    known = objectives.named_classes(base.model) or [str(i) for i in range(base.model.config.num_labels)]
    if unknown := [label for label in labels if label not in known]:
        raise GraftError(f"{base.name} knows no label {unknown[0]!r}; it has {', '.join(known)}")
    numbers = torch.tensor([known.index(label) for label in labels]).repeat_interleave(count)
    drawn = torch.Generator().manual_seed(seed)
    return base.model.sample(numbers, steps=steps, guidance=guidance, generator=drawn)


def _check_places(place: Path, run: Path, resume: bool) -> None:
    if place.exists():
        raise GraftError(f"the output folder {place} exists already: choose another one, or remove it")
    begun = _begun(run)
    if resume and not begun:
        raise GraftError(f"{run} holds no checkpoint of a run to resume: leave resume out to begin")
    if begun and not resume:
        raise GraftError(f"{run} holds a run that was stopped: resume it, or remove that folder to begin anew")


def _begun(run: Path) -> bool:
    return any(run.glob("checkpoint-*"))


def _batches(
    base: Base, task: type[objectives.Objective], examples: Examples, count: int, training: Mapping[str, Any]
) -> tuple[list, Callable[[nn.Module, Any], torch.Tensor]]:
    """Some batches of the data where the model is, and the mean loss of one."""
    doing = task(
        base.model, training["processor"], max_length=training.get("max_length"), labels=training.get("labels")
    )  # fmt: skip
    features = doing.features(take(examples, list(range(min(count, len(examples))))))
    plan = Plan([length(features, i) for i in range(len(features))], training.get("batch_size", 8))
    batches = [objectives.on(base.model, doing.collate([features[i] for i in rows])) for rows in plan.epoch(0)]
    return batches, lambda model, batch: doing.loss(model, batch)[0] / doing.terms(batch)
