"""WaveFT: Exploring Sparsity for Parameter Efficient Fine Tuning Using Wavelets. Bilican et al., 2025."""

import functools
import math
from itertools import zip_longest
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...core.delta import Delta, Paper
from ...core.errors import GraftError
from ...core.formats.peft import UNREAD, As, Peft
from ...core.hyper import Range
from ...core.recipe import ByPath
from ...core.sparse import features_first, placed, pulled, sparse_map
from .fourierft import places

MOST = 8  # entries of W for each that changes: with more that change, their gradients cost as much as all


class _WavePeft(Peft):
    """With `proportional_parameters` PEFT has counts of its own, which the tensors tell; it draws the places again."""

    def write_config(self, method, deltas, hyper):
        config = super().write_config(method, deltas, hyper)
        return config | {"wavelet_family": f"db{config['wavelet_family']}"}

    def read_config(self, method, config, sites, found):
        family = config.get("wavelet_family", "db1")
        if not family.startswith("db") or not 1 <= int(family[2:]) <= 10:
            raise GraftError(f"{UNREAD}: waveft has Daubechies' wavelets db1 to db10, not {family!r}")
        hyper = super().read_config(method, config | {"wavelet_family": int(family[2:])}, sites, found)
        counts = {path: found[path]["waveft_spectrum"].numel() for path in sites if "waveft_spectrum" in found[path]}
        return hyper | {"count": ByPath(counts)}


@functools.cache
def daubechies(moments: int) -> tuple[float, ...]:
    """The low-pass filter [2 moments] of Daubechies' orthogonal wavelet of extremal phase, the largest values first.

    Its polynomial is (1 + z)^moments times the factor, with roots inside the unit circle, of the trigonometric
    polynomial sum over k < moments of binomial(moments - 1 + k, k) y^k, y = (2 - z - 1/z) / 4 (Daubechies, 1988).
    """
    f64 = torch.float64
    ys = torch.zeros(0, dtype=torch.complex128)
    if moments > 1:
        series = torch.tensor([math.comb(moments - 1 + k, k) for k in range(moments)], dtype=f64)
        companion = torch.diag(torch.ones(moments - 2, dtype=f64), -1)
        companion[:, -1] = -series[:-1] / series[-1]
        ys = torch.linalg.eigvals(companion)
    middle = 1 - 2 * ys
    root = (middle**2 - 1).sqrt()
    inside = torch.where((middle - root).abs() < 1, middle - root, middle + root)
    filter = torch.ones(1, dtype=torch.complex128)
    for z in [*torch.full((moments,), -1.0, dtype=f64), *inside]:
        filter = F.pad(filter, (0, 1)) - z * F.pad(filter, (1, 0))
    return tuple((filter.real * math.sqrt(2) / filter.real.sum()).tolist())


