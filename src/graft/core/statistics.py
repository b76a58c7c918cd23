"""Statistics for data- and gradient-driven methods, collected once for all sites and methods which ask for them."""

import copy
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .errors import GraftError
from .host import base_modules, base_parameters
from .registry import registry
from .site import kind_of, site_for
from .sites.quantised import QuantisedSite, quantised_sites
from .targets import resolve


class Gram:
    """input_gram [in, in]: sum over tokens of x x^T."""

    def __init__(self):
        self.total: Any = 0

    def add(self, x: Tensor) -> None:
        self.total = self.total + x.T @ x

    def value(self) -> Any:
        return self.total


class Squares(Gram):
    """input_square [in]: sum over tokens of x^2."""

    def add(self, x):
        self.total = self.total + x.square().sum(0)


class Covariance(Gram):
    """input_covariance [in, in]: mean over batches of sum over tokens of x x^T, x in units of a batch's largest.

    As CorDA's authors take it (`calib_cov_distribution` in iboing/CorDA).
    """

    count = 0

    def add(self, x):
        self.count += 1
        super().add(x / x.max().abs().clamp(min=torch.finfo(x.dtype).tiny))

    def value(self):
        return self.total / self.count


class Components(NamedTuple):
    """Principal components of the inputs of a module."""

    directions: Tensor  # [k, in], orthonormal
    sizes: Tensor  # [k], singular values of the centred inputs
    shares: Tensor  # [k], of their variance


class Principal:
    """input_components:K  the K largest principal components of the tokens, from an SVD that is brought up to date.

    Of what was seen only mean, K singular values and their directions are kept, which are put above the tokens of the
    next batch (Ross et al., 2008). Signs are such that the largest entry of a direction is positive.
    """

    def __init__(self, count: str):
        self.kept, self.seen, self.spread = int(count), 0, 0.0
        self.mean: Any = 0.0
        self.directions = self.sizes = torch.empty(0)

    def add(self, x: Tensor) -> None:
        new, middle = len(x), x.mean(0)
        apart = (self.mean - middle) * (self.seen * new / (self.seen + new)) ** 0.5
        rows = x - middle
        self.spread = self.spread + rows.square().sum(dtype=torch.float64)
        if self.seen:
            self.spread = self.spread + apart.square().sum(dtype=torch.float64)
            rows = torch.cat([self.sizes[:, None] * self.directions, rows, apart[None]])
        sizes, directions = _right(rows, self.kept)
        signs = directions.gather(1, directions.abs().argmax(1, keepdim=True)).sign()
        self.sizes, self.directions = sizes, signs * directions
        self.mean = (self.mean * self.seen + middle * new) / (self.seen + new)
        self.seen += new

    def value(self) -> Components:
        return Components(self.directions, self.sizes, (self.sizes.square() / self.spread).float())


