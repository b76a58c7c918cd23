"""Merging: the plain weights which compute what the adapted model computes.

W' = delta_n(... delta_1(W)) for the deltas which run at a host, innermost first. A merge is a new state dict, or new
parameters put in the place of the old ones, which are kept: undoing it brings the very bits back. Where deltas change
chosen entries only, a merge in place writes these and keeps what was there: its cost is that of the adapter.
"""

import math
import warnings
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .delta import is_finite
from .errors import GraftError
from .kept import PLAIN
from .registry import Registry, adapted_hosts, registry, unwrapped
from .sites.quantised import QuantisedSite

SWALLOWED = 0.1  # from this share of a change lost to rounding on, a merge warns


class Entries(NamedTuple):
    """Values for entries of a parameter in place, and those that are there before; all [k]."""

    flat: Tensor  # the parameter as it lies in memory
    places: Tensor  # there
    before: Tensor
    after: Tensor  # not rounded

    def write(self, values: Tensor) -> None:
        with torch.no_grad():
            self.flat[self.places] = values.to(self.flat.dtype)


@dataclass
class Merge:
    """A merge done in place: `undo()` puts the base's own parameters and the adapters back, `keep()` drops them.

    Until then the adapters of the model can be neither saved nor switched, and none can come or leave.
    """

    model: nn.Module
    lost: dict[str, float]  # by host, the share of the change which rounding to the base's dtype lost
    names: tuple[str, ...] = ()
    kept: list[tuple[nn.Module, str, nn.Parameter]] = field(default_factory=list)
    written: list[Entries] = field(default_factory=list)

    def _end(self) -> Registry | None:
        found = registry(self.model)
        if found is None or found.merged is not self:
            return None  # ended before
        found.merged = None
        return found

    def undo(self) -> None:
        if found := self._end():
            for module, name, parameter in reversed(self.kept):
                module._parameters[name] = parameter
            for entries in self.written:
                entries.write(entries.before)
            self.kept.clear()
            self.written.clear()
            found.activate(self.names)

    def keep(self) -> None:
        """Make the merged weights the base's for good, and take all adapters off the model.

        Where a matrix was merged apart from the one it was tied to, the model's configuration says untied from now on.
        """
        found = self._end()
        if found is None:
            raise GraftError("the merge was undone or kept before")
        trainable = {id(p) for p in found.trainable}
        here = {id(p) for p in self.model.parameters()}
        config: Any = getattr(self.model, "config", None)
        if {id(old) for _, _, old in self.kept} & here and getattr(config, "tie_word_embeddings", False):
            config.tie_word_embeddings = False
        for module, name, old in self.kept:
            new = module._parameters[name]
            assert new is not None
            new.requires_grad_(id(old) in trainable)
        self.kept.clear()
        self.written.clear()
        for adapter in list(found.adapters.values()):
            adapter.detach()

    def __enter__(self):
        return self.model

    def __exit__(self, *_):
        self.undo()


@torch.no_grad()
def _merged(
    model: nn.Module, in_place: bool = False
) -> tuple[dict[str, dict[str, Tensor]], dict[str, float], list[Entries]]:
    """What is new, what rounding lost by path, and with `in_place` the entries to be written.

    What is new is {path: {tensor name: merged value in the host's layout and dtype}}, without the hosts of the entries.
    """
    values: dict[str, dict[str, Tensor]] = {}
    lost: dict[str, float] = {}
    entries: list[Entries] = []
    plain = [p for m in model.modules() for p in m._parameters.values() if p is not None and type(p) in PLAIN]
    owners = Counter(p.untyped_storage().data_ptr() for p in plain)
    for path, host in reversed(adapted_hosts(model).items()):  # outer ones last: they may replace all that is inside
        if not host.linked:
            continue
        deltas = [host.deltas[name] for name in host.linked]
        for delta in deltas:
            if not delta.mergeable():
                raise GraftError(
                    f"{delta.name} at {path or 'the model'} cannot be merged: it is no change of a weight. "
                    f"Keep it as an adapter, or disable it first"
                )
            if not is_finite(delta.state_dict().values()):
                raise GraftError(f"{delta.name} at {path} holds NaN or infinity: nothing was merged")
        found = _entries(host, deltas, owners) if in_place else None
        exact = host.chain.tensors if found is None else {"weight": found.after}
        if not is_finite(exact.values()):
            raise GraftError(f"merging {deltas[-1].name} at {path} gives NaN or infinity: nothing was merged")
        if found is not None:
            lost[path] = rounding_loss(found.after, found.before, found.before.dtype)
            entries.append(found)
            continue
        own = {n: p for n, p in host.named_parameters(remove_duplicate=False) if n in exact}
        if extra := exact.keys() - own.keys():
            raise GraftError(f"{path} has no {extra.pop()} to take the one of {deltas[-1].name}: keep it as an adapter")
        lost[path] = max(rounding_loss(exact[k], p, p.dtype) for k, p in own.items())
        values[path] = {k: _apart(exact[k].to(p.dtype), p) for k, p in own.items()}
    worst = max(lost, key=lambda p: lost[p], default=None)
    if worst is not None and lost[worst] > SWALLOWED:
        count = sum(v > SWALLOWED for v in lost.values())
        dtype = adapted_hosts(model)[worst].site.where().dtype
        warnings.warn(
            f"merging into {dtype} loses {lost[worst]:.0%} of the change at {worst} to rounding, "
            f"and over {SWALLOWED:.0%} at {count} of {len(lost)} modules: "
            f"merge into a float32 copy of the base instead",
            stacklevel=3,
        )
    return values, lost, entries


