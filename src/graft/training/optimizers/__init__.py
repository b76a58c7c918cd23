"""Optimizers by name: those of `torch.optim`, of the files in this folder, and of `pytorch-optimizer` where installed.

A file here is an optimizer (a class derived from `torch.optim.Optimizer`), found without being listed anywhere.
"""

import importlib
import importlib.util
import pkgutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ...core.errors import GraftError
from .. import checkpoints
from ..messages import nearest

Factory = Callable[..., torch.optim.Optimizer]


def _native() -> dict[str, Factory]:
    own = (importlib.import_module(m.name) for m in pkgutil.iter_modules(__path__, f"{__name__}."))
    classes = {k.lower(): v for module in (*own, torch.optim) for k, v in vars(module).items() if isinstance(v, type)}
    return {k: v for k, v in classes.items() if issubclass(v, torch.optim.Optimizer) and v is not torch.optim.Optimizer}


def _extra() -> dict[str, Factory]:
    if importlib.util.find_spec("pytorch_optimizer") is None:
        return {}
    import pytorch_optimizer

    return {name: pytorch_optimizer.load_optimizer(name) for name in pytorch_optimizer.get_supported_optimizers()}


def find(name: str) -> Factory:
    """The optimizer class called `name`, in any case; `torch.optim` and our own first."""
    native = _native()
    if name.lower() in native:
        return native[name.lower()]
    extra = _extra()
    if name.lower() in extra:
        return extra[name.lower()]
    hint = "" if extra else "; more come with `pip install graft[optimizers]`"
    raise GraftError(f"no optimizer is called {name!r}: {nearest(name, native | extra)}{hint}")


def build(
    name: str | Factory,
    parameters: list[nn.Parameter],
    *,
    learning_rate: float,
    weight_decay: float = 0.0,
    heads: list[nn.Parameter] | None = None,
    head_learning_rate: float | None = None,
    ups: list[nn.Parameter] | None = None,
    loraplus_lr_ratio: float | None = None,
    options: Mapping[str, Any] | None = None,
) -> torch.optim.Optimizer:
    """An optimizer over `parameters`.

    Weight decay acts on matrices only: scales, magnitudes and biases ([n] or scalars) have no reason to shrink to 0.
    `heads`, those of `parameters` that belong to a new head, learn with `head_learning_rate` where it is given.
    `ups`, those that lead from the rank of an update to the output (B of B A), learn `loraplus_lr_ratio` times as fast:
    LoRA+: Efficient Low Rank Adaptation of Large Models. Hayou et al., 2024. https://arxiv.org/abs/2402.12354
    `name` may also be a class or a function that takes the groups and the keywords; `options` go to it.
    Each group keeps its own peak learning rate under "peak", which a schedule multiplies.
    """
    factory = find(name) if isinstance(name, str) else name
    label = name if isinstance(name, str) else getattr(name, "__name__", repr(name))
    rates: dict[int, float] = {}
    if loraplus_lr_ratio is not None:
        if not ups:
            raise GraftError("loraplus_lr_ratio is for methods with factors, such as lora: no trained adapter has any")
        rates |= dict.fromkeys(map(id, ups), learning_rate * loraplus_lr_ratio)
    if head_learning_rate is not None:
        rates |= dict.fromkeys(map(id, heads or []), head_learning_rate)
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for p in parameters:
        key = rates.get(id(p), learning_rate), weight_decay if p.ndim > 1 else 0.0
        groups.setdefault(key, []).append(p)
    keywords = {"lr": learning_rate, **(options or {})}
    if both := sorted({"lr", "weight_decay"} & set(options or {})):
        name = "learning_rate" if both[0] == "lr" else both[0]
        raise GraftError(f"{both[0]} is no option of the optimizer here: set {name} instead of optimizer_options")
    decays = _try_out(factory, label, keywords, weight_decay)
    try:
        optimizer = factory(
            [{"params": g, "lr": lr, **({"weight_decay": wd} if decays else {})} for (lr, wd), g in groups.items()],
            **keywords,
        )
    except Exception as error:
        raise GraftError(f"optimizer {label} refuses these parameters: {error}") from error
    for group in optimizer.param_groups:
        group["peak"] = group["lr"]
    return optimizer


def _try_out(factory: Factory, label: str, keywords: dict[str, Any], decay: float) -> bool:
    """One step on one small matrix, to learn what an optimizer asks for (such as a closure); whether it has decay."""
    probe = nn.Parameter(torch.ones(2, 2))
    probe.grad = torch.ones(2, 2)
    try:
        optimizer = factory([probe], **keywords)
    except Exception as error:  # optimizers come from two libraries and fail in many ways
        raise GraftError(f"optimizer {label} does not take {keywords}: {error}") from error
    decays = "weight_decay" in optimizer.defaults
    if decay and not decays:
        raise GraftError(f"optimizer {label} has no weight decay: leave weight_decay at 0")
    try:
        with torch.random.fork_rng(devices=[]):
            optimizer.step()
        checkpoints.flatten(optimizer.state_dict(), {})
    except GraftError as error:
        raise GraftError(f"optimizer {label} has a state that cannot be saved: {error}") from error
    except Exception as error:
        raise GraftError(
            f"optimizer {label} needs more than a gradient at each step, so it cannot be used: {error}"
        ) from error
    return decays


@torch.no_grad()
def forget(optimizer: torch.optim.Optimizer, fresh: Mapping[nn.Parameter, torch.Tensor | None]) -> None:
    """Let parameters begin anew before a step: without state and gradient; where a mask [like p] picks some entries,
    with a state of zero at these."""
    for p, mask in fresh.items():
        if mask is None:
            p.grad = None
            optimizer.state.pop(p, None)
            continue
        for value in optimizer.state.get(p, {}).values():
            if torch.is_tensor(value) and value.shape == p.shape:
                value[mask] = 0


def average(optimizer: Any) -> None:
    """Move the parameters to where they are to be evaluated: optimizers without a schedule train at other points.

    The Road Less Scheduled. Defazio et al., 2024. https://arxiv.org/abs/2405.15682
    """
    if callable(getattr(optimizer, "eval", None)):
        optimizer.eval()


@contextmanager
def averaged(optimizer: Any) -> Iterator[None]:
    """`average` for the duration of an evaluation."""
    average(optimizer)
    try:
        yield
    finally:
        if callable(getattr(optimizer, "train", None)):
            optimizer.train()


def restore(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
    """Load a state without the cast to the parameter's dtype that `Optimizer.load_state_dict` makes: bit for bit."""
    optimizer.load_state_dict(saved)
    order = [p for group in optimizer.param_groups for p in group["params"]]
    for index, tensors in saved["state"].items():
        if not isinstance(index, int):
            continue  # some keep common values under a name
        own = optimizer.state[order[index]]
        for key, value in tensors.items():
            if torch.is_tensor(value) and own[key].dtype != value.dtype:
                own[key] = value.to(own[key].device)
