"""Trainable tokens: rows of the embedding for chosen tokens, for instance those just added to the vocabulary."""

from typing import Annotated

import torch
from torch import Tensor, nn

from ...core.delta import Delta, Paper
from ...core.errors import GraftError


class Tokens(Delta, name="tokens"):
    """W'[t] = V_t for the tokens t in `tokens`: V [tokens, dim] starts as their rows of W [vocabulary, dim].

    An output head whose matrix is tied to the embedding uses the same V; one of its own, named in the targets, has a
    V of its own. Add new tokens with `resize_token_embeddings` before attaching: V is saved, the embedding is not.
    """

    papers = (
        Paper(
            "An Image is Worth One Word: Personalizing Text-to-Image Generation using Textual Inversion",
            "Gal et al.",
            2022,
            "https://arxiv.org/abs/2208.01618",
        ),
    )
    hosts = ("embedding", "linear")
    targets = "tokens"
    small = dict(tokens=(1, 3, 6))
    index: Tensor

    def __init__(self, site, shared, *, tokens: Annotated[tuple[int, ...], "ids of the tokens to train"]):
        super().__init__(site, shared)
        table = site.weight.detach() if site.kind == "linear" else site.weight.detach().T  # [vocabulary, dim]
        ids = list(tokens)
        if not ids or len({*ids}) < len(ids) or not all(type(t) is int and 0 <= t < len(table) for t in ids):
            raise GraftError(f"tokens: tokens must be different ids below {len(table)} at {site.path}, not {tokens!r}")
        ids.sort()
        self.register_buffer("index", torch.tensor(ids), persistent=False)
        self.rows = shared.first.setdefault(id(site.module.weight), nn.Parameter(table[ids].clone()))

    @classmethod
    def share(cls, sites, **hyper):
        return _Ties()

    def forward(self, inner, x):
        y, index = inner(x), self.index
        if self.site.kind == "linear":
            new = self.site.down(x, self.rows)
            if inner.bias is not None:
                new = self.site.shift(new, inner.bias[index])
            return y.index_copy(-1, index, new.to(y.dtype))
        place = torch.searchsorted(index, x).clamp(max=len(index) - 1)
        return torch.where((index[place] == x)[..., None], self.site.down(place, self.rows.T), y)

    def weight(self, w):
        wide = w.to(torch.promote_types(w.dtype, self.rows.dtype))
        if self.site.kind == "linear":
            return wide.index_copy(0, self.index, self.rows.to(wide.dtype))
        return wide.index_copy(1, self.index, self.rows.to(wide.dtype).T)


class _Ties(nn.Module):
    """The rows by the matrix they come from, so that tied hosts find them."""

    def __init__(self):
        super().__init__()
        self.first: dict[int, nn.Parameter] = {}
