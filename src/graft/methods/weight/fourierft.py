"""FourierFT: Parameter-Efficient Fine-Tuning with Discrete Fourier Transform. Gao et al., 2024."""

from typing import Annotated

import torch
from torch import Tensor, nn

from ...core.delta import Delta, Paper
from ...core.errors import GraftError
from ...core.formats.peft import As, DottedPeft
from ...core.hyper import Range
from ...core.sparse import features_first, sampled, sparse_map


def places(site, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Rows and columns of `count` entries of a matrix [out, in]: the same for all sites of one size, and in PEFT."""
    if count > site.d_out * site.d_in:
        raise GraftError(f"count {count} is more than the {site.d_out * site.d_in} entries of {site.path}'s matrix")
    flat = torch.randperm(site.d_out * site.d_in, generator=torch.Generator().manual_seed(seed))[:count]
    return flat // site.d_in, flat % site.d_in


class FourierFT(Delta, name="fourierft"):
    """W' = W + s Re(ifft2(F)), where F [out, in] holds `value` [count] at random places and is zero elsewhere.

    `value` starts at zero, so that the adapted model starts as the base (in the paper, and by default in PEFT, it is
    drawn from a standard normal distribution). The places follow from `location_seed`, are the same at all sites of one
    size, and are not stored.

    Many tokens meet a W' that is made by transforms of half of F, twice, and dL/dvalue comes from transforms of x and
    dL/dy; beside half precision they meet this change alone. For few y + s Re(ifft(F ifft(x))) forms no matrix: two
    transforms of each token, and `count` products.
    """

    papers = (
        Paper(
            "Parameter-Efficient Fine-Tuning with Discrete Fourier Transform",
            "Gao et al.",
            2024,
            "https://arxiv.org/abs/2405.03003",
        ),
    )
    known = (
        "Its authors report results comparable to LoRA's or better with far fewer parameters: 0.064 million against "
        "33.5 million in instruction tuning of LLaMA2-7B."
    )
    hosts = ("linear",)
    passes_x = True
    small = dict(count=20)
    peft = DottedPeft(
        "FOURIERFT",
        {"value": As("fourierft_spectrum")},
        config={"n_frequency": "count", "scaling": "scaling", "random_loc_seed": "location_seed"},
        patterns={"n_frequency_pattern": "n_frequency"},
        fixed={"bias": "none"},
        neutral=frozenset({"init_weights"}),
        hosts=("Linear", "Conv1D"),
    )
    rows: Tensor
    columns: Tensor
    spots: Tensor
    shares: Tensor
    index: Tensor
    entry: Tensor
    signs: Tensor

    def __init__(
        self,
        site,
        *,
        count: Annotated[int, "entries of the spectrum that are trained", Range(1)] = 1000,
        scaling: Annotated[float, "the scaling s; the paper takes up to 300, for large models"] = 150.0,
        location_seed: Annotated[int, "seed of the places of these entries", Range(0)] = 777,
    ):
        super().__init__(site)
        rows, columns = places(site, count, location_seed)
        halved, folded = (make(rows, columns, site.d_out, site.d_in) for make in (_halved, _folded))
        for name, t in ({"rows": rows, "columns": columns} | halved | folded).items():
            self.register_buffer(name, t, persistent=False)
        self.value = nn.Parameter(torch.zeros(count))
        self.scaling = scaling

    def prepare(self, inner):
        return self.scaling * self.value, self.rows, self.columns

    def forward(self, inner, x):
        given = self.scaling * self.value, self.spots, self.shares, self.index, self.entry, self.signs
        y = self.formed(inner, x, _waved, *given, pull=_pulled)
        return super().forward(inner, x) if y is None else y

    def act(self, inner, x, value, rows, columns):
        y = inner(x)
        with torch.autocast(x.device.type, enabled=False):
            wide = x.to(torch.promote_types(x.dtype, torch.float32))
            # [in, tokens]; real and imaginary parts as if they were tokens, since the entries are real
            h = torch.view_as_real(features_first(torch.fft.ifft(wide).resolve_conj())).flatten(1)
            h = sparse_map(h, value.to(wide.dtype), rows, columns, self.site.d_out)
            change = torch.fft.ifft(torch.view_as_complex(h.unflatten(1, (-1, 2))).T).real
        return y + change.to(y.dtype).reshape(y.shape)

    def weight(self, w):
        spectrum = self.value.new_zeros(w.shape).index_put((self.rows, self.columns), self.value)
        return w + self.scaling * torch.fft.ifft2(spectrum).real


def _halved(rows: Tensor, columns: Tensor, out: int, width: int) -> dict[str, Tensor]:
    """Re(ifft2(F)) is the inverse transform of half of F and half of its mirror image at the origin.

    `spots` [2 count] of the entries themselves and of their mirror images in the columns up to width // 2, a transposed
    half spectrum [width // 2 + 1, out] with rows turned about, for a forward transform where the inverse one is meant,
    and their `shares`, 0 for those that lie in the other half.
    """
    i, j = torch.cat([-rows % out, rows]), torch.cat([columns, -columns % width])
    inside = j <= width // 2
    return {"spots": torch.where(inside, j * out + i, 0), "shares": inside / 2}


def _waved(w, value, spots, shares, *_):
    """W + Re(ifft2(F))."""
    out, width = w.shape
    shares = (value.repeat(2) * shares).to(torch.promote_types(w.dtype, torch.float32))
    spectrum = shares.new_zeros((width // 2 + 1) * out).index_add(0, spots, shares)
    # The transform of real columns is needed to the half; what follows is the same turned about the origin.
    half = torch.fft.rfft(spectrum.view(-1, out), norm="forward").mT.contiguous()
    upper = torch.fft.irfft(half, width)
    lower = upper[1 : (out + 1) // 2].flip(0, 1)
    new = upper.new_empty(w.shape).copy_(w)
    new[: len(upper)] += upper
    new[len(upper) :, :1] += lower[:, -1:]
    new[len(upper) :, 1:] += lower[:, :-1]
    return new.to(w.dtype)


def _folded(rows: Tensor, columns: Tensor, out: int, width: int) -> dict[str, Tensor]:
    """Where in a matrix [2 (out // 2 + 1), 2 (width // 2 + 1)], of real and imaginary parts by turns, the two terms of
    the real parts of products of two half spectra lie: `index`, rising, of which each value has two, `entry`
    [2, count], the second one with a sign.
    """
    i, j = torch.minimum(rows, out - rows), torch.minimum(columns, width - columns)
    flat = 4 * (width // 2 + 1) * i + 2 * j
    index, entry = torch.stack([flat, flat + 2 * (width // 2 + 1) + 1]).unique(return_inverse=True)
    return {"index": index, "entry": entry, "signs": torch.where((i == rows) == (j == columns), -1.0, 1.0)}


def _pulled(g, x, w, value, spots, shares, index, entry, signs):
    """dL/dvalue = Re(fft(dL/dy)^T fft(x)) at the entries / (out in), in half spectra."""
    wide = torch.promote_types(x.dtype, torch.float32)
    g, x = (torch.view_as_real(torch.fft.rfft(t.to(wide))).flatten(1) for t in (g, x))
    real, imaginary = sampled(g, x, index)[entry]
    return ((real + signs * imaginary) / w.numel()).to(value.dtype), None, None, None, None, None
