"""Convolutions."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..formed import all_in
from .linear import LinearSite


class ConvSite(LinearSite, hosts=(nn.Conv1d, nn.Conv2d, nn.Conv3d)):
    """A convolution is a linear map of patches: W is [out, in / groups * kernel]."""

    kind = "conv"
    taps = property(lambda self: math.prod(self.module.kernel_size))
    d_in = property(lambda self: self.module.weight[0].numel())
    inputs = property(lambda self: self.module.in_channels)
    weight = property(lambda self: self.module.weight.flatten(1))

    def apply(self, x, w, bias=None):
        kernel = w.reshape(w.shape[0], -1, *self.module.kernel_size).to(x.dtype)
        return self.module._conv_forward(x, kernel, bias if bias is None else bias.to(x.dtype))

    def apply_formed(self, x, form, w, bias, *tensors, pull=None):
        return self.apply(x, form(w.to(x.dtype), *all_in(x.dtype, tensors)), bias)

    def down(self, x, a):  # each group sees all k filters: [groups * k] features
        return self.apply(x, a.repeat(self.module.groups, 1) if self.module.groups > 1 else a)

    def up(self, h, b):
        conv = (F.conv1d, F.conv2d, F.conv3d)[self.module.weight.dim() - 3]
        kernel = b.view(*b.shape, *[1] * (self.module.weight.dim() - 2)).to(h.dtype)
        return conv(h, kernel, groups=self.module.groups)

    def kron(self, x, left, right):
        first, *rest = right
        if self.module.groups > 1:  # the blocks of P ⊗ Q are not those of the groups
            for m in rest:
                first = m @ first
            return self.apply(x, torch.kron(left, first))
        a, c = left.shape
        axes = self.module.weight.dim() - 1  # channels and space
        h = x.reshape(-1, x.shape[-axes] // c, *x.shape[1 - axes :])  # [batch c, d, ...]
        h = self.apply(h, first).unflatten(0, (-1, c))
        h = torch.einsum("ac,nc...->na...", left.to(x.dtype), h).flatten(0, 1)
        for m in rest:
            h = self.up(h, m)
        return h.reshape(*x.shape[:-axes], a * h.shape[1], *h.shape[2:])

    def _shape(self, v, h):
        channels = h.shape[1 - self.module.weight.dim()]
        if channels != len(v):
            v = v.repeat(channels // len(v))
        return v.view(-1, *[1] * (self.module.weight.dim() - 2))

    def columns(self, v):
        own = self.module.weight
        of_group = v.view(self.module.groups, -1).repeat_interleave(own.shape[0] // self.module.groups, 0)
        return of_group.repeat_interleave(own[0, 0].numel(), 1)

    def layout(self, w, b):
        return super().layout(w.reshape(self.module.weight.shape), b)


def tucker_form(core: Tensor, a: Tensor) -> Tensor:
    """[k, in * kernel]: the features a [k, in] of every position, then mixed by the core [k, k, kernel ...]."""
    return torch.einsum("ij...,jr->ir...", core, a).flatten(1)
