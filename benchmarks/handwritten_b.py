"""Layers written by hand for one method each, as a user who needs nothing else would write them."""

import torch
import torch.nn.functional as F
from torch import nn


class HRA(nn.Module):
    """Reflections in the compact WY form, on the input."""

    def __init__(self, base, rank=8):
        super().__init__()
        self.base = base
        self.U = nn.Parameter(torch.randn(base.in_features, rank // 2).repeat_interleave(2, dim=1))

    def forward(self, x):
        G = self.U.T @ self.U
        T_inverse = G.triu(1) + G.diagonal().diag() / 2
        UT = torch.linalg.solve_triangular(T_inverse, self.U, upper=True, left=False)
        return self.base(x - (x @ self.U.to(x.dtype)) @ UT.T.to(x.dtype))


class OFT(nn.Module):
    """Block-diagonal Cayley rotation of the input."""

    def __init__(self, base, block=32):
        super().__init__()
        self.base, self.block = base, block
        self.q = nn.Parameter(torch.zeros(base.in_features // block, block * (block - 1) // 2))
        self.i, self.j = torch.triu_indices(block, block, 1)

    def forward(self, x):
        Q = self.q.new_zeros(len(self.q), self.block, self.block)
        Q[:, self.i, self.j] = self.q
        Q = Q - Q.mT
        eye = torch.eye(self.block)
        R = (2 * torch.linalg.inv(eye - Q) - eye).to(x.dtype)
        y = torch.einsum("...nc,ncd->...nd", x.unflatten(-1, (-1, self.block)), R)
        return self.base(y.flatten(-2))


class Bone(nn.Module):
    """W + W D + D by blocks."""

    def __init__(self, base, block=32):
        super().__init__()
        self.base, self.block = base, block
        self.D = nn.Parameter(torch.zeros(base.out_features // block, block, block))

    def forward(self, x):
        w, D = self.base.weight, self.D.to(x.dtype)
        blocks = w.view(len(D), self.block, -1, self.block)
        moved = (blocks.flatten(1, 2) @ D).view(blocks.shape) + D[:, :, None]
        return F.linear(x, w + moved.view(w.shape), self.base.bias)


class MiSS(nn.Module):
    def __init__(self, base, rank=32):
        super().__init__()
        self.base, self.rank = base, rank
        self.D = nn.Parameter(torch.zeros(rank, base.out_features))

    def forward(self, x):
        return self.base(x) + x.unflatten(-1, (-1, self.rank)).sum(-2) @ self.D.to(x.dtype)


class SHiRA(nn.Module):
    def __init__(self, base, density=0.01):
        super().__init__()
        self.base = base
        keep = round(density * base.weight.numel())
        self.index = torch.randperm(base.weight.numel())[:keep].sort().values
        self.value = nn.Parameter(torch.zeros(keep))

    def forward(self, x):
        w = self.base.weight
        new = w.flatten().index_add(0, self.index, self.value.to(w.dtype)).view(w.shape)
        return F.linear(x, new, self.base.bias)


class IA3(nn.Module):
    """Input side where the layer narrows by more than the heads do, as in the MLP's last one."""

    def __init__(self, base):
        super().__init__()
        self.base, self.input = base, base.in_features > base.out_features
        self.l = nn.Parameter(torch.ones(base.in_features if self.input else base.out_features))

    def forward(self, x):
        return self.base(x * self.l.to(x.dtype)) if self.input else self.base(x) * self.l.to(x.dtype)


class SSF(nn.Module):
    def __init__(self, base):
        super().__init__()
        self.base = base
        self.gamma, self.beta = (
            nn.Parameter(torch.ones(base.out_features)),
            nn.Parameter(torch.zeros(base.out_features)),
        )
        if base.bias is None:
            self.beta = None

    def forward(self, x):
        y = self.base(x) * self.gamma.to(x.dtype)
        return y if self.beta is None else y + self.beta.to(x.dtype)


class LNTuning(nn.Module):
    """Llama's norm with a gain that is trained."""

    def __init__(self, base):
        super().__init__()
        self.g, self.eps = nn.Parameter(base.weight.detach().float()), base.variance_epsilon

    def forward(self, x):
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.g.to(x.dtype) * wide.to(x.dtype)


HAND = {
    "hra": HRA, "oft": OFT, "bone": Bone, "miss": MiSS, "shira": SHiRA, "ia3": IA3, "ssf": SSF, "ln_tuning": LNTuning,
}  # fmt: skip
