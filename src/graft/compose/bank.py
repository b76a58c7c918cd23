"""Many deltas of one method at one site, one per row of a batch."""

from typing import Any

import torch
from torch import nn
from torch.func import functional_call, vmap

from ..core.delta import Delta


class Route(nn.Module):
    """Which delta serves which row of the batch; one per model, shared by all banks."""

    ids: torch.Tensor

    def __init__(self):
        super().__init__()
        self.register_buffer("ids", torch.zeros(1, dtype=torch.long), persistent=False)


class Bank(Delta):
    """Row b of the batch is served by delta `route.ids[b]`.

    The tensors are stacked [deltas, ...] and gathered [batch, ...]; `vmap` turns the single-request `forward` of any
    method into its batched form (for LoRA: two batched products). The deltas must share one shared module, if any.
    """

    one: Any

    def __init__(self, site, shared: Route, *, deltas: list):
        super().__init__(site, shared)
        states = [d.state_dict() for d in deltas]
        self.stack = nn.ParameterDict()
        for k in states[0]:
            stacked = torch.stack([s[k] for s in states])
            self.stack[k.replace(".", "/")] = nn.Parameter(stacked, requires_grad=False)
        object.__setattr__(self, "one", deltas[0])  # the pattern; its own numbers are not used

    def forward(self, inner, x):
        rows = {k.replace("/", "."): v[self.shared.ids] for k, v in self.stack.items()}
        return vmap(lambda p, row: functional_call(self.one, p, (inner, row)), randomness="different")(rows, x)
