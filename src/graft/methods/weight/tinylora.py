"""TinyLoRA: Learning to Reason in 13 Parameters. Morris et al., 2026."""

from typing import Annotated

import torch
from torch import Tensor, nn

from ...core.delta import Delta, Paper
from ...core.errors import GraftError
from ...core.formats.peft import OWN, UNREAD, As, Peft
from ...core.hyper import Range

_SHARED = "base_model.tinylora_v"


class _TinyPeft(Peft):
    """PEFT has one tensor for the vector of each group, and stores U, V and P, which here are found again."""

    def write(self, adapter):
        config, tensors = super().write(adapter)
        ties = {adapter.recipe.at(d.site)["tying"] for d in self.chosen(adapter).values()}
        if len(ties) > 1:
            raise GraftError(f"PEFT's TINYLORA has one weight_tying for all modules, this adapter several: {OWN}")
        vectors = tensors.pop(_SHARED)
        return config | {"save_projection": True}, tensors | {f"{_SHARED}.{i}": v for i, v in enumerate(vectors)}

    def site_out(self, delta):
        return {"tinylora_A": delta.V, "tinylora_B": delta.U, "tinylora_P": delta.P}

    def read(self, method, model, config, tensors):
        groups = [f"{_SHARED}.{i}" for i in range(sum(key.startswith(f"{_SHARED}.") for key in tensors))]
        if not groups or any(key not in tensors for key in groups):
            raise GraftError(f"{UNREAD}: it lacks the vectors of its groups, {_SHARED}.0 and so on")
        rest = {key: value for key, value in tensors.items() if key not in groups}
        return super().read(method, model, config, rest | {_SHARED: torch.stack([tensors[key] for key in groups])})

    def read_config(self, method, config, sites, found):
        if any("tinylora_P" not in tensors for tensors in found.values()):
            raise GraftError(f"{UNREAD}: it lacks its projections: save it with save_projection=True")
        return super().read_config(method, config, sites, found) | {"save_projection": True}


class TinyLoRA(Delta, name="tinylora"):
    """W' = W + U R V with R = sum over i of v_i P_i: a vector v [count] is all that is trained.

    U [out, rank] and V [rank, in] are the left and right singular vectors of the largest singular values of W, each
    times the square root of its value, P [count, rank, rank] is random (normal, of deviation rank^-1/2), and all three
    are frozen. v starts at zero, so that the adapted model starts as the base. The sites form
    max(1, round(sites (1 - tying))) groups of neighbours which share one v: with tying = 1 the whole model has `count`
    parameters. U, V and P are not stored but found again: from the base, singular vectors with the sign that makes the
    largest entry of the left one positive, and from `projection_seed` plus the number of the site.
    Formula and defaults are those of PEFT's implementation, which notes that the paper leaves P's distribution open.
    """

    papers = (
        Paper(
            "Learning to Reason in 13 Parameters",
            "Morris, Mireshghallah, Ibrahim, Mahloujifar",
            2026,
            "https://arxiv.org/abs/2602.04118",
        ),
    )
    known = (
        "Its authors report 91 % on GSM8K with 13 trained numbers in an 8B model of Qwen2.5, by reinforcement "
        "learning. Supervised fine-tuning needs 100 to 1000 times more for the same result."
    )
    hosts = ("linear",)
    passes_x = True
    by_factors = True
    small = dict(count=3)
    peft = _TinyPeft(
        "TINYLORA",
        {"V": As("tinylora_A"), "U": As("tinylora_B"), "P": As("tinylora_P")},
        shared={"v": As("tinylora_v")},
        config={"r": "rank", "u": "count", "weight_tying": "tying", "projection_seed": "projection_seed"},
        fixed={"bias": "none"},
        neutral=frozenset({"save_projection", "init_v_bound", "init_weights", "tinylora_dropout"}),
        own=frozenset({"save_projection"}),
        hosts=("Linear", "Conv1D"),
    )
    U: Tensor
    V: Tensor
    P: Tensor

    @classmethod
    def share(cls, sites, *, count, tying, **_):
        shared = nn.Module()
        shared.v = nn.Parameter(torch.zeros(max(1, round(len(sites) * (1 - tying))), count))
        return shared

    def __init__(
        self,
        site,
        shared,
        *,
        rank: Annotated[int, "singular triplets that are kept", Range(1)] = 2,
        count: Annotated[int, "length of v", Range(1)] = 64,
        tying: Annotated[float, "from 0, each site has its v, to 1, all share one", Range(0, 1)] = 0.0,
        projection_seed: Annotated[int, "seed of P", Range(0)] = 42,
        save_projection: Annotated[bool, "save U, V and P; else they are found again from base and seed"] = False,
    ):
        super().__init__(site, shared)
        groups, length = shared.v.shape
        if length != count or groups != max(1, round(site.count * (1 - tying))):
            raise GraftError(f"tinylora: count and tying must be the same at all sites, which share v: {site.path}")
        self.group = min(site.index // max(1, site.count // groups), groups - 1)
        rank = min(rank, site.d_in, site.d_out)
        U, V = torch.empty(site.d_out, rank), torch.empty(rank, site.d_in)
        if not site.saved or "U" not in site.saved:
            left, values, right = torch.linalg.svd(site.weight.detach().float().cpu(), full_matrices=False)
            left, right, root = left[:, :rank], right[:rank], values[:rank].sqrt()
            sign = left.gather(0, left.abs().argmax(0, keepdim=True)).sign()
            U, V = sign * left * root, sign.T * right * root[:, None]
        generator = torch.Generator().manual_seed(projection_seed + site.index)
        P = torch.randn(count, rank, rank, generator=generator) / rank**0.5
        for name, value in (("U", U), ("V", V), ("P", P)):
            self.register_buffer(name, value.contiguous(), persistent=save_projection)

    def factors(self):
        return torch.einsum("i,ijk->jk", self.shared.v[self.group], self.P) @ self.V, self.U

    def prepare(self, inner):
        return self.factors()

    def act(self, inner, x, A, B):
        return self.site.add_up(inner(x), self.site.down(x, A), B)

    def weight(self, w):
        A, B = self.factors()
        return w + B @ A
