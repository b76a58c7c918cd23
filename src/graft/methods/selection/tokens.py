"""Trainable tokens: rows of the embedding for chosen tokens, for instance those just added to the vocabulary."""

from typing import Annotated

import torch
from torch import Tensor, nn

from ...core.delta import Delta, Paper
from ...core.errors import GraftError
from ...core.formats.peft import OWN, As, Peft
from ...core.host import base_modules


class _TokensPeft(Peft):
    """PEFT keeps rows in the order of `token_indices`, and those of a tied head only with the embedding's."""

    def chosen(self, adapter):
        own = super().chosen(adapter)
        tables = {id(d.site.module.weight): path for path, d in own.items() if d.site.kind == "embedding"}
        for path, module in base_modules(adapter.model).items():
            if table := tables.get(id(getattr(module, "weight", None))):
                if path not in own:
                    raise GraftError(
                        f"PEFT trains the rows of {path} with those of {table}, which it is tied to: {OWN}"
                    )
                if path != table:
                    del own[path]
        if biased := [p for p, d in own.items() if d.site.kind == "linear" and d.site.bias is not None]:
            raise GraftError(f"PEFT leaves out the bias of {biased[0]}: {OWN}")
        return own

    def write_config(self, method, deltas, hyper):
        ids = {tuple(d.index.tolist()) for d in deltas.values()}
        if len(ids) > 1:
            raise GraftError(
                f"PEFT's TRAINABLE_TOKENS has one token_indices for all modules, this adapter several: {OWN}"
            )
        return super().write_config(method, deltas, hyper) | {"token_indices": list(ids.pop())}

    def read_config(self, method, config, sites, found):
        return super().read_config(method, config, sites, found) | {"tokens": tuple(config.get("token_indices") or ())}

    def site_in(self, site, found, config):
        order = torch.tensor(config["token_indices"]).argsort()
        rows = super().site_in(site, found, config)["rows"]
        return {"rows": rows[order] if len(rows) == len(order) else rows}

    def read(self, method, model, config, tensors):
        recipe, paths, heads, state = super().read(method, model, config, tensors)
        modules = base_modules(model)
        for path in list(paths):
            for other, module in modules.items():
                if other not in paths and getattr(module, "weight", None) is modules[path].weight:
                    paths.append(other)
                    state[f"{other}:rows"] = state[f"{path}:rows"]
        return recipe, paths, heads, state


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
    known = (
        "Its authors report that one new word vector, learnt from 3 to 5 images, suffices for an object or a style in "
        "a text-to-image model."
    )
    hosts = ("embedding", "linear")
    targets = "tokens"
    brings_rows = True
    passes_x = True
    small = dict(tokens=(1, 3, 6))
    peft = _TokensPeft(
        "TRAINABLE_TOKENS",
        {"rows": As("trainable_tokens_delta")},
        neutral=frozenset({"token_indices", "init_weights"}),
        own=frozenset({"tokens"}),
        heads=False,
        hosts=("Embedding", "Linear"),
    )
    index: Tensor

    def __init__(self, site, shared, *, tokens: Annotated[tuple[int, ...], "ids of the tokens to train"]):
        super().__init__(site, shared)
        table = site.weight.detach() if site.kind == "linear" else site.weight.detach().T  # [vocabulary, dim]
        ids = list(tokens)
        if not ids or len({*ids}) < len(ids) or not all(type(t) is int and 0 <= t < len(table) for t in ids):
            raise GraftError(f"tokens: tokens must be different ids below {len(table)} at {site.path}, not {tokens!r}")
        ids.sort()
        self.register_buffer("index", torch.tensor(ids), persistent=False)
        own = site.module._parameters.get("weight", site.module)  # codes may be no parameter: such a head is not tied
        self.rows = shared.first.setdefault(id(own), nn.Parameter(table[ids].clone()))

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
