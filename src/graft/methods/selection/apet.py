"""APET: Exploring the Impact of Model Scaling on Parameter-efficient Tuning. Su et al., 2023."""

from typing import Annotated

from ...core import selection
from ...core.delta import Paper
from ...core.hyper import Range
from .entries import Entries


class APET(Entries, name="apet"):
    """W' = W + S, with S zero but at `parameters` entries drawn at random from all adapted matrices together.

    `value` [k], zero at first, lies at the flat positions `index` [k] in W [out, in]. The arbitrary module: any number
    of parameters at any positions, however the matrices are divided. It is the baseline for every other choice, and
    with numbers from one on a meter of how few a task takes. The positions come from the adapter's seed, and are not
    saved.

    The paper, first called "Arbitrary Few Parameters are Good Enough for Adapting Large-scale Pre-trained Language
    Models", could be read to its introduction. The authors' code (github.com/yushengsu-thu/PET_Scaling) draws whole
    tensors of the base, and whole LoRA and adapter modules beside them, until the number is reached; single entries, as
    here, are what its text says: any number of parameters distributed in arbitrary positions.
    """

    papers = (
        Paper(
            "Exploring the Impact of Model Scaling on Parameter-efficient Tuning",
            "Su et al.",
            2023,
            "https://arxiv.org/abs/2306.02320",
        ),
    )
    known = (
        "Its authors report that the larger a language model, the less it matters which of its parameters are trained: "
        "at tens of billions nearly all methods equal full fine-tuning, while in small models they differ."
    )
    small = dict(parameters=9)

    @classmethod
    def plan(cls, sites, hypers):
        return selection.share_at_random(sites, max(one["parameters"] for one in hypers.values()), hypers)

    def __init__(
        self, site, *, parameters: Annotated[int, "trained entries of all matrices together", Range(1)] = 10_000
    ):
        super().__init__(site, drawn=site.stats["count"] if site.saved is None else len(site.saved.get("value", ())))
