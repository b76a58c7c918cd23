"""Initialization using Update Approximation is a Silver Bullet for Extremely Efficient Low-Rank Fine-Tuning."""

from typing import Annotated, Literal

from ..core.factored import Init
from ..core.hyper import Range
from ..methods.weight.lora_sb import LoRASB


class UpdateApproximation(Init, name="lora_sb"):
    """s B A = the best approximation of the given rank to the first update of full fine-tuning,
    -learning_rate * sign(G) where that is by AdamW and -learning_rate * G by SGD, G the mean gradient of the loss in W.

    From its triplets U S V: A = (S / s)^1/2 V [rank, in] and B = U (S / s)^1/2 [out, rank]. The method `lora_sb` takes
    them apart again: A = V, B = U, and R = S between them. Nothing is taken off W, so that the adapted model starts one
    (approximate) step after the base. `learning_rate` is that of the first step, warm-up included.
    Source: the paper (algorithm 1) and the authors' `estimate_and_process_grads_torch` (CERT-Lab/lora-sb).
    """

    papers = LoRASB.papers
    known = (
        "Its authors report more than LoRA with 27 to 90 times fewer trained parameters, where R alone is trained (the "
        "method `lora_sb`)."
    )
    needs = ("weight_grad",)
    starts_as_base = False

    def __init__(
        self,
        *,
        learning_rate: Annotated[float, "of the first update", Range(above=0)] = 1e-4,
        optimizer: Annotated[Literal["adamw", "sgd"], "whose first update it is"] = "adamw",
        niter: Annotated[int | None, "iterations of a fast, random SVD; left out, exact", Range(1)] = None,
    ):
        self.learning_rate, self.optimizer, self.niter = learning_rate, optimizer, niter

    def factors(self, site, rank, scaling):
        G = site.stats["weight_grad"]
        update = -self.learning_rate * (G.sign() if self.optimizer == "adamw" else G)
        U, S, V = self.triplets(site, update, rank, self.niter)
        root = (S / scaling).sqrt()
        return root[:, None] * V, U * root
