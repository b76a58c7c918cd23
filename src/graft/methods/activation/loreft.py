"""LoReFT: Representation Finetuning for Language Models. Wu et al., 2024."""

import inspect
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...core.delta import Edit, Paper, first_input
from ...core.errors import GraftError
from ...core.formats.adapter_hub import AdapterHub, blocks
from ...core.hyper import Range

_ROWS = "projection.parametrizations.weight.original"


class _ReftHub(AdapterHub):
    """The library has torch's orthogonal map, and always two edits where they are not tied."""

    def homes(self, method, model):
        return {path: (i, "output_reft", f"{path}.reft_layer") for i, path in enumerate(blocks(model))}

    def layers(self, homes, count):
        used = sorted(i for i, _, _ in homes.values())
        return {"layers": "all" if len(used) == count else used, "output_reft": True}

    def site_out(self, delta):
        first, last = (any(span[i] for span in delta.spans) for i in (0, 1))
        edits = [delta.edits[0], delta.edits[-1]]
        if len(delta.spans) == 1 and first and last:
            edits = edits[:1]
        found = {}
        for i, edit in enumerate(edits):
            projection = _projection(edit.rows)
            projection.weight = edit.basis().detach()
            source = {f"learned_source.{name}": value for name, value in edit.source.state_dict().items()}
            made = {f"projection.{name}": value for name, value in projection.state_dict().items()}
            found |= {f"units.{i}.{name}": value for name, value in (source | made).items()}
        return found

    def write_config(self, deltas, homes):
        spans = next(iter(deltas.values())).spans
        return {"tied_weights": len(spans) == 1 and all(spans[0])}

    def site_in(self, site, found, config):
        first, last, tied = (config[name] for name in ("prefix_positions", "suffix_positions", "tied_weights"))
        wanted = [0] if tied else [i for i, positions in enumerate((first, last)) if positions]
        state = {}
        for i, unit in enumerate(wanted):
            own = {k.removeprefix(f"units.{unit}."): v for k, v in found.items() if k.startswith(f"units.{unit}.")}
            projection = _projection(own[_ROWS])
            names = {name: value for name, value in own.items() if name.startswith("projection.")}
            projection.load_state_dict({name.removeprefix("projection."): value for name, value in names.items()})
            state |= {
                f"edits.{i}.rows": projection.weight.detach(),
                f"edits.{i}.source.weight": own["learned_source.weight"],
                f"edits.{i}.source.bias": own["learned_source.bias"],
            }
        return state

    def read_config(self, config, state):
        return {"tied": bool(config["tied_weights"])}


def _projection(like: Tensor) -> Any:
    """A map with orthonormal rows [rank, width], as `adapters` has it."""
    rank, width = like.shape
    return nn.utils.parametrizations.orthogonal(nn.Linear(width, rank, bias=False, dtype=like.dtype))


