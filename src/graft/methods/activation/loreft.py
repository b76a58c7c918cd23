"""LoReFT: Representation Finetuning for Language Models. Wu et al., 2024."""

import inspect
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...core.delta import Edit, Paper
from ...core.errors import GraftError
from ...core.hyper import Range


class LoReFT(Edit, name="loreft"):
    """h' = h + R^T (W h + b - R h) at the `first` and the `last` tokens of the prompt, after each block.

    h [..., length, width] is the output of the block, R [rank, width] has orthonormal rows (a QR decomposition of the
    trained tensor keeps them so), W [rank, width], b [rank]. W, b start as a linear layer's, R random: not at the base.

    Tokens are counted without padding on either side, which the block's attention mask tells. When a cache holds
    earlier tokens already, the host is left as it is: in generation, the prompt alone is edited. (Without a cache
    every step is a new prompt, and its last tokens are others.) Untied, the last tokens have their own R, W and b,
    and a token that is both among the first and the last gets the edit of the last.
    """

    papers = (
        Paper(
            "ReFT: Representation Finetuning for Language Models", "Wu et al.", 2024, "https://arxiv.org/abs/2404.03592"
        ),
    )
    hosts = ("module",)
    targets = "blocks"
    starts_as_base = False
    small = dict(rank=2)

    def __init__(
        self,
        site,
        *,
        rank: Annotated[int, "dimensions of the edited subspace", Range(1)] = 8,
        first: Annotated[int, "tokens edited at the start", Range(0)] = 7,
        last: Annotated[int, "tokens edited at the end", Range(0)] = 7,
        tied: Annotated[bool, "one edit for the first and the last tokens"] = True,
        dropout: Annotated[float, "probability of dropping a feature of an edited state", Range(0, below=1)] = 0.0,
    ):
        super().__init__(site)
        if rank > site.width:
            raise GraftError(f"loreft: rank must be at most the {site.width} features of {site.path}, not {rank}")
        self.spans = [(first, last)] if tied or not (first and last) else [(first, 0), (0, last)]
        self.edits = nn.ModuleList(Subspace(site.width, rank) for _ in self.spans)
        self.dropout = dropout
        self.names = tuple(inspect.signature(type(site.module).forward).parameters)[1:]
        layers = (getattr(m, "layer_idx", None) for m in site.module.modules())
        self.layer = next((i for i in layers if i is not None), 0)

    def look(self, args, kwargs):
        """Which tokens are real [batch, length], or None where none is edited."""
        given = kwargs | dict(zip(self.names, args))
        cache = next((a for a in given.values() if hasattr(a, "get_seq_length")), None)
        if cache is not None and cache.get_seq_length(self.layer):
            return (None,)
        x = args[0] if args else kwargs["hidden_states"]
        mask = next((m for m in (given.get("attention_mask"), given.get("mask")) if isinstance(m, Tensor)), None)
        real = x.new_ones(x.shape[:-1], dtype=torch.bool) if mask is None else _real(mask, x)
        return (real.expand(x.shape[:-1]),)

    def edit(self, h, x, real):
        if real is None:
            return h
        base, rank = h, real.cumsum(-1)  # 1 at the first real token
        count = rank[..., -1:]
        for (first, last), subspace in zip(self.spans, self.edits):
            at = real & ((rank <= first) | (rank > count - last))
            edited = subspace(base)
            edited = F.dropout(edited, self.dropout, self.training) if self.dropout else edited
            h = torch.where(at[..., None], edited, h)
        return h


class Subspace(nn.Module):
    """h + R^T (W h + b - R h)."""

    def __init__(self, width: int, rank: int):
        super().__init__()
        self.rows = nn.Parameter(nn.init.orthogonal_(torch.empty(rank, width)))
        self.source = nn.Linear(width, rank)

    def basis(self) -> Tensor:
        """R: the rows themselves where they are orthonormal."""
        with torch.autocast(self.rows.device.type, enabled=False):
            Q, U = torch.linalg.qr(self.rows.T)  # in float32 or float64: there is no QR in half precision
            return (Q * U.diagonal().sign()).T

    def forward(self, h: Tensor) -> Tensor:
        R = self.basis().to(h.dtype)
        source = F.linear(h, self.source.weight.to(h.dtype), self.source.bias.to(h.dtype))
        return h + ((source - F.linear(h, R)) @ R).to(h.dtype)


def _real(mask: Tensor, h: Tensor) -> Tensor:
    """Which tokens are not padding [batch, length], from a mask [batch, keys] or [batch, 1, queries, keys].

    A token that is none may see itself, whatever else the mask is for (order, a window).
    """
    length = h.shape[-2]
    if mask.dim() == 4:
        mask = mask[:, 0, :, :length].expand(-1, length, -1).diagonal(dim1=1, dim2=2)
        return mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    return mask[:, :length].bool()