class WaveFT(Delta, name="waveft"):
    """W' = W + s R_out S R_in^T: S holds `value` [count] at random places and is zero elsewhere, and R synthesises
    from wavelet coefficients (one level, Daubechies' wavelet with `moments` vanishing moments).

    R [n, p] maps p = n + 2 moments - 2 coefficients (one more for odd n) to n values; with Haar's wavelet (one moment)
    and an even n it is orthogonal. `value` starts at zero, so that the adapted model starts as the base. The places
    follow from `location_seed`, are the same at all sites of one size, and are not stored.

    A coefficient changes a block of 2 moments rows and columns of W: many tokens meet a W' formed so, twice, with
    gradients at these entries only, or this change alone beside half precision. For few y + s R_out S (R_in^T x) forms
    no matrix.
    """

    papers = (
        Paper(
            "Exploring Sparsity for Parameter Efficient Fine Tuning Using Wavelets",
            "Bilican et al.",
            2025,
            "https://arxiv.org/abs/2505.12532",
        ),
    )
    known = (
        "Its authors report better results than LoRA and other methods in personalised image generation with Stable "
        "Diffusion XL, above all with very few parameters."
    )
    hosts = ("linear",)
    passes_x = True
    small = dict(count=20)
    index: Tensor | None
    entry: Tensor
    taps: Tensor
    peft = _WavePeft(
        "WAVEFT",
        {"value": As("waveft_spectrum")},
        config={
            "n_frequency": "count",
            "scaling": "scaling",
            "random_loc_seed": "location_seed",
            "wavelet_family": "moments",
        },
        patterns={"n_frequency_pattern": "n_frequency"},
        fixed={"bias": "none", "use_idwt": True},
        neutral=frozenset({"proportional_parameters", "init_weights"}),
        hosts=("Linear", "Conv1D"),
    )
    rows: Tensor
    columns: Tensor

    def __init__(
        self,
        site,
        *,
        count: Annotated[int, "wavelet coefficients that are trained", Range(1)] = 2592,
        scaling: Annotated[float, "the scaling s"] = 25.0,
        moments: Annotated[int, "vanishing moments of the wavelet; 1 is Haar's", Range(1, 10)] = 1,
        location_seed: Annotated[int, "seed of the places of these coefficients", Range(0)] = 777,
    ):
        super().__init__(site)
        rows, columns = places(site, count, location_seed)
        padding = moments - 1  # before and after the places of the coefficients
        rows, columns = rows + padding, columns + padding
        half_out, half_in = coefficients(site.d_out, moments) // 2, coefficients(site.d_in, moments) // 2
        low_row, low_column = rows < half_out, columns < half_in
        # As in PEFT, the right half holds what is high-pass along rows of W, the lower half along its columns.
        rows = rows % half_out + half_out * ~low_column
        columns = columns % half_in + half_in * ~low_row
        self.register_buffer("rows", rows, persistent=False)
        self.register_buffer("columns", columns, persistent=False)
        self.value = nn.Parameter(torch.zeros(count))
        self.scaling, self.low = scaling, daubechies(moments)
        few = MOST * count * len(self.low) ** 2 <= site.d_out * site.d_in
        made = _blocks(rows, columns, site, self.low) if few else ()
        for name, t in zip_longest(("index", "entry", "taps"), made):
            self.register_buffer(name, t, persistent=False)

    def prepare(self, inner):
        return self.scaling * self.value, self.rows, self.columns

    def forward(self, inner, x):
        y = None
        if self.index is not None:
            shares = (self.scaling * self.value[:, None] * self.taps).flatten()
            entries = shares.new_zeros(len(self.index)).index_add(0, self.entry.flatten(), shares)
            y = self.formed(inner, x, placed, entries, self.index, pull=pulled)
        return super().forward(inner, x) if y is None else y

    def act(self, inner, x, value, rows, columns):
        y = inner(x)
        with torch.autocast(x.device.type, enabled=False):
            wide = x.to(torch.promote_types(x.dtype, torch.float32))
            size = coefficients(self.site.d_out, len(self.low) // 2)
            h = analysed(features_first(wide), self.low)
            h = sparse_map(h, value.to(wide.dtype), rows, columns, size)
            change = synthesised(h, self.site.d_out, self.low).T
        return y + change.to(y.dtype).reshape(y.shape)

    def weight(self, w):
        shape = [coefficients(n, len(self.low) // 2) for n in w.shape]
        spectrum = self.value.new_zeros(shape).index_put((self.rows, self.columns), self.scaling * self.value)
        along = synthesised(spectrum, w.shape[0], self.low)
        return w + synthesised(along.T, w.shape[1], self.low).T


def coefficients(size: int, moments: int) -> int:
    """How many coefficients give `size` values."""
    return size + size % 2 + 2 * (moments - 1)


def _blocks(rows, columns, site, low) -> tuple[Tensor, Tensor, Tensor]:
    """Which entries of W change (flat, rising), and for every coefficient which of them [count, (2 moments)^2], and by
    how much for each unit of the coefficient.
    """
    (i, out), (j, into) = _column(rows, site.d_out, low), _column(columns, site.d_in, low)
    index, entry = (i[:, :, None] * site.d_in + j[:, None]).flatten(1).unique(return_inverse=True)
    return index, entry.int(), (out[:, :, None] * into[:, None]).flatten(1)


def _column(numbers: Tensor, size: int, low: tuple[float, ...]) -> tuple[Tensor, Tensor]:
    """Places in the columns `numbers` [k] of R, all others being zero, and the values there: [k, 2 moments] each."""
    half, taps = coefficients(size, len(low) // 2) // 2, torch.tensor([low, _high(low)], dtype=torch.float64)
    places = 2 * (numbers % half)[:, None] + torch.arange(len(low)) - (len(low) - 2)
    values = taps[(numbers >= half).long()] * ((places >= 0) & (places < size))
    return places.clamp(0, size - 1), values


def _high(low: tuple[float, ...]) -> list[float]:
    """The high-pass filter that belongs to a low-pass one."""
    return [(-1) ** i * value for i, value in enumerate(reversed(low))]


def synthesised(h: Tensor, size: int, low: tuple[float, ...]) -> Tensor:
    """R h [size, tokens] for the coefficients h [p, tokens], the low-pass half first."""
    lows, highs = h.chunk(2)
    high, last, half = _high(low), len(low) // 2 - 1, (size + 1) // 2
    values = []
    for s in (0, 1):  # at even and at odd places
        value = lows.new_zeros(())
        for m in range(last + 1):
            t = 2 * (last - m) + s
            value = value + low[t] * lows[m : m + half] + high[t] * highs[m : m + half]
        values.append(value)
    return torch.stack(values, 1).flatten(0, 1)[:size]


def analysed(x: Tensor, low: tuple[float, ...]) -> Tensor:
    """R^T x [p, tokens], the transpose of `synthesised`."""
    size, margin = len(x), len(low) - 2
    even, odd = F.pad(x, (0, 0, margin, margin + size % 2)).unflatten(0, (-1, 2)).unbind(1)
    count = len(even) - margin // 2
    values = []
    for taps in (low, _high(low)):
        value = x.new_zeros(())
        for m in range(len(low) // 2):
            value = value + taps[2 * m] * even[m : m + count] + taps[2 * m + 1] * odd[m : m + count]
        values.append(value)
    return torch.cat(values)