class LoReFT(Edit, name="loreft"):
    """h' = h + R^T (W h + b - R h) at the `first` and the `last` tokens of the prompt, after each block.

    h [..., length, width] is the output of the block, R [rank, width] has orthonormal rows (a QR decomposition of the
    trained tensor keeps them so), W [rank, width], b [rank]. W, b start as a linear layer's, R random: not at the base.

    Tokens are counted without padding on either side, which the block's attention mask tells. When a cache holds
    earlier tokens already, the host is left as it is: in generation, the prompt alone is edited. (Without a cache
    every step is a new prompt, and its last tokens are others.) Untied, the last tokens have their own R, W and b,
    and a token that is both among the first and the last gets the edit of the last.
    """

    papers = (
        Paper(
            "ReFT: Representation Finetuning for Language Models", "Wu et al.", 2024, "https://arxiv.org/abs/2404.03592"
        ),
    )
    known = (
        "Its authors report the best balance of cost and quality on commonsense and arithmetic reasoning, instruction "
        "tuning and GLUE, with 15 to 65 times fewer parameters than LoRA."
    )
    edits: Any
    hosts = ("module",)
    targets = "blocks"
    starts_as_base = False
    small = dict(rank=2)
    adapter_hub = _ReftHub(
        "refts",
        config={"r": "rank", "prefix_positions": "first", "suffix_positions": "last", "dropout": "dropout"},
        fixed={"architecture": "reft", "orthogonality": True, "non_linearity": None},
        neutral=frozenset({"tied_weights"}),
        own=frozenset({"tied"}),
    )

    def __init__(
        self,
        site,
        *,
        rank: Annotated[int, "dimensions of the edited subspace", Range(1)] = 8,
        first: Annotated[int, "tokens edited at the start", Range(0)] = 7,
        last: Annotated[int, "tokens edited at the end", Range(0)] = 7,
        tied: Annotated[bool, "one edit for the first and the last tokens"] = True,
        dropout: Annotated[float, "probability of dropping a feature of an edited state", Range(0, below=1)] = 0.0,
    ):
        super().__init__(site)
        if rank > site.width:
            raise GraftError(f"loreft: rank must be at most the {site.width} features of {site.path}, not {rank}")
        self.spans = [(first, last)] if tied or not (first and last) else [(first, 0), (0, last)]
        self.edits = nn.ModuleList(Subspace(site.width, rank) for _ in self.spans)
        self.dropout = dropout
        self.names = tuple(inspect.signature(type(site.module).forward).parameters)[1:]
        layers = (getattr(m, "layer_idx", None) for m in site.module.modules())
        self.layer = next((i for i in layers if i is not None), 0)

    def prepare(self, inner):
        return tuple(t for subspace in self.edits for t in subspace.prepare())

    def look(self, args, kwargs):
        """Which tokens are real [batch, length], or None where none is edited."""
        given = kwargs | dict(zip(self.names, args))
        cache = next((a for a in given.values() if hasattr(a, "get_seq_length")), None)
        if cache is not None and cache.get_seq_length(self.layer):
            return (None,)
        x = first_input(args, kwargs)
        mask = next((m for m in (given.get("attention_mask"), given.get("mask")) if isinstance(m, Tensor)), None)
        real = x.new_ones(x.shape[:-1], dtype=torch.bool) if mask is None else _real(mask, x)
        return (real.expand(x.shape[:-1]),)

    def edit(self, h, x, real, *prepared):
        if real is None:
            return h
        base, rank = h, real.cumsum(-1)  # 1 at the first real token
        count = rank[..., -1:]
        for i, (first, last) in enumerate(self.spans):
            at = real & ((rank <= first) | (rank > count - last))
            edited = moved(base, *prepared[3 * i : 3 * i + 3])
            edited = F.dropout(edited, self.dropout, self.training) if self.dropout else edited
            h = torch.where(at[..., None], edited, h)
        return h


class Subspace(nn.Module):
    """R, W and b of one edit."""

    def __init__(self, width: int, rank: int):
        super().__init__()
        self.rows = nn.Parameter(nn.init.orthogonal_(torch.empty(rank, width)))
        self.source = nn.Linear(width, rank)

    def basis(self) -> Tensor:
        """R: the rows themselves where they are orthonormal."""
        with torch.autocast(self.rows.device.type, enabled=False):
            Q, U = torch.linalg.qr(self.rows.T)  # in float32 or float64: there is no QR in half precision
            return (Q * U.diagonal().sign()).T

    def prepare(self) -> tuple[Tensor, Tensor, Tensor]:
        """R, W - R and b."""
        R = self.basis()
        return R, self.source.weight - R, self.source.bias


def moved(h: Tensor, R: Tensor, change: Tensor, b: Tensor) -> Tensor:
    """h + R^T (W h + b - R h), with change = W - R."""
    return h + (F.linear(h, change.to(h.dtype), b.to(h.dtype)) @ R.to(h.dtype)).to(h.dtype)


def _real(mask: Tensor, h: Tensor) -> Tensor:
    """Which tokens are not padding [batch, length], from a mask [batch, keys] or [batch, 1, queries, keys].

    A token that is none may see itself, whatever else the mask is for (order, a window).
    """
    length = h.shape[-2]
    if mask.dim() == 4:
        mask = mask[:, 0, :, :length].expand(-1, length, -1).diagonal(dim1=1, dim2=2)
        return mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    return mask[:, :length].bool()
