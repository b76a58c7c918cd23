"""LT-SFT: Composable Sparse Fine-Tuning for Cross-Lingual Transfer. Ansell et al., 2022."""

from functools import partial
from typing import Annotated

from ...core import selection
from ...core.delta import Paper
from ...core.hyper import Range
from .entries import Entries


class LTSFT(Entries, name="lt_sft"):
    """W' = W + S, with S zero but at the K entries of all adapted matrices which full fine-tuning moves most.

    `value` [k], zero at first, lies at the flat positions `index` [k] in W [out, in]; the k of all matrices sum to
    K = density times their entries, and a matrix without one is left alone. The lottery ticket: the model is first
    fine-tuned as a whole, the K entries with the largest |W_tuned - W| are kept, everything goes back to W, and these
    are trained. The first phase is the statistic weight_change of `graft.collect`.

    Sparse changes of two trainings are composed by adding them: `graft.combine(model, {"task": 1, "language": 1})`, or
    both active in a chain, where a task may also be trained with a language in place.

    From the authors' code (github.com/cambridgeltl/composable-sft, lt_sft.py), where the first phase is as long as the
    second, and embeddings, biases and norms are tuned as well. Their 14,155,776 values are about 0.08 of mBERT.
    """

    papers = (
        Paper(
            "Composable Sparse Fine-Tuning for Cross-Lingual Transfer",
            "Ansell et al.",
            2022,
            "https://arxiv.org/abs/2110.07560",
        ),
    )
    known = (
        "Its authors report far better results than with adapters in zero-shot transfer between languages (Universal "
        "Dependencies, MasakhaNER, AmericasNLI), where the changes of a task and of a language are added up."
    )
    needs = ("weight_change",)
    small = dict(density=0.2)

    @classmethod
    def plan(cls, sites, hypers):
        score = partial(selection.scores, "change")
        return selection.allot(sites, score, hypers)

    def __init__(
        self,
        site,
        *,
        density: Annotated[
            float, "share of the entries of all matrices which are trained", Range(above=0, high=1)
        ] = 0.08,
    ):
        super().__init__(site)
