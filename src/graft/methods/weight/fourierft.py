"""FourierFT: Parameter-Efficient Fine-Tuning with Discrete Fourier Transform. Gao et al., 2024."""

from typing import Annotated

import torch
from torch import Tensor, nn

from ...core.delta import Delta, Paper
from ...core.errors import GraftError
from ...core.formats.peft import As, DottedPeft
from ...core.hyper import Range
from ...core.sparse import features_first, sparse_map


def places(site, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Rows and columns of `count` entries of a matrix [out, in]: the same for all sites of one size, and in PEFT."""
    if count > site.d_out * site.d_in:
        raise GraftError(f"count {count} is more than the {site.d_out * site.d_in} entries of {site.path}'s matrix")
    flat = torch.randperm(site.d_out * site.d_in, generator=torch.Generator().manual_seed(seed))[:count]
    return flat // site.d_in, flat % site.d_in


class FourierFT(Delta, name="fourierft"):
    """W' = W + s Re(ifft2(F)), where F [out, in] holds `value` [count] at random places and is zero elsewhere.

    On activations the matrix is not formed: y + s Re(ifft(F ifft(x))), which takes of each token two transforms and
    `count` products. `value` starts at zero, so that the adapted model starts as the base (in the paper, and by
    default in PEFT, it is drawn from a standard normal distribution). The places follow from `location_seed`, are the
    same at all sites of one size, and are not stored.
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
        self.register_buffer("rows", rows, persistent=False)
        self.register_buffer("columns", columns, persistent=False)
        self.value = nn.Parameter(torch.zeros(count))
        self.scaling = scaling

    def prepare(self, inner):
        return self.scaling * self.value, self.rows, self.columns

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
