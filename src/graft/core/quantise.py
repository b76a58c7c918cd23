"""A model whose linear layers are quantised: adapters train beside codes of one byte or half a byte a weight."""

import importlib.util
import warnings
from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from .errors import GraftError
from .host import base_modules
from .quantised import Scheme, schemes
from .registry import adapters, registry, unwrapped
from .sites.quantised import quantised_sites
from .targets import resolve

MARK = "quantised_as"  # on the layers made here: the name of their scheme


@torch.no_grad()
def quantise(model: nn.Module, scheme: str, targets: Any = "all-linear", leave: Iterable[str] = ()) -> nn.Module:
    """Put a quantised layer in the place of each nn.Linear among `targets` of `model`; in place.

    scheme   int8, which torch has itself, on CPUs in float32; with the extra `quantised` int8-weights (torchao) and nf4
             (bitsandbytes, after QLoRA: Efficient Finetuning of Quantized LLMs. Dettmers et al., 2023.
             https://arxiv.org/abs/2305.14314). The files in core/quantised say what they do
    targets  as for `graft.attach`
    leave    modules that stay as they are, with all inside: heads that are to be trained whole

    Layers whose weight another module shares, and what is no nn.Linear, stay as they are. Quantise before the first
    adapter comes: it learns beside the codes then, which never change. `graft.dequantise` gives plain layers again.
    Layers that bitsandbytes or transformers quantised themselves are adapted as well. Gives the model.

    GraftError for an unknown scheme, one whose library is not installed, one that does not compute in the dtype or on
    the device of the model, for a model with adapters, and where there is nothing to quantise.
    """
    model, chosen = unwrapped(model), find(scheme)
    if registry(model):
        raise GraftError(f"the model carries the adapter {next(iter(adapters(model)))!r}: quantise it before it does")
    inside = tuple(f"{path}." for path in leave)
    used = Counter(id(p) for m in base_modules(model).values() for p in m._parameters.values() if p is not None)
    plain = {
        id(m): (path, m)
        for path, m in resolve(model, targets)
        if type(m) is nn.Linear and used[id(m.weight)] == 1 and not f"{path}.".startswith(inside)
    }
    if not plain:
        raise GraftError(f"{targets!r} picks no torch.nn.Linear that can be quantised in this {type(model).__name__}")
    for path, linear in plain.values():
        if chosen.dtype not in (None, linear.weight.dtype):
            kind, own = (str(t).removeprefix("torch.") for t in (chosen.dtype, linear.weight.dtype))
            raise GraftError(f"{scheme} computes in {kind}, and {path} is {own}: load the model with dtype={kind!r}")
        check_device(scheme, linear.weight.device)
    made = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch announces that its own quantisation will move to torchao
        for key, (_, linear) in plain.items():
            made[key] = chosen.make(linear).train(linear.training)
            setattr(made[key], MARK, scheme)
    for module in list(model.modules()):
        for name, child in module._modules.items():
            if id(child) in made:
                module._modules[name] = made[id(child)]
    return model


def find(scheme: str) -> Scheme:
    """The scheme of a name, whose library is installed."""
    if scheme not in schemes():
        known = "; ".join(f"{name} ({found.about})" for name, found in sorted(schemes().items()))
        raise GraftError(f"no scheme of quantisation is called {scheme!r}; there are {known}")
    found = schemes()[scheme]
    if found.package and importlib.util.find_spec(found.package) is None:
        raise GraftError(f"{scheme} needs {found.package}: pip install 'graft[quantised]'")
    return found


def check_device(scheme: str, device: torch.device) -> None:
    only = schemes()[scheme].device
    if only not in (None, device.type):
        others = ", ".join(name for name, other in sorted(schemes().items()) if other.device is None)
        raise GraftError(f"{scheme} computes on {only} only, not on {device}: choose that device, or one of {others}")


def scheme_of(model: nn.Module) -> str | None:
    """The scheme by which `quantise` makes the model's quantised layers again, if there is one for all of them."""
    marks = {getattr(site.module, MARK, None) for site in quantised_sites(model)}
    return marks.pop() if len(marks) == 1 else None
