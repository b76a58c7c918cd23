"""C3A: Parameter-Efficient Fine-Tuning via Circular Convolution. Chen et al., 2024."""

import math
from typing import Annotated

import torch
from torch import nn

from ...core.delta import Delta, Paper
from ...core.errors import GraftError
from ...core.formats.peft import As, DottedPeft
from ...core.hyper import Range


class _C3APeft(DottedPeft):
    def write_config(self, method, deltas, hyper):
        return super().write_config(method, deltas, {p: h | {"block": deltas[p].block} for p, h in hyper.items()})


class C3A(Delta, name="c3a"):
    """W' = W + C / in, C made of circulant blocks: C_mn[j, k] = kernel[m, n, (k - j) mod block].

    `kernel` [out / block, in / block, block] starts at zero, so that the adapted model starts as the base (PEFT draws
    it Xavier uniform by default). A change has out in / block parameters and may still have full rank.

    Many tokens meet a W' that is formed, twice, and dL/dkernel comes from transforms of x and dL/dy; beside half
    precision they meet this change alone. For few each block is a circular correlation, y_m + sum over n of
    irfft(rfft(x_n) conj(rfft(kernel_mn))) / in.
    """

    papers = (
        Paper(
            "Parameter-Efficient Fine-Tuning via Circular Convolution", "Chen et al.", 2024,
            "https://arxiv.org/abs/2407.19342",
        ),
    )  # fmt: skip
    known = (
        "Its authors report better results than LoRA and its variants at a cost in time and memory like LoRA's. PEFT's "
        "documentation advises a far larger learning rate than for other methods, such as 0.1."
    )
    hosts = ("linear",)
    passes_x = True
    small = dict(block=4)
    peft = _C3APeft(
        "C3A",
        {"kernel": As("c3a_kernel")},
        config={"block_size": "block"},
        patterns={"block_size_pattern": "block_size"},
        fixed={"bias": "none"},
        neutral=frozenset({"init_weights"}),
        hosts=("Linear",),
    )

    def __init__(
        self,
        site,
        *,
        block: Annotated[
            int | None, "side of the circulant blocks; none: the greatest common divisor of both sizes", Range(1)
        ] = None,
    ):
        super().__init__(site)
        self.block = block = block or math.gcd(site.d_in, site.d_out)
        if site.d_in % block or site.d_out % block:
            raise GraftError(
                f"c3a: block {block} must divide both sizes of {site.path}, {site.d_in} and {site.d_out}: "
                f"a divisor of {math.gcd(site.d_in, site.d_out)} does"
            )
        self.kernel = nn.Parameter(torch.zeros(site.d_out // block, site.d_in // block, block))

    def prepare(self, inner):
        with torch.autocast(self.kernel.device.type, enabled=False):
            return (torch.fft.rfft(self.kernel / self.site.d_in).conj(),)

    def forward(self, inner, x):
        y = self.formed(inner, x, _circulant, self.kernel / self.site.d_in, pull=_pulled)
        return super().forward(inner, x) if y is None else y

    def act(self, inner, x, spectrum):
        y = inner(x)
        with torch.autocast(x.device.type, enabled=False):
            wide = x.to(torch.promote_types(x.dtype, torch.float32)).unflatten(-1, (-1, self.block))
            own = torch.complex128 if wide.dtype == torch.float64 else torch.complex64
            change = _Correlation.apply(wide, spectrum.to(own))
        return y + change.flatten(-2).to(y.dtype)

    def weight(self, w):
        return _circulant(w, self.kernel / self.site.d_in)


def _circulant(w, kernel):
    """W + C."""
    m, n, block = kernel.shape
    windows = torch.cat([kernel, kernel], -1).unfold(-1, block, 1)[:, :, 1:]  # [m, n, j, k], the last row first
    blocks = w.unflatten(0, (m, block)).unflatten(-1, (n, block))
    return (blocks + windows.flip(2).transpose(1, 2)).reshape(w.shape)


def _pulled(g, x, w, kernel):
    """dL/dkernel[m, n, s] = sum over j of dL/dy_m[j] x_n[j + s], from transforms."""
    wide = torch.promote_types(x.dtype, torch.float32)
    g, x = (torch.fft.rfft(t.to(wide).unflatten(-1, (-1, kernel.shape[-1]))) for t in (g, x))
    return (torch.fft.irfft(_summed(x, g).transpose(0, 1), kernel.shape[-1]).to(kernel.dtype),)


class _Correlation(torch.autograd.Function):
    """y_m = sum over n of irfft(rfft(x_n) S_mn) [..., m, block] for x [..., n, block] and S [m, n, block // 2 + 1].

    The gradients are transforms of real features as well, where those of torch.fft are complex and of full length; no
    transform is kept for backward.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x, S):
        return torch.fft.irfft(_mixed(torch.fft.rfft(x), S), x.shape[-1])

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, *grads):
        x, S = ctx.saved_tensors
        size, dx, dS = x.shape[-1], None, None
        g = torch.fft.rfft(grads[0])
        if ctx.needs_input_grad[0]:
            dx = torch.fft.irfft(_mixed(g, S.conj().resolve_conj().transpose(0, 1)), size)
        if ctx.needs_input_grad[1]:
            share = torch.full((size // 2 + 1,), 2 / size, dtype=x.dtype, device=x.device)  # one's and its conjugate's
            share[0] = 1 / size
            if size % 2 == 0:
                share[-1] = 1 / size
            dS = _summed(*(t.reshape(-1, *t.shape[-2:]) for t in (g, torch.fft.rfft(x)))) * share
        return dx, dS


def _summed(g, h):
    """[m, n, f], the sum over tokens of g [tokens, m, f] and the conjugate of h [tokens, n, f]."""
    return torch.stack([(g * h[:, n : n + 1].conj()).sum(0) for n in range(h.shape[1])], 1)


def _mixed(h, S):
    """[..., m, f] from h [..., n, f] and S [m, n, f]."""
    if min(S.shape[:2]) > 1:
        return torch.einsum("...nf,mnf->...mf", h, S)
    return h * S[:, 0] if S.shape[1] == 1 else (h * S[0]).sum(-2, keepdim=True)
