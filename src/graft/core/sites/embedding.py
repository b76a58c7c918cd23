"""Embeddings."""

import torch
import torch.nn.functional as F
from torch import nn

from ..formed import all_in
from .linear import LinearSite


class EmbeddingSite(LinearSite, hosts=(nn.Embedding,)):
    """y = W[:, token], a linear map of one-hot inputs: W is [dim, vocabulary]. Some models scale the output."""

    kind = "embedding"
    d_out = width = property(lambda self: self.module.weight.shape[1])
    d_in = property(lambda self: self.module.weight.shape[0])
    weight = property(lambda self: self.module.weight.T)
    bias = None

    def apply(self, x, w, bias=None):
        return self.down(x, w)

    def apply_formed(self, x, form, w, bias, *tensors, pull=None):
        return self.apply(x, form(w, *all_in(w.dtype, tensors)), bias)  # a look-up keeps no matrix

    def down(self, x, a):
        h = F.embedding(x, a.T).to(self.module.weight.dtype)
        scale = getattr(self.module, "embed_scale", None)
        return h if scale is None else h * torch.as_tensor(scale, dtype=h.dtype, device=h.device)

    def kron(self, x, left, right):  # column t of P ⊗ Q is column t // d of P ⊗ column t % d of Q
        first, *rest = right
        h = F.embedding(x % first.shape[1], first.T)
        for m in rest:
            h = F.linear(h, m)
        p = self.down(x // first.shape[1], left)
        return (p.unsqueeze(-1) * h.to(p.dtype).unsqueeze(-2)).flatten(-2)

    def layout(self, w, b):
        return {"weight": w.T.contiguous()}
