"""Statistics for data- and gradient-driven methods, collected once for all sites and methods which ask for them."""

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from .errors import GraftError
from .site import kind_of, site_for
from .targets import resolve

NEEDS = ("weight_grad", "input_gram", "width")


def default_loss(model: nn.Module, batch) -> Tensor:
    """The loss which a transformers model computes from a batch with labels."""
    out = model(**batch)
    if getattr(out, "loss", None) is None:
        raise GraftError("the model returned no loss: put labels into the batches or pass loss=function(model, batch)")
    return out.loss


def collect(
    model: nn.Module,
    data: Iterable,
    needs: Iterable[str] = ("input_gram",),
    targets: Any = "all-linear",
    loss: Callable[[nn.Module, object], Tensor] = default_loss,
) -> dict[str, dict]:
    """{path: {need: tensor}} over the batches in `data`, streaming: memory does not grow with their number.

    weight_grad [out, in]   mean over batches of the gradient of the loss in the host's matrix
    input_gram  [in, in]    sum over tokens of x x^T, float32
    width       int         number of output features
    """
    needs = tuple(needs)
    if unknown := [n for n in needs if n not in NEEDS]:
        raise GraftError(f"no statistic is called {unknown[0]!r}; there are {', '.join(NEEDS)}")
    hosts: dict[str, Any] = dict(resolve(model, targets, ("linear", "conv", "embedding", "norm", "module")))
    stats: dict[str, dict] = defaultdict(dict)
    handles = []

    def watch(path: str):
        def hook(module, args, out):
            h = out[0] if isinstance(out, tuple) else out
            stats[path]["width"] = h.shape[-1]
            if "input_gram" in needs:
                x = args[0].detach().flatten(0, -2).float()
                stats[path]["input_gram"] = stats[path].get("input_gram", 0) + x.T @ x

        return hook

    for path, host in hosts.items():
        if "input_gram" in needs and kind_of(host) != "linear":
            raise GraftError(f"input_gram is defined for linear hosts; {path} is a {kind_of(host)}")
        handles.append(host.register_forward_hook(watch(path)))
    weights = {p: h.weight for p, h in hosts.items() if hasattr(h, "weight")} if "weight_grad" in needs else {}
    flags: dict[Tensor, bool] = {w: w.requires_grad for w in weights.values()}
    try:
        for w in flags:
            w.requires_grad_(True)
        count = 0
        for batch in data:
            count += 1
            with torch.set_grad_enabled(bool(weights)):
                value = loss(model, batch)
            if weights:
                for path, g in zip(weights, torch.autograd.grad(value, list(weights.values()))):
                    total = stats[path].get("weight_grad")
                    stats[path]["weight_grad"] = g if total is None else total.add_(g)
        if not count:
            raise GraftError("no batch was given to collect statistics from")
        for path, module in hosts.items():
            if "weight_grad" in stats[path]:
                site = site_for(path, module, (kind_of(module),))
                stats[path]["weight_grad"] = _as_matrix(site, stats[path]["weight_grad"] / count)
    finally:
        for w, flag in flags.items():
            w.requires_grad_(flag)
        for handle in handles:
            handle.remove()
    return dict(stats)


def _as_matrix(site, grad: Tensor) -> Tensor:
    """A gradient in the host's layout as [out, in]."""
    if site.weight.shape == grad.shape:
        return grad
    return grad.T if site.weight.shape == grad.T.shape else grad.reshape(site.weight.shape)
