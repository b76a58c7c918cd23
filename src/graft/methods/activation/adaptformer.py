"""AdaptFormer: Adapting Vision Transformers for Scalable Visual Recognition. Chen et al., 2022."""

from typing import Annotated

from ...core.delta import Paper
from ...core.hyper import Range
from .bottleneck import Parallel


class AdaptFormer(Parallel, name="adaptformer"):
    """h' = h + s up(relu(down(x))), x [..., width] the input of the MLP and h its output, tokens or patches alike.

    down [size, width] starts as LoRA's A (Kaiming uniform), up [width, size] and both biases at zero. No layer norm
    of its own: x is LN(x') where the MLP reads that, as the paper writes it.
    """

    papers = (
        Paper(
            "AdaptFormer: Adapting Vision Transformers for Scalable Visual Recognition",
            "Chen et al.",
            2022,
            "https://arxiv.org/abs/2205.13535",
        ),
    )
    known = (
        "Its authors report more than full fine-tuning on action recognition with vision transformers: by 10 % on "
        "Something-Something v2 and 19 % on HMDB51, relatively, with 1.5 % more parameters."
    )
    small = dict(size=3)

    def __init__(
        self,
        site,
        *,
        size: Annotated[int, "features of the bottleneck", Range(1)] = 64,
        scaling: Annotated[float, "the factor s"] = 0.1,
        dropout: Annotated[float, "probability of dropping a feature of the bottleneck", Range(0, below=1)] = 0.1,
    ):
        super().__init__(site, size, "relu", scaling, dropout)
