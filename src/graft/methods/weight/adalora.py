"""AdaLoRA: Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning. Zhang et al., 2023."""

from typing import Annotated

import torch

from ...core.delta import Paper
from ...core.errors import GraftError
from ...core.factored import Start
from ...core.formats.peft import As, Peft, zero_padded
from ...core.hyper import Range
from ...core.sensitivity import Sensitive
from .triplets import Triplets

_STEPS = 10**6  # as which PEFT gets the length of training: here phases are shares of it


class _AdaPeft(Peft):
    """PEFT divides by rank + 1e-5, keeps what was left out as zeros of e, or only the kept triplets and their places
    (`rank_pattern`), and does not save the averages of the importance."""

    def site_out(self, delta):
        rank, left = len(delta.e), delta.e * delta.keep
        return {
            "lora_A": zero_padded(delta.site, delta.Q),
            "lora_B": delta.P,
            "lora_E": (left * ((rank + 1e-5) / rank))[:, None],
        }

    def site_in(self, site, found, config):
        site_state = super().site_in(site, found, config)
        rank, pattern = config["init_r"], config.get("rank_pattern") or {}
        kept = torch.tensor(pattern.get(f"{site.path}.lora_E", [True] * rank), dtype=torch.bool)
        P, Q, e = (zero_padded(site, site_state[name]) for name in ("P", "Q", "e"))
        if len(kept) != rank or not kept.sum() == len(e) == len(Q) == P.shape[1]:
            raise GraftError(f"adalora: rank_pattern and tensors of {site.path} do not fit each other")
        state = {
            "P": P.new_zeros(len(P), rank).index_copy(1, kept.nonzero().flatten(), P),
            "Q": Q.new_zeros(rank, Q.shape[1]).index_copy(0, kept.nonzero().flatten(), Q),
            "e": e.new_zeros(rank).index_copy(0, kept.nonzero().flatten(), e.flatten() * (rank / (rank + 1e-5))),
            "keep": kept.to(e.dtype),
        }
        for name in ("P", "Q", "e"):
            state |= {f"{kind}_{name}": torch.zeros_like(state[name]) for kind in ("sensitivity", "uncertainty")}
        return state

    def write_config(self, method, deltas, hyper):
        config = super().write_config(method, deltas, hyper)
        one = next(iter(hyper.values()))
        steps = {field: round(one[name] * _STEPS) for field, name in (("tinit", "warmup"), ("tfinal", "cooldown"))}
        return config | steps | {"total_step": _STEPS}

    def read_config(self, method, config, sites, found):
        hyper = super().read_config(method, config, sites, found)
        total = config.get("total_step")
        if total:
            hyper |= {"warmup": config.get("tinit", 0) / total, "cooldown": config.get("tfinal", 0) / total}
        return hyper


class AdaLoRA(Sensitive, Triplets, name="adalora"):
    """W' = W + s P diag(e * keep) Q with s = alpha / rank.

    P [out, rank] and Q [rank, in] are random (normal, deviation 0.02) and e [rank] zero, so that the adapted model
    starts as the base. A penalty holds P and Q near orthogonality: gamma times the mean of ||P^T P - I||_F and
    ||Q Q^T - I||_F over all sites, as in the authors' code (the paper squares and sums them).

    `keep` [rank] of zeros and ones leaves the most important triplets (P[:, i], e[i], Q[i]) of all sites together.
    Their number falls along a cubic from `rank` to `target_rank` a site: it is constant for the share `warmup` of
    training, falls until the share `cooldown` is left, and is then fixed together with the choice. The importance of
    a triplet is the score of e[i] plus the mean scores of the entries of P[:, i] and of Q[i]. The score J U of an
    entry w comes from its sensitivity I = |w dL/dw|, smoothed, and the uncertainty of it,

        J <- beta1 J + (1 - beta1) I,    U <- beta2 U + (1 - beta2) |I - J|.

    A triplet left out restarts at e = 0 and still learns, so that it can come back; the choice is made at every step.
    Defaults are those of the authors' experiments (github.com/QingruZhang/AdaLoRA), where warm-up took about a tenth
    of training and the last phase about half.
    """

    papers = (
        Paper(
            "AdaLoRA: Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning",
            "Zhang et al.",
            2023,
            "https://arxiv.org/abs/2303.10512",
        ),
    )
    known = (
        "Its authors report gains over other methods in language understanding, question answering and generation, "
        "most of all where few parameters may be trained."
    )
    small = dict(rank=3, target_rank=2)
    peft = _AdaPeft(
        "ADALORA",
        {"P": As("lora_B"), "Q": As("lora_A"), "e": As("lora_E")},
        config={
            "init_r": "rank",
            "target_r": "target_rank",
            "lora_alpha": "alpha",
            "lora_dropout": "dropout",
            "beta1": "beta1",
            "beta2": "beta2",
            "orth_reg_weight": "gamma",
        },
        fixed={"bias": "none"},
        neutral=frozenset(
            {
                "r",
                "rank_pattern",
                "total_step",
                "tinit",
                "tfinal",
                "deltaT",
                "init_lora_weights",
                "loftq_config",
                "eva_config",
                "corda_config",
                "megatron_core",
                "qalora_group_size",
            }
        ),
        own=frozenset({"warmup", "cooldown", "init"}),
        refuses=lambda config: "its lora_alpha is not above zero" if config.get("lora_alpha", 8) <= 0 else None,
        hosts=("Linear", "Conv1D", "Conv2d"),
    )

    def __init__(
        self,
        site,
        *,
        rank: Annotated[int, "rank at the start, 1.5 times the target in the paper", Range(1)] = 12,
        target_rank: Annotated[int, "mean rank at the end", Range(1)] = 8,
        alpha: Annotated[float, "numerator of the scaling s"] = 16.0,
        dropout: Annotated[float, "probability of dropping an input of the update", Range(0, below=1)] = 0.0,
        warmup: Annotated[float, "share of training before ranks fall", Range(0, below=1)] = 0.1,
        cooldown: Annotated[float, "share of training after ranks are settled", Range(0, below=1)] = 0.5,
        beta1: Annotated[float, "smoothing of the sensitivity", Range(above=0, below=1)] = 0.85,
        beta2: Annotated[float, "smoothing of the uncertainty", Range(above=0, below=1)] = 0.85,
        gamma: Annotated[float, "weight of the orthogonality penalty", Range(0)] = 0.1,
        init: Start = "random",
    ):
        P, Q = 0.02 * torch.randn(site.d_out, rank), 0.02 * torch.randn(rank, site.d_in)
        super().__init__(site, P, Q, target_rank, alpha, dropout, warmup, cooldown)
        self.gamma = gamma
        self.begin(init, rank)
        self.follow(("P", "Q", "e"), beta1, beta2)

    def importance(self):
        P, Q, e = self.scores()
        return e + P.mean(0) + Q.mean(1)

    @staticmethod
    def left(phase):
        return (1 - phase) ** 3

    @classmethod
    def penalty(cls, deltas):
        return deltas[0].gamma * cls.skew(deltas)
