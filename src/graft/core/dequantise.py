"""A quantised model with plain layers again, into which adapters can be merged."""

import torch
from torch import nn

from .adapter import Adapter
from .files import build, content
from .registry import activate, registry, unwrapped
from .sites.quantised import QuantisedSite, quantised_sites


@torch.no_grad()
def dequantise(model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """Put an nn.Linear in the place of each quantised layer of `model`, with the weight that it decodes; in place.

    dtype  of the new weights; that of the decoded ones unless given

    What the model computes stays the same, up to the rounding of inputs where these were quantised as well. Adapters on
    it are built anew, with the same values, names and order: take them from `graft.adapters(model)`. To merge adapters
    trained on a quantised base: `graft.dequantise(model)`, then `graft.merge(model)`. Gives the model.
    """
    model = unwrapped(model)
    sites, found = quantised_sites(model), registry(model)
    kept, running = [], ()
    if found is not None and sites:
        found.check_unmerged()
        found.check_idle()
        running = found.active
        for name, adapter in found.adapters.items():
            flags = [p.requires_grad for p in adapter.parameters()]
            kept.append((name, content(adapter), {k: t.clone() for k, t in adapter.state_dict().items()}, flags))
        for adapter in list(found.adapters.values()):
            adapter.detach()
    plain = {id(site.module): _plain(site, dtype) for site in sites}
    for module in list(model.modules()):
        for name, child in module._modules.items():
            if id(child) in plain:
                module._modules[name] = plain[id(child)]
    for name, saved, state, flags in kept:
        adapter: Adapter = build(model, saved, name)
        adapter.load_state_dict(state)
        adapter.task = saved.task
        adapter.attach()
        for p, flag in zip(adapter.parameters(), flags):
            p.requires_grad_(flag)
    if kept:
        activate(model, *running)
    return model


def _plain(site: QuantisedSite, dtype: torch.dtype | None) -> nn.Linear:
    w, b = site.weight, site.bias
    with torch.device("meta"):
        made = nn.Linear(site.d_in, site.d_out, b is not None)
    made.weight = nn.Parameter(w.detach().to(dtype or w.dtype, copy=True), requires_grad=False)
    if b is not None:
        made.bias = nn.Parameter(b.detach().to(made.weight.dtype, copy=True), requires_grad=False)
    return made.train(site.module.training)
