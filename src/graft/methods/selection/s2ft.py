"""S2FT: Efficient, Scalable and Generalizable LLM Fine-tuning by Structured Sparsity. Yang et al., 2024."""

from typing import Annotated, Literal

import torch

from ...core import selection
from ...core.delta import Paper
from ...core.errors import GraftError
from ...core.hyper import Range
from .parts import Columns


class S2FT(Columns, name="s2ft"):
    """W' = W + S, with S zero but in the columns `index` [k] of W [out, in], where `value` [out, k] is trained from 0.

    Columns are the inputs of a projection: channels of an MLP's hidden layer, or with group = the size of a head the
    heads of an attention. `density` of all groups of all matrices is chosen by `choice`, from high scores to low, the
    score of a group being the sum over its entries; a matrix without any is left alone. Since columns are picked where
    they are, no matrix has to be permuted, and the adapter is (columns, values).

    Of the input only the k features are kept for backward, and only their gradients are computed.

    From the authors' code (github.com/Infini-AI-Lab/S2FT, s2ft/s2.py and experiments/), which draws at random, and has
    the same for rows of value and up projections, not offered here; the paper finds columns of output and down
    projections best. The other choices are the paper's kinds of score (weights, activations, gradients), not its code.
    """

    papers = (
        Paper(
            "S2FT: Efficient, Scalable and Generalizable LLM Fine-tuning by Structured Sparsity",
            "Yang et al.",
            2024,
            "https://arxiv.org/abs/2412.06289",
        ),
    )
    known = (
        "Its authors report 4.6 and 1.3 % more than LoRA on commonsense and arithmetic reasoning, 11.5 % more than "
        "full fine-tuning where instruction tuning is to carry over to other domains, and up to 3 times less training "
        "memory than that."
    )
    targets = r"o_proj|down_proj|out_proj|c_proj|fc2|output\.dense|out_lin|lin2|wo"
    needs = ("weight_grad", "input_square")
    small = dict(density=0.4)

    @classmethod
    def asks(cls, hyper):
        return selection.needs(hyper["choice"])

    @classmethod
    def plan(cls, sites, hypers):
        for site in sites:
            if site.d_in % hypers[site.path]["group"]:
                group = hypers[site.path]["group"]
                raise GraftError(f"s2ft: group must divide the {site.d_in} columns of {site.path}, {group} does not")

        def score(site):
            return (
                selection.scores(hypers[site.path]["choice"], site).sum(0).view(-1, hypers[site.path]["group"]).sum(1)
            )

        return selection.allot(sites, score, hypers)

    def __init__(
        self,
        site,
        *,
        density: Annotated[
            float, "share of the groups of all matrices which are trained", Range(above=0, high=1)
        ] = 0.02,
        group: Annotated[int, "neighbouring columns that are chosen together", Range(1)] = 1,
        choice: Annotated[
            Literal["random", "magnitude", "activation", "wanda", "gradient"], "what scores the columns"
        ] = "random",
    ):
        index = selection.allotted(site)
        if site.saved is None:
            index = (index[:, None] * group + torch.arange(group, device=index.device)).flatten()
        super().__init__(site, index)
