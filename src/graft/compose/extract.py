"""An adapter from two checkpoints: the difference between a fine-tuned model and its base."""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from ..core.adapter import HEADS
from ..core.errors import GraftError
from ..core.host import base_modules
from ..core.merge import merged_state_dict
from ..core.recipe import Recipe
from ..core.registry import registry, unwrapped
from ..core.site import kind_of, site_for
from ..core.targets import resolve
from ..methods.weight.full import Full
from .change import MATRICES, own_state, wide
from .combine import Combination, Plan, Source, attached, inside
from .keep import Loss


@torch.no_grad()
def extract(
    model: nn.Module,
    tuned: nn.Module | Mapping[str, Tensor],
    *,
    rank: int | None = None,
    targets: str | Sequence[str] | None = None,
    heads: str | Sequence[str] = (),
    into: str | None = None,
    name: str = "extracted",
) -> Combination:
    """Make an adapter for `model` of what changed between it and `tuned`.

    tuned    a model like `model`, with the adapters that run on it, or its state dict
    rank     of a LoRA, at most: the nearest one to the difference of each matrix, by singular values
    targets  modules to adapt, as for `graft.attach`; by default all with a matrix that differs, and the norms
    heads    modules to keep whole
    into     "lora", "shira" (the entries that differ) or "full"; LoRA by default if a rank is given, else full
    name     of the adapter on the model, where it is frozen and runs

    What differs in other places (parameters beside matrices and norms, running statistics of norms, modules that
    `targets` leaves out) is lost, and counts in the error under the name of the tensor.
    """
    model = unwrapped(model)
    if found := registry(model):
        found.check_unmerged()
    if isinstance(tuned, nn.Module):
        tuned = merged_state_dict(tuned) if registry(tuned) else tuned.state_dict()
    modules, sizes = base_modules(model), _changed(model, tuned)
    changed = {path for path, m in modules.items() if any(f"{path}.{n}".strip(".") in sizes for n in m._parameters)}
    whole = [path for path, _ in resolve(model, heads, HEADS)] if heads else []
    kinds = (*MATRICES, "norm")
    picked = modules.items() if targets is None else resolve(model, targets, kinds)
    paths = [path for path, module in picked if path in changed and kind_of(module) in kinds]
    paths = [path for path in paths if not inside(path, whole)]
    source = Source(_Tuned(modules, tuned, [*paths, *whole]), Recipe.of(Full), {*whole}, 1.0)
    adapter, losses = Plan(model, [source]).keep(name, rank, into)
    for key, size in sizes.items():
        path, _, leaf = key.rpartition(".")
        runs_whole = inside(path, [p for p in whole if kind_of(modules[p]) == "module"])
        if not runs_whole and (leaf in modules[path]._buffers or not inside(path, [*paths, *whole])):
            losses[key] = Loss(size, size)  # at a norm, statistics stay those of the base
    return attached(adapter, losses)


def _changed(model: nn.Module, tuned: Mapping[str, Tensor]) -> dict[str, float]:
    """{name of a tensor that differs: Frobenius norm of the difference}."""
    paths, found = base_modules(model), {}
    for key, value in own_state(model).items():
        if key not in tuned:
            raise GraftError(f"the tuned model lacks {key}: is it of the same kind, for the same task?")
        if tuned[key].shape != value.shape:
            raise GraftError(
                f"{key} has shape {[*value.shape]} here and {[*tuned[key].shape]} in the tuned model: is it of the "
                f"same kind, for the same task?"
            )
        path = key.rpartition(".")[0]
        if path in paths and value.is_floating_point():
            size = torch.linalg.vector_norm(wide(tuned[key]).to(value.device) - wide(value)).item()
            if size:
                found[key] = size
    if not found:
        raise GraftError("the two models do not differ: there is nothing to extract")
    return found


class _Tuned(Mapping):
    """The modules of the tuned model as deltas of the base's, each made when it is asked for."""

    def __init__(self, modules: dict[str, nn.Module], state: Mapping[str, Tensor], paths: list[str]):
        self.modules, self.state, self.paths = modules, state, paths

    def __getitem__(self, path: str) -> Full:
        if path not in self.paths:
            raise KeyError(path)
        site, prefix = site_for(path, self.modules[path], HEADS), f"{path}." if path else ""
        delta = Full(site)
        copy = delta.copy.to(torch.promote_types(site.where().dtype, torch.float32))
        own = copy.state_dict() if site.kind == "module" else dict(copy.named_parameters())
        for key, value in own.items():
            value.copy_(self.state[prefix + key])
        return delta

    def __iter__(self) -> Iterator[str]:
        return iter(self.paths)

    def __len__(self) -> int:
        return len(self.paths)
