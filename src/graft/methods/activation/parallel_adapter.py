"""The scaled parallel adapter. He et al., 2021."""

from typing import Annotated, Literal

from ...core.delta import Paper
from ...core.formats.adapter_hub import bottleneck
from ...core.hyper import Range
from .bottleneck import Parallel


class ParallelAdapter(Parallel, name="parallel_adapter"):
    """h' = h + s up(act(down(x))), x [..., width] the input of the MLP and h its output.

    down [size, width] starts as LoRA's A (Kaiming uniform), up [width, size] and both biases at zero. In a pre-norm
    model x is the normalised input, as the MLP sees it; in BERT and the like it is the residual.
    """

    papers = (
        Paper(
            "Towards a Unified View of Parameter-Efficient Transfer Learning",
            "He et al.",
            2021,
            "https://arxiv.org/abs/2110.04366",
        ),
    )
    known = (
        "Its authors report that methods composed from their analysis, of which it is a part, equal full fine-tuning "
        "on translation, summarisation, language understanding and classification with fewer parameters than earlier "
        "ones."
    )
    small = dict(size=3)
    adapter_hub = bottleneck(
        "output_adapter",
        models=("bert", "roberta", "distilbert"),  # where the MLP reads the residual itself
        config={"scaling": "scaling"},
        mh_adapter=False, output_adapter=True, is_parallel=True, original_ln_before=False,
    )  # fmt: skip

    def __init__(
        self,
        site,
        *,
        size: Annotated[int, "features of the bottleneck", Range(1)] = 512,
        activation: Annotated[Literal["gelu", "relu", "silu", "tanh"], "between the two maps"] = "relu",
        scaling: Annotated[float, "the factor s; 4 for generation, 2 for GLUE in the paper"] = 4.0,
        dropout: Annotated[float, "probability of dropping a feature of the bottleneck", Range(0, below=1)] = 0.0,
    ):
        super().__init__(site, size, activation, scaling, dropout)
