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


HAND = {
    "lora": LoRA,
    "lora, dropout": functools.partial(LoRA, dropout=0.1),
    "dora": DoRA,
    "vera": VeRA,
    "loha": LoHa,
    "lokr": LoKr,
    "adalora": AdaLoRA,
}
