"""Norms with a gain."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from ..errors import GraftError
from ..site import host_class
from .linear import LinearSite


def _is_norm(module: nn.Module) -> bool:
    own = dict(module.named_parameters(recurse=False))
    vectors = all(p.dim() == 1 for p in own.values())
    leaf = all(getattr(m, "graft_owned", False) for m in module.children())
    return "weight" in own and vectors and leaf and "norm" in type(module).__name__.lower()


class NormSite(LinearSite, looks=_is_norm):
    """y = n(x) g + b per channel: `weight` is the gain g [d] in effect, also where the module keeps g - 1 (Gemma)."""

    kind = "norm"
    d_out = d_in = width = property(lambda self: len(self.module.weight))

    def __init__(self, path, module, **position):
        super().__init__(path, module, **position)
        if isinstance(module, nn.GroupNorm | nn.modules.batchnorm._NormBase):
            self.offset, self.axis = 0.0, 1
        elif host_class(module).__module__.startswith("torch.nn"):
            self.offset, self.axis = 0.0, -1
        else:
            self.offset, self.axis = self._probe()

    @torch.no_grad()
    def _probe(self) -> tuple[float, int]:
        """What a module of unknown make does, seen by running it with a weight of zero.

        The first is 1 where it computes n(x) (1 + weight), else 0; the second is the axis of its channels.
        """
        own = self.module.weight
        x = torch.linspace(-1, 1, own.numel(), dtype=own.dtype, device=own.device)
        zero = {k: torch.zeros_like(v) for k, v in self.module.named_parameters(recurse=False)}
        for axis, shape in ((-1, (1, -1)), (1, (1, -1, 1, 1)), (1, (1, -1, 1))):
            try:
                return float(bool(self._call(zero, x.view(shape)).abs().sum() > 0)), axis
            except (RuntimeError, IndexError, ValueError):
                continue
        raise GraftError(f"{self.path}: {type(self.module).__name__} is no norm that can be run on features alone")

    def _call(self, tensors, x):
        bound = _Bound(self.module, host_class(self.module).forward)
        return functional_call(bound, {f"module.{k}": v for k, v in tensors.items()}, x)

    @property
    def weight(self):
        return self.module.weight + self.offset if self.offset else self.module.weight

    def apply(self, x, w, bias=None):
        own = self.module.weight.dtype
        if host_class(self.module) is nn.LayerNorm:
            bias = bias if bias is None else bias.to(own)
            return F.layer_norm(x, self.module.normalized_shape, w.to(own), bias, self.module.eps)
        return self._call({k: v.to(own) for k, v in self.layout(w, bias).items()}, x)

    def rows(self, v):
        return v

    def layout(self, w, b):
        return super().layout(w - self.offset if self.offset else w, b)

    def _shape(self, v, h):
        return v if self.axis < 0 else v.view(-1, *[1] * (h.dim() - 2))


class _Bound(nn.Module):
    """Calls `forward` of the class of `module`, past the deltas mounted there."""

    call: Any

    def __init__(self, module, forward):
        super().__init__()
        self.module = module
        object.__setattr__(self, "call", forward)

    def forward(self, x):
        return self.call(self.module, x)
