"""Statistics for data- and gradient-driven methods, collected once for all sites and methods which ask for them."""

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from .delta import base_modules, base_parameters
from .errors import GraftError
from .site import kind_of, site_for
from .targets import resolve

NEEDS = ("weight_grad", "weight_square", "weight_change", "fisher", "input_gram", "input_square", "width")
_SQUARES = {"input_gram": lambda x: x.T @ x, "input_square": lambda x: x.square().sum(0)}  # of the inputs [tokens, in]


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
    learning_rate: float = 5e-5,
) -> dict[str, dict]:
    """{path: {need: tensor}} over the batches in `data`, streaming: memory does not grow with their number.

    weight_grad   [out, in]   mean over batches of the gradient of the loss in the host's matrix
    weight_square [out, in]   mean over batches of the square of this gradient: the diagonal of the empirical Fisher
    weight_change [out, in]   what one pass of full fine-tuning over `data` changes in the matrices of all targets
                              (AdamW with `learning_rate`, without decay); they get their values back
    fisher        float       the trace of the empirical Fisher in all parameters of the host: the sum of the squares of
                              their gradients, as the mean over batches
    input_gram    [in, in]    sum over tokens of x x^T, float32
    input_square  [in]        sum over tokens of x^2, float32
    width         int         number of output features
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
            for need in _SQUARES.keys() & set(needs):
                stats[path][need] = stats[path].get(need, 0) + _SQUARES[need](args[0].detach().flatten(0, -2).float())

        return hook

    for path, host in hosts.items():
        if (need := next(iter(_SQUARES.keys() & needs), None)) and kind_of(host) != "linear":
            raise GraftError(f"{need} is defined for linear hosts; {path} is a {kind_of(host)}")
        handles.append(host.register_forward_hook(watch(path)))
    of_weights = [n for n in needs if n.startswith("weight_")]
    weights = {p: h.weight for p, h in hosts.items() if hasattr(h, "weight")} if of_weights else {}
    inside = {
        path: [p for p in base_parameters(base_modules(host)).values() if p.is_floating_point()]
        for path, host in hosts.items()
        if "fisher" in needs
    }
    flags: dict[Tensor, bool] = {w: w.requires_grad for own in (weights.values(), *inside.values()) for w in own}
    before, tuner = {}, None
    if "weight_change" in needs:
        if len(of_weights) > 1:
            raise GraftError(f"weight_change moves the weights at which {of_weights[0]} is taken: collect it alone")
        before = {w: w.detach().clone() for w in flags}
        tuner = torch.optim.AdamW(before, learning_rate, weight_decay=0.0)
    try:
        for w in flags:
            w.requires_grad_(True)
        count = 0
        for batch in data:
            count += 1
            with torch.set_grad_enabled(bool(flags)):
                value = loss(model, batch)
            if flags:
                unused = "fisher" in needs  # a module may have parameters that do not run
                gradients = dict(zip(flags, torch.autograd.grad(value, [*flags], allow_unused=unused)))
                for path, own in inside.items():
                    squares = [g.square().sum().item() for w in own if (g := gradients[w]) is not None]
                    stats[path]["fisher"] = stats[path].get("fisher", 0.0) + sum(squares)
                for path, w in weights.items():
                    g = torch.zeros_like(w) if gradients[w] is None else gradients[w]
                    for need, power in (("weight_grad", 1), ("weight_square", 2)):
                        if need in needs:
                            total = stats[path].get(need)
                            stats[path][need] = g**power if total is None else total.add_(g**power)
                    if tuner:
                        w.grad = g
                if tuner:
                    tuner.step()
                    tuner.zero_grad()
        if not count:
            raise GraftError("no batch was given to collect statistics from")
        for path in inside:
            stats[path]["fisher"] /= count
        for path, w in weights.items():
            site = site_for(path, hosts[path], (kind_of(hosts[path]),))
            for need in of_weights:
                mean = w.detach() - before[w] if tuner else stats[path][need] / count
                stats[path][need] = _as_matrix(site, mean)
    finally:
        with torch.no_grad():
            for w, value in before.items():
                w.copy_(value)
        for w, flag in flags.items():
            w.requires_grad_(flag)
        for handle in handles:
            handle.remove()
    return dict(stats)


def _as_matrix(site, grad: Tensor) -> Tensor:
    """A gradient in the host's layout as [out, in]."""
    if site.weight.shape == grad.shape:
        return grad
    return grad.T if grad.dim() == 2 else grad.reshape(site.weight.shape)
