"""Surgical fine-tuning by the Fisher information: On Surgical Fine-tuning for Language Encoders. Lodha et al., 2023."""

from typing import Annotated

from ...core.delta import Paper
from ...core.hyper import Range
from ..weight.full import Full


class Surgical(Full, name="surgical"):
    """y' = m(x) at the `layers` targets with the highest Fisher score, m a copy of the layer trained from it; so W' = V
    for each matrix W [out, in] in it. The other layers are left alone: no gradient, no optimizer state, nothing saved.

    The score of a layer is the sum over its tensors of ||F||_F, F the diagonal of the empirical Fisher information: the
    mean of (dL/dw)^2 over the batches given to `graft.collect`; for that of single examples give batches of one.

    From the authors' code (`fim_calculator.py` in github.com/ymtao5219/surgical_fine_tuning), which takes 100 examples
    and the gradients of the logit of the label (pass that as loss= to `graft.collect` for the same). The paper itself
    could not be read beyond its abstract; how many layers are trained is not from there.
    """

    papers = (
        Paper(
            "On Surgical Fine-tuning for Language Encoders",
            "Lodha et al.",
            2023,
            "https://arxiv.org/abs/2310.17041",
        ),
    )
    known = (
        "Its authors report that a few layers do about as well as all of them on GLUE and SuperGLUE, often better, and "
        "that the ranking of layers stays the same in training."
    )
    targets = "blocks"
    needs = ("fisher",)
    lycoris = None
    small = dict(layers=1)

    @classmethod
    def plan(cls, sites, hypers):
        keep = max(one["layers"] for one in hypers.values())
        best = sorted(sites, key=lambda site: -site.stats["fisher"])[:keep]
        return {site.path: hypers[site.path] for site in best}

    def __init__(self, site, *, layers: Annotated[int, "targets that are trained, by their score", Range(1)] = 2):
        super().__init__(site)
