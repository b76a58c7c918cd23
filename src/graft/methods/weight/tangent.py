"""Linearised fine-tuning: Tangent Transformers for Composition, Privacy and Removal (Liu, Golatkar, Soatto, 2023) and
Task Arithmetic in the Tangent Space (Ortiz-Jimenez, Favero, Frossard, 2023)."""

from typing import Any

import torch
from torch import nn
from torch.func import functional_call, jvp
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_flatten, tree_unflatten

from ...core.delta import Delta, Paper
from ...core.errors import GraftError
from ...core.host import Host, base_modules, base_parameters


class _Bare(nn.Module):
    """A host without the deltas on it, whose parameters can be replaced."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, *args, **kwargs):
        host: Any = self.module
        if host.host_forward is not None:
            return host.host_forward(*args, **kwargs)
        return host.host_class.forward(host, *args, **kwargs)


class Tangent(Delta, name="tangent"):
    """y' = f(x; w) + J_w f(x; w) d: the first-order Taylor expansion of the host f around its parameters w, d trained.

    d has the shapes of all parameters of the host, d [out, in] for a matrix [out, in], and starts at zero. One forward
    pass carries values and tangents through the host (a Jacobian-vector product). y' is affine in d: the outputs of
    adapters average as their d do, a part of an average is removed by subtracting it, and a convex loss of y' is convex
    in d. It is not a change of the weights and cannot be merged. Deltas below it on the same host rest in f. All
    tensors that the host returns are expanded, also a loss that it computes itself, so that the host should be what
    gives features or logits.

    Formula as in the authors' code (github.com/gortizji/tangent_task_arithmetic). Attention runs unfused here: fused
    kernels have no forward derivative. The rescaled square loss of the first paper is an objective, not part of it.
    """

    papers = (
        Paper(
            "Tangent Transformers for Composition, Privacy and Removal",
            "Liu, Golatkar, Soatto",
            2023,
            "https://arxiv.org/abs/2307.08122",
        ),
        Paper(
            "Task Arithmetic in the Tangent Space: Improved Editing of Pre-Trained Models",
            "Ortiz-Jimenez, Favero, Frossard",
            2023,
            "https://arxiv.org/abs/2305.12827",
        ),
    )
    known = (
        "Its authors report results comparable to ordinary fine-tuning on image classification. The authors of `Task "
        "Arithmetic in the Tangent Space` report that task vectors learnt so add and subtract better."
    )
    hosts = ("module",)
    on_codes = False
    passes_x = True
    bare: Any

    def __init__(self, site):
        super().__init__(site)
        own = base_parameters(base_modules(site.module))
        self.names = tuple(own)
        self.d = nn.ParameterList(nn.Parameter(torch.zeros(p.shape)) for p in own.values())
        object.__setattr__(self, "bare", _Bare(site.module))  # a plain reference, never registered here

    def forward(self, inner, *args, **kwargs):
        parts = base_modules(self.site.module).items()
        if any(path and getattr(m, "gradient_checkpointing", False) for path, m in parts):
            raise GraftError(
                f"tangent at {self.site.path or 'the model'}: no derivative goes forward through parts of the host "
                f"that recompute their activations: adapt the blocks themselves, or leave checkpointing out"
            )
        own = [self.site.module.get_parameter(name) for name in self.names]
        names = [f"module.{name}" for name in self.names]
        seen: list[Any] = []

        def run(tensors):
            out = functional_call(self.bare, dict(zip(names, tensors)), args, kwargs)
            leaves, spec = tree_flatten(out)
            seen[:] = [spec, leaves]
            return tuple(filter(_moves, leaves))

        with sdpa_kernel(SDPBackend.MATH):
            values, tangents = jvp(run, (own,), ([d.to(p.dtype) for d, p in zip(self.d, own)],))[:2]
        spec, leaves = seen
        if isinstance(inner, Host):  # its values are already there
            moved = iter([y + dy for y, dy in zip(values, tangents)])
            return tree_unflatten([next(moved) if _moves(t) else t for t in leaves], spec)
        leaves, spec = tree_flatten(inner(*args, **kwargs))
        dy = iter(tangents)
        return tree_unflatten([t + next(dy) if _moves(t) else t for t in leaves], spec)


def _moves(leaf):
    return isinstance(leaf, torch.Tensor) and leaf.is_floating_point()