def _entries(host: Any, deltas: list, owners: Counter) -> Entries | None:
    """The entries that all the deltas change, if they do no more and the matrix is this host's alone; else None."""
    found, own = [delta.entries() for delta in deltas], host._parameters.get("weight")
    if (
        None in found
        or type(own) not in PLAIN
        or isinstance(host.site, QuantisedSite)
        or owners[own.untyped_storage().data_ptr()] > 1
    ):
        return None
    w = host.site.weight.detach()
    shown = w.untyped_storage().data_ptr() == own.untyped_storage().data_ptr() and w.numel() == own.numel()
    if not shown or not own.is_contiguous():
        return None  # what the site shows is computed, or lies apart
    index, values = (torch.cat(parts) for parts in zip(*found))
    index, to = (index, None) if len(found) == 1 else index.unique(return_inverse=True)
    places = index.long()
    if not w.is_contiguous():
        places = places // w.shape[1] * w.stride(0) + places % w.shape[1] * w.stride(1)
    flat = own.detach().view(-1)
    before = flat.index_select(0, places)
    wide = before.to(torch.promote_types(before.dtype, values.dtype))
    return Entries(flat, places, before, wide + values if to is None else wide.index_add(0, to, values))


def _apart(value: Tensor, own: Tensor) -> Tensor:
    """`value` in a storage of its own: what a method leaves as it is would be the base's."""
    same = value.untyped_storage().data_ptr() == own.untyped_storage().data_ptr()
    return value.clone() if same or not value.is_contiguous() else value


def merged_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The plain checkpoint (host names, layout and dtype) which computes what the adapted model computes.

    The model is not changed. A matrix that was tied to another one (lm_head to the embedding) is no longer tied in
    the result: load it into a model with `tie_word_embeddings=False`.
    """
    model = unwrapped(model)
    values, _, _ = _merged(model)
    modules = list(model.named_modules(remove_duplicate=False))
    owned = {path for path, m in modules if getattr(m, "graft_owned", False)}
    inside = lambda key: any(key[:i] in owned for i, letter in enumerate(key) if letter == ".")
    merged = {k: v for k, v in model.state_dict().items() if not inside(k)}
    hosts = {id(model.get_submodule(path)): tensors for path, tensors in values.items()}
    for path, module in reversed(modules):  # outer ones last, as above; a module that occurs twice has two names
        merged.update({f"{path}.{k}".lstrip("."): v for k, v in hosts.get(id(module), {}).items()})
    return merged


def merge(model: nn.Module) -> Merge:
    """Merge the running adapters in place: hosts get new parameters, the adapters stay on the model without effect.

    The base's parameters are kept, not recomputed: `merge(model).undo()` brings their bits back. Sparse adapters are
    written into the base's own parameters, entry by entry, and undone by writing back what was there. A warning tells
    when rounding to the base's dtype would swallow more than a tenth of the change. `merge(model).keep()` bakes the
    adapters in: the merged weights stay, the adapters leave.
    """
    model = unwrapped(model)
    found = registry(model)
    if found is None:
        raise GraftError(f"{type(model).__name__} carries no adapter")
    found.check_unmerged()
    found.check_idle()
    values, lost, written = _merged(model, in_place=True)
    done = Merge(model, lost, found.active, written=written)
    for entries in written:
        entries.write(entries.after)
    for path, tensors in values.items():
        for name, value in tensors.items():
            inside, _, leaf = name.rpartition(".")
            owner = model.get_submodule(f"{path}.{inside}".strip("."))
            old = owner._parameters[leaf]
            assert old is not None
            done.kept.append((owner, leaf, old))
            owner._parameters[leaf] = nn.Parameter(value, requires_grad=False)
    found.activate(())
    found.merged = done
    return done


def rounding_loss(exact: Tensor, before: Tensor, dtype: torch.dtype) -> float:
    """The share of the change exact - before that storing it as `dtype` loses: ||round(W') - W'|| / ||W' - W||."""
    if exact.dtype == dtype:
        return 0.0
    change = torch.linalg.vector_norm(exact - before).item()
    lost = torch.linalg.vector_norm(exact.to(dtype) - exact).item()
    return lost / change if change and math.isfinite(change) else 0.0