def _right(rows: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` largest singular values and their right vectors; by iterations where they are few of many."""
    if min(rows.shape) <= 8 * count:
        _, sizes, directions = torch.linalg.svd(rows, full_matrices=False)
    else:
        with torch.random.fork_rng(devices=[rows.device] if rows.is_cuda else []):
            torch.manual_seed(0)
            _, sizes, directions = torch.svd_lowrank(rows, q=2 * count, niter=4)
        directions = directions.T
    return sizes[:count], directions[:count]


INPUTS: dict[str, Callable[..., Any]] = {
    "input_gram": Gram,
    "input_square": Squares,
    "input_covariance": Covariance,
    "input_components": Principal,
}
GRADIENTS = ("weight_grad", "weight_square", "weight_change")
NEEDS = (*GRADIENTS, "fisher", "weight", "width", *INPUTS)


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
    """{path: {need: value}} over the batches in `data`, in one pass for all modules; memory does not grow with `data`.

    weight_grad [out, in]       mean over batches of the gradient of the loss in the host's matrix
    weight_square [out, in]     mean over batches of the square of this gradient: the diagonal of the empirical Fisher
    weight_change [out, in]     what one pass of full fine-tuning over `data` changes in the matrices of all targets
                                (AdamW with `learning_rate`, without decay); they get their values back
    fisher                      how large the diagonal of the empirical Fisher is in the parameters of the host: the sum
                                over its tensors of ||F||_F, F the mean over batches of the squares of their gradients
    weight [out, in]            the host's matrix itself, of a model that is not the one to be adapted; without `data`
    width                       number of output features
    input_gram [in, in]         sum over tokens of x x^T
    input_square [in]           sum over tokens of x^2
    input_covariance [in, in]   mean over batches of the same, x in units of the largest value of a batch
    input_components:K          `Components`, the K largest principal components of the tokens

    Inputs are those of linear hosts, in float32 at least; padding, of which `attention_mask` of a batch tells, does not
    count.
    """
    needs = tuple(needs)
    if unknown := [n for n in needs if n.partition(":")[0] not in NEEDS]:
        raise GraftError(f"no statistic is called {unknown[0]!r}; there are {', '.join(NEEDS)}")
    hosts: dict[str, Any] = dict(resolve(model, targets, ("linear", "conv", "embedding", "norm", "module")))
    of_inputs = [n for n in needs if n.partition(":")[0] in INPUTS]
    sites = {path: site_for(path, module, (kind_of(module),)) for path, module in hosts.items()}
    if of_inputs and (odd := next((s for s in sites.values() if s.kind != "linear"), None)):
        raise GraftError(f"{of_inputs[0]} is defined for linear hosts; {odd.path} is a {odd.kind}")
    coded = next((s for s in sites.values() if isinstance(s, QuantisedSite)), None)
    if coded and (asked := next((n for n in needs if n in (*GRADIENTS, "fisher")), None)):
        raise GraftError(
            f"{asked} is a statistic of gradients, and the weight of {coded.path} is quantised: collect it on the "
            f"original model, whose paths are the same"
        )
    stats: dict[str, dict] = defaultdict(dict)
    streams = {path: {n: _stream(n) for n in of_inputs} for path in hosts}
    handles, batch = [], None

    def watch(path: str):
        def hook(module, args, out):
            h = out[0] if isinstance(out, tuple) else out
            stats[path]["width"] = h.shape[-1]
            if streams[path]:
                x = _tokens(args[0].detach(), batch)
                for stream in streams[path].values() if len(x) else ():
                    stream.add(x)

        return hook

    for path, host in hosts.items():
        handles.append(host.register_forward_hook(watch(path)))
    of_weights = [n for n in needs if n in GRADIENTS]
    weights = {p: h.weight for p, h in hosts.items() if hasattr(h, "weight")} if of_weights else {}
    inside = {
        path: [p for p in base_parameters(base_modules(host)).values() if p.is_floating_point()]
        for path, host in hosts.items()
        if "fisher" in needs
    }
    flags: dict[Tensor, bool] = {w: w.requires_grad for own in (weights.values(), *inside.values()) for w in own}
    opened = quantised_sites(model) if flags and registry(model) is None else []
    for site in opened:
        site.open()
    before, tuner = {}, None
    if "weight_change" in needs:
        if len(of_weights) > 1:
            raise GraftError(f"weight_change moves the weights at which {of_weights[0]} is taken: collect it alone")
        before = {w: w.detach().clone() for w in flags}
        tuner = torch.optim.AdamW(before, learning_rate, weight_decay=0.0)
    sums: dict[tuple[str, str], Any] = defaultdict(float)
    squares = {w: torch.zeros_like(w) for own in inside.values() for w in own}
    try:
        for w in flags:
            w.requires_grad_(True)
        count = 0
        for batch in data if {*needs} != {"weight"} else ():
            count += 1
            with torch.set_grad_enabled(bool(flags)):
                value = loss(model, batch)
            if not flags:
                continue
            # Parameters that did not run, such as those below a copy of their module, have no gradient.
            found = dict(zip(flags, torch.autograd.grad(value, [*flags], allow_unused=True)))
            for w in squares:
                if (g := found[w]) is not None:
                    squares[w] += g.square()
            for path, w in weights.items():
                g = torch.zeros_like(w) if found[w] is None else found[w]
                if "weight_grad" in needs:
                    sums[path, "weight_grad"] += g
                if "weight_square" in needs:
                    sums[path, "weight_square"] += g.square()
                if tuner:
                    w.grad = g
            if tuner:
                tuner.step()
                tuner.zero_grad()
        if not count and {*needs} != {"weight"}:
            raise GraftError("no batch was given to collect statistics from")
        for path, site in sites.items():
            for need in of_weights if path in weights else ():
                mean = (
                    sums.pop((path, need)) / count if tuner is None else weights[path].detach() - before[weights[path]]
                )
                stats[path][need] = _as_matrix(site, mean)
            if path in inside:
                stats[path]["fisher"] = sum(torch.linalg.vector_norm(squares[w]).item() for w in inside[path]) / count
            if "weight" in needs:
                stats[path]["weight"] = site.weight.detach().clone()
            stats[path].update({n: s.value() for n, s in streams[path].items()})
    finally:
        with torch.no_grad():
            for w, value in before.items():
                w.copy_(value)
        for w, flag in flags.items():
            w.requires_grad_(flag)
        for handle in handles:
            handle.remove()
        for site in opened:
            site.close()
    return dict(stats)


def _stream(need: str) -> Any:
    name, _, argument = need.partition(":")
    return INPUTS[name](*([argument] if argument else []))


def _tokens(x: Tensor, batch: Any) -> Tensor:
    """The inputs [..., in] as [tokens, in], without padding."""
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    x = x[mask.bool()] if mask is not None and mask.shape == x.shape[:-1] else x.flatten(0, -2)
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _as_matrix(site, grad: Tensor) -> Tensor:
    """A gradient in the host's layout as [out, in]."""
    if site.kind == "norm":
        return grad
    of_gradient = copy.copy(site)
    of_gradient.module = SimpleNamespace(weight=grad)
    return of_gradient.weight
