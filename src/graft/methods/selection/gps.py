"""GPS: Gradient-based Parameter Selection for Efficient Fine-Tuning. Zhang et al., 2024."""

from typing import Annotated

from ...core import selection
from ...core.delta import Paper
from ...core.errors import GraftError
from ...core.hyper import Range
from .entries import Entries


class GPS(Entries, name="gps"):
    """W' = W + S, with S zero but at the `per_row` entries of each row of W [out, in] with the largest |dL/dW|.

    `value` [per_row out], zero at first, lies at the flat positions `index`: every neuron trains its own few inputs.

    From the authors' code (github.com/FightingFighting/GPS, utils/pruning.py), which trains biases and the head as
    well, and takes the gradient of a supervised contrastive loss of the features, without the head. Here it is that of
    the loss given to `graft.collect`.
    """

    papers = (
        Paper(
            "Gradient-based Parameter Selection for Efficient Fine-Tuning",
            "Zhang et al.",
            2024,
            "https://arxiv.org/abs/2312.10136",
        ),
    )
    known = (
        "Its authors report more than full fine-tuning on 24 image classification tasks with 0.36 % of the parameters: "
        "91.78 % against 88.45 % on FGVC, 73.1 % against 65.57 % on VTAB."
    )
    hosts = ("linear", "conv")
    needs = ("weight_grad",)
    small = dict(per_row=2)

    def __init__(self, site, *, per_row: Annotated[int, "entries of each row which are trained", Range(1)] = 1):
        if per_row > site.d_in:
            raise GraftError(f"gps: per_row must be at most the {site.d_in} columns of {site.path}, not {per_row}")
        super().__init__(site, lambda: selection.best_in_rows(selection.scores("gradient", site), per_row))
