"""Full fine-tuning of chosen modules, as a delta: the base stays as it is beside it."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ...core.delta import Delta, Paper
from ...core.formats import As
from ...core.formats.lycoris import Lycoris
from ...core.host import bare_copy
from ...core.hyper import Range
from ...core.site import kind_of, site_for


def _change(name: str) -> tuple:
    """As the change of a parameter of the host, and back."""

    def own(site, value):
        return getattr(site.module, name).detach().to(value)

    return (lambda site, value: value - own(site, value)), (lambda site, value: value + own(site, value))


class _FullLycoris(Lycoris):
    """LyCORIS saves the changes; that of a bias may be left out."""

    def read(self, site, found):
        state = super().read(site, found)[1]
        bias = getattr(site.module, "bias", None)
        return {}, state if bias is None else {"copy.bias": bias.detach()} | state


class Full(Delta, name="full"):
    """y' = m(x), m a trained copy of the host: any module, a new classifier head among them.

    Where the host owns a matrix W [out, in], this is W' = V with V trained from W. The base's own tensors keep
    their values, so that several adapters can each have a head of their own. Deltas further inside (of adapters
    attached before, or on modules inside the host) rest while it runs; deltas outside act on its result.

    With `anew` the copy forgets the base's values: matrices become normal with that deviation, biases 0, norms 1. Few
    examples are learnt stably if the top blocks of an encoder, one to six of them, begin so, with more steps than usual
    and an AdamW that corrects its bias, as torch's does (Zhang et al.): targets=["blocks[-3:]", "pooler"].

    Blocks above a frozen part learn without a backward through it, as in the layer-wise skipping of Skip Tuning (Wu et
    al.), which trains both towers of CLIP so from block 6 on; it also computes the output of the frozen part once for
    all steps of an epoch and leaves classes out of the loss, which is not done here.
    """

    papers = (
        Paper("Revisiting Few-sample BERT Fine-tuning", "Zhang et al.", 2020, "https://arxiv.org/abs/2006.05987"),
        Paper(
            "Skip Tuning: Pre-trained Vision-Language Models are Effective and Efficient Adapters Themselves",
            "Wu et al.",
            2024,
            "https://arxiv.org/abs/2412.11509",
        ),
    )
    known = (
        "The reference for all other methods. The authors of `Revisiting Few-sample BERT Fine-tuning` report that it "
        "is unstable with few examples, and stable with a bias-corrected AdamW, more steps and top layers that begin "
        "anew."
    )

    hosts = ("linear", "conv", "embedding", "norm", "module")
    on_codes = False
    targets = "head"
    lycoris = _FullLycoris(
        {"copy.weight": As("diff", *_change("weight")), "copy.bias": As("diff_b", *_change("bias"), optional=True)}
    )

    copy: Any

    def __init__(
        self,
        site,
        *,
        anew: Annotated[
            float | None,
            "deviation of new random matrices to begin with, 0.02 for BERT; None: the base's",
            Range(above=0),
        ] = None,
    ):
        super().__init__(site)
        self.copy = bare_copy(site.module).requires_grad_(True)
        if site.head and site.saved:
            _take_size(self.copy, site.saved)
        if anew is not None and site.saved is None:
            _forget(self.copy, anew)

    def forward(self, inner, *args, **kwargs):
        if self.site.kind != "module":
            return super().forward(inner, *args, **kwargs)
        # The copy keeps float32 beside a half-precision base, and computes in the precision of the base.
        wanted, resting = self.site.where().dtype, self.resting
        own = ((n, p.detach() if resting else p) for n, p in self.copy.named_parameters())
        cast = {n: p.to(wanted) for n, p in own if resting or p.dtype != wanted}
        if not cast:
            return self.copy(*args, **kwargs)
        with _in_one_piece(self.copy):
            return functional_call(self.copy, cast, args, kwargs)

    def weight(self, w):
        return self._own().weight

    def bias(self, b):
        return self._own().bias

    def tensors(self, inner):
        return dict(self.copy.named_parameters(remove_duplicate=False))

    def _own(self):
        own = copy.copy(self.site)
        own.module = self.copy
        return own


@contextmanager
def _in_one_piece(module: nn.Module) -> Iterator[None]:
    """Without gradient checkpoints in it: backward would run those parts again when the cast tensors are gone.

    One around the host covers all of them.
    """
    parts: list[Any] = [m for m in module.modules() if getattr(m, "gradient_checkpointing", False)]
    for part in parts:
        part.gradient_checkpointing = False
    try:
        yield
    finally:
        for part in parts:
            part.gradient_checkpointing = True


@torch.no_grad()
def _forget(module: nn.Module, deviation: float) -> None:
    """As `initialise` in the authors' run_glue.py (asappresearch/revisit-bert-finetuning)."""
    for m in module.modules():
        gain = 1.0 - site_for("", m, ("norm",)).offset if kind_of(m) == "norm" else 0.0  # type: ignore[attr-defined]
        for name, p in m._parameters.items():
            if p is not None:
                p.normal_(0.0, deviation) if p.dim() > 1 else p.fill_(gain if name == "weight" else 0.0)


def _take_size(head: nn.Module, saved: dict[str, Tensor]) -> None:
    """Give the last linear map of a head as many outputs as it was saved with: those of its own classes."""
    layers = [(path, m) for path, m in head.named_modules(prefix="copy") if isinstance(m, nn.Linear)]
    if not layers:
        return
    path, last = layers[-1]
    weight = saved.get(f"{path}.weight")
    if weight is None or weight.dim() != 2 or weight.shape[1] != last.in_features:
        return
    last.out_features = len(weight)
    for own in last._parameters.values():
        if own is not None:
            own.data = own.new_empty(len(weight), *own.shape[1:])
