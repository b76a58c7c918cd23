"""Layers as one would write them by hand for nn.Linear: what a method's cost is compared with.

Each takes the frozen layer, keeps float32 parameters and computes in the dtype of the input, like the library does.
"""

import functools

import torch
import torch.nn.functional as F
from torch import nn


class Layer(nn.Module):
    def __init__(self, base: nn.Linear):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.d_out, self.d_in = base.weight.shape


class LoRA(Layer):
    def __init__(self, base, rank=8, alpha=16.0, dropout=0.0):
        super().__init__(base)
        self.A = nn.Parameter(torch.randn(rank, self.d_in) / self.d_in**0.5)
        self.B = nn.Parameter(torch.zeros(self.d_out, rank))
        self.scaling, self.drop = alpha / rank, nn.Dropout(dropout)

    def forward(self, x):
        h = F.linear(self.drop(x), self.A.to(x.dtype)) * self.scaling
        return self.base(x) + F.linear(h, self.B.to(x.dtype))


class DoRA(LoRA):
    """The row norms in closed form; the output is rescaled."""

    def __init__(self, base, **kw):
        super().__init__(base, **kw)
        self.m = nn.Parameter(base.weight.float().norm(dim=1))

    def forward(self, x):
        y = super().forward(x)
        with torch.no_grad():
            w, b = self.base.weight, self.scaling * self.B
            cross = 2 * (w @ self.A.T.to(w.dtype)) + b @ (self.A @ self.A.T)
            norm = (w.norm(dim=1, dtype=torch.float32).square() + (cross * b).sum(1)).sqrt()
        gain = (self.m / norm - 1).to(y.dtype)
        return y + gain * (y if self.base.bias is None else y - self.base.bias)


@functools.cache
def projections(rank, size=4096):
    """VeRA's A [rank, size] and B [size, rank], the same for all layers."""
    return torch.randn(rank, size) / size**0.5, torch.randn(size, rank) / rank**0.5


class VeRA(Layer):
    def __init__(self, base, rank=256):
        super().__init__(base)
        for name, values in zip("AB", projections(rank)):
            self.register_buffer(name, values, persistent=False)
        self.d = nn.Parameter(torch.full((rank,), 0.1))
        self.b = nn.Parameter(torch.zeros(self.d_out))

    def forward(self, x):
        h = F.linear(x, self.A[:, : self.d_in].to(x.dtype)) * self.d.to(x.dtype)
        return self.base(x) + F.linear(h, self.B[: self.d_out].to(x.dtype)) * self.b.to(x.dtype)


class LoHa(Layer):
    """The Hadamard product of two products of rank r as one product of rank r^2."""

    def __init__(self, base, rank=8, alpha=8.0):
        super().__init__(base)
        self.A1, self.A2 = (nn.Parameter(torch.randn(rank, self.d_in)) for _ in range(2))
        self.B1, self.B2 = (nn.Parameter(0.1 * torch.randn(self.d_out, rank)) for _ in range(2))
        self.scaling = alpha / rank

    def forward(self, x):
        A = (self.A1[:, None] * self.A2[None]).flatten(0, 1).to(x.dtype)
        B = (self.scaling * self.B1[:, :, None] * self.B2[:, None]).flatten(1).to(x.dtype)
        return self.base(x) + F.linear(F.linear(x, A), B)


class LoKr(Layer):
    """x as a matrix: y + s W1 X (B2 A2)^T."""

    def __init__(self, base, rank=8, alpha=8.0):
        super().__init__(base)
        (a, b), (c, d) = (self.nearest_to_a_square(size) for size in (self.d_out, self.d_in))
        self.W1 = nn.Parameter(torch.randn(a, c) / c**0.5)
        self.A2 = nn.Parameter(torch.zeros(rank, d))
        self.B2 = nn.Parameter(torch.randn(b, rank) / rank**0.5)
        self.c, self.scaling = c, alpha / rank

    @staticmethod
    def nearest_to_a_square(size):
        return next((m, size // m) for m in range(int(size**0.5), 0, -1) if size % m == 0)

    def forward(self, x):
        h = F.linear(x.unflatten(-1, (self.c, -1)), self.A2.to(x.dtype))
        h = F.linear(h.transpose(-1, -2), (self.scaling * self.W1).to(x.dtype)).transpose(-1, -2)
        return self.base(x) + F.linear(h, self.B2.to(x.dtype)).flatten(-2)


class AdaLoRA(Layer):
    def __init__(self, base, rank=12, alpha=16.0):
        super().__init__(base)
        self.P = nn.Parameter(0.02 * torch.randn(self.d_out, rank))
        self.Q = nn.Parameter(0.02 * torch.randn(rank, self.d_in))
        self.e = nn.Parameter(torch.zeros(rank))
        self.register_buffer("keep", torch.ones(rank))
        self.scaling = alpha / rank

    def forward(self, x):
        e = (self.scaling * self.e * self.keep).to(x.dtype)
        return self.base(x) + F.linear(F.linear(x, self.Q.to(x.dtype)) * e, self.P.to(x.dtype))


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
    "lora": LoRA,
    "lora, dropout": functools.partial(LoRA, dropout=0.1),
    "dora": DoRA,
    "vera": VeRA,
    "loha": LoHa,
    "lokr": LoKr,
    "adalora": AdaLoRA,
    "hra": HRA,
    "oft": OFT,
    "bone": Bone,
    "miss": MiSS,
    "shira": SHiRA,
    "ia3": IA3,
    "ssf": SSF,
    "ln_tuning": LNTuning,
}
