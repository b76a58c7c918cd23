"""SMT: Sparse Matrix in Large Language Model Fine-tuning. He et al., 2024."""

from typing import Annotated, Literal

from ...core import selection
from ...core.delta import Paper
from ...core.errors import GraftError
from ...core.hyper import Range
from .parts import Blocks


class SMT(Blocks, name="smt"):
    """W' = W + S, with S zero but in k blocks [size, size] of W [out, in], where `value` [k, size, size] is trained.

    `density` of the blocks of all matrices is chosen, by the gradient over the batches given to `graft.collect`:

        mean_abs   |mean of dL/dW over the block|
        abs_mean   the mean of |dL/dW| over the block

    A matrix without a chosen block is left alone. `index` [k] counts blocks row by row; `value` starts at zero. The
    size of the blocks must divide both sides of every matrix.

    From the authors' code (github.com/HectorHHZ/Sparse_Matrix_Tuning, peft/tuner/smt.py), whose blocks are 256 wide and
    whose gradient is the sum over 100 steps of full fine-tuning, where this one is taken at W.
    It counts the blocks of attention and MLP apart: two adapters do that here.
    """

    papers = (
        Paper(
            "Sparse Matrix in Large Language Model Fine-tuning", "He et al.", 2024, "https://arxiv.org/abs/2405.15525"
        ),
    )
    known = (
        "Its authors report better results than LoRA and DoRA with LLaMA models and 67 % less GPU memory than full "
        "fine-tuning, and no plateau as more parameters are trained."
    )
    targets = "qkv"
    needs = ("weight_grad",)
    small = dict(size=2, density=0.3)

    @classmethod
    def plan(cls, sites, hypers):
        for site in sites:
            if (size := hypers[site.path]["size"]) and (site.d_out % size or site.d_in % size):
                raise GraftError(
                    f"smt: size must divide both sides of {site.path} [{site.d_out}, {site.d_in}], {size} does not"
                )

        def score(site):
            size, gradient = hypers[site.path]["size"], site.stats["weight_grad"].float()
            blocks = gradient.view(site.d_out // size, size, site.d_in // size, size)
            if hypers[site.path]["choice"] == "mean_abs":
                return blocks.mean((1, 3)).abs()
            return blocks.abs().mean((1, 3))

        return selection.allot(sites, score, hypers)

    def __init__(
        self,
        site,
        *,
        density: Annotated[
            float, "share of the blocks of all matrices which are trained", Range(above=0, high=1)
        ] = 0.01,
        size: Annotated[int, "rows and columns of a block", Range(1)] = 256,
        choice: Annotated[Literal["mean_abs", "abs_mean"], "what scores a block"] = "abs_mean",
    ):
        super().__init__(site, selection.allotted(site), size)
