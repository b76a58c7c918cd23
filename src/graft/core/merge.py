"""Merging: the plain weights which compute what the adapted model computes. The base's own tensors are never written.

W' = delta_n(... delta_1(W)) for the deltas which run at a host, innermost first. A merge is a new state dict, or new
parameters put in the place of the old ones, which are kept: undoing it brings the very bits back.
"""

import warnings
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .adapter import Registry, adapted_hosts, registry, unwrapped
from .delta import is_finite
from .errors import GraftError
from .site import rounding_loss

SWALLOWED = 0.1  # from this share of a change lost to rounding on, a merge warns


@dataclass
class Merge:
    """A merge done in place: `undo()` puts the base's own parameters and the adapters back, `keep()` drops them.

    Until then the adapters of the model can be neither saved nor switched, and none can come or leave.
    """

    model: nn.Module
    lost: dict[str, float]  # by host, the share of the change which rounding to the base's dtype lost
    names: tuple[str, ...] = ()
    kept: list[tuple[nn.Module, str, nn.Parameter]] = field(default_factory=list)

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
            self.kept.clear()
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
        for adapter in list(found.adapters.values()):
            adapter.detach()

    def __enter__(self):
        return self.model

    def __exit__(self, *_):
        self.undo()


@torch.no_grad()
def _merged(model: nn.Module) -> tuple[dict[str, dict[str, Tensor]], dict[str, float]]:
    """{path: {tensor name: merged value in the host's layout and dtype}} and what rounding lost, by path."""
    values: dict[str, dict[str, Tensor]] = {}
    lost: dict[str, float] = {}
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
        exact = host.chain.tensors
        own = {n: p for n, p in host.named_parameters(remove_duplicate=False) if n in exact}
        if extra := exact.keys() - own.keys():
            raise GraftError(f"{path} has no {extra.pop()} to take the one of {deltas[-1].name}: keep it as an adapter")
        if not is_finite(exact.values()):
            raise GraftError(f"merging {deltas[-1].name} at {path} gives NaN or infinity: nothing was merged")
        lost[path] = max(rounding_loss(exact[k], p, p.dtype) for k, p in own.items())
        values[path] = {k: _apart(exact[k].to(p.dtype), p) for k, p in own.items()}
    worst = max(lost, key=lambda p: lost[p], default=None)
    if worst is not None and lost[worst] > SWALLOWED:
        count = sum(v > SWALLOWED for v in lost.values())
        dtype = next(iter(values[worst].values())).dtype
        warnings.warn(
            f"merging into {dtype} loses {lost[worst]:.0%} of the change at {worst} to rounding, "
            f"and over {SWALLOWED:.0%} at {count} of {len(lost)} modules: "
            f"merge into a float32 copy of the base instead",
            stacklevel=3,
        )
    return values, lost


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
    values, _ = _merged(model)
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

    The base's parameters are kept, not recomputed: `merge(model).undo()` brings their bits back. A warning tells
    when rounding to the base's dtype would swallow more than a tenth of the change. `merge(model).keep()` bakes the
    adapters in: the merged weights stay, the adapters leave.
    """
    model = unwrapped(model)
    found = registry(model)
    if found is None:
        raise GraftError(f"{type(model).__name__} carries no adapter")
    found.check_unmerged()
    found.check_idle()
    values, lost = _merged(model)
    done = Merge(model, lost, found.active)
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
