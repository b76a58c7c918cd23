"""Prompts: learnt vectors before the embedded tokens of a transformers model.

The host is not the model as a whole but its backbone: the module that turns tokens into hidden states, below every
head. It reads [prompt; tokens] and gives back the states of the tokens alone. So everything above it, the logits and
the loss, a head that reads the first or the last token, a caller that counts tokens, `generate`, sees what it would
see without a prompt, and needs no change.

    prefill     x = [P; embed(tokens)], mask = [1; mask], positions = [0 .. length-1; positions + length]
    decoding    P lies in the cache: mask = [1; mask], positions + length

In an encoder-decoder model the encoder reads the prompt, and the decoder's cross attention sees its states too: those
of the encoder's output are length more than the tokens, and the mask which the decoder is given is lengthened.
"""

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .delta import Delta
from .errors import GraftError
from .host import Host
from .site import kind_of
from .stacked import each_of, left_padded

RECURRENT = ("cache_params", "mems", "state")  # arguments of models that keep their past in something else than keys


class Prompt(Delta):
    """A delta of the input: `prompt()` gives the vectors P [length, width], in the space of the embedded tokens."""

    hosts = ("model",)
    targets = ""
    starts_as_base = False
    stacks_itself = True
    length: int

    @classmethod
    def places(cls, model: Any, path: str, module: nn.Module) -> list[tuple[str, nn.Module]]:
        """The backbone of the model, or its encoder and its decoder."""
        if not hasattr(module, "get_input_embeddings") or not hasattr(module, "config"):
            raise GraftError(
                f"{cls.name} needs a transformers model; {type(module).__name__} has no get_input_embeddings"
            )
        whole: Any = module
        if getattr(whole.config, "is_encoder_decoder", False):
            found = [whole.get_encoder(), whole.get_decoder()]
        else:
            found = [getattr(whole.base_model, "language_model", whole.base_model)]
        paths = {id(m): p for p, m in model.named_modules()}
        return [(paths[id(m)], m) for m in found]

    @classmethod
    def refuses(cls, site):
        names = _arguments(site.module)
        if "inputs_embeds" not in names:
            return f"{type(site.module).__name__} takes no inputs_embeds"
        if past := [n for n in RECURRENT if n in names]:
            return (
                f"{type(site.module).__name__} keeps its past in {past[0]}, where a prompt cannot be told from tokens"
            )
        if kind_of(getattr(site.module, "pooler", None) or nn.Identity()) == "linear":
            return f"the pooler of {type(site.module).__name__} is given the first state, which would be the prompt's"

    def __init__(self, site):
        super().__init__(site)
        self.names = _arguments(site.module)
        self.reads = site.index == 0  # the second of two places is the decoder of an encoder-decoder model
        self.keeps = site.count == 2  # whose encoder hands the states of the prompt on to it
        tables = [m for p, m in site.module.named_modules() if p.endswith("position_embeddings")]
        numbers = (getattr(m, "padding_idx", None) for m in tables if isinstance(m, nn.Embedding))
        self.first = next((n + 1 for n in numbers if n is not None), 0)  # RoBERTa counts from past that of padding
        self.counts = not tables or "position_ids" in self.names  # whether rows may begin at different places

    def embed(self, tokens: Tensor) -> Tensor:
        """The model's own embedding of token ids, scaled as the model does it."""
        return self.site.module.get_input_embeddings()(tokens)

    def prompt(self) -> Tensor:
        raise NotImplementedError

    def prepare(self, inner):
        return (self.prompt() if self.reads else torch.empty(self.length, 0),)

    @classmethod
    def stack(cls, prepared: list) -> tuple[Tensor, Tensor | None]:
        """The prompts of b rows as P [b, n, width] and keep [b, n], see `left_padded`."""
        return left_padded([p[0] if p else None for p in prepared])

    def forward(self, inner, *args, **kwargs):
        own = self.prepared(inner, self.site.where().dtype)
        return self.act_stacked(inner, self.stack([own]), *args, **kwargs)

    def act_stacked(self, inner, stacked, *args, **kwargs):
        """The backbone, where prompt i of the b `stacked` ones is for batch / b neighbours."""
        kwargs.update(zip(self.names, args))
        prompts, keep = stacked
        if not self.reads:
            return inner(**self._cross(kwargs, prompts.shape[1], keep))
        tokens, x = kwargs.pop("input_ids", None), kwargs.pop("inputs_embeds", None)
        batch, count = (tokens if x is None else x).shape[:2]
        prompts = each_of(prompts, batch, self.site.path)
        n, keep = prompts.shape[1], None if keep is None else each_of(keep, batch, self.site.path)
        cache = kwargs.get("past_key_values")
        past = 0 if cache is None else cache.get_seq_length()
        self._extend(kwargs, batch, count, past, n, keep, isinstance(inner, Host))
        if past:
            return inner(input_ids=tokens, inputs_embeds=x, **kwargs)
        if cache is not None and cache.is_compileable:
            raise GraftError(f"{self.name} needs a cache that grows: {type(cache).__name__} has no room for the prompt")
        x = self.embed(tokens) if x is None else x
        wanted = kwargs.pop("return_dict", None)
        as_tuple = (self.site.module.config.return_dict if wanted is None else wanted) is False
        out = inner(inputs_embeds=torch.cat([prompts.to(x.dtype), x], 1), return_dict=True, **kwargs)
        if not self.keeps:
            out = self._tokens_only(out, n)
        return out.to_tuple() if as_tuple else out

    def _extend(self, kwargs: dict, batch: int, count: int, past, n: int, keep: Tensor | None, innermost: bool) -> None:
        """Make mask, positions and token types those of n places for the prompt, of which `keep` count, and tokens."""
        mask, positions = kwargs.get("attention_mask"), kwargs.get("position_ids")
        if mask is not None and (not isinstance(mask, Tensor) or mask.dim() != 2):
            raise GraftError(f"{self.name} needs an attention mask of shape [batch, tokens], and the default cache")
        if past and innermost:
            known = past - n if mask is None else mask.shape[1] - count
            if mask is None and positions is not None and positions.dim() == 2 and not torch.compiler.is_compiling():
                known = int(positions[0, 0])  # the mask is left out where no token is masked
            if known != past - n:
                raise GraftError(
                    f"{self.name}: the cache holds {past - n} tokens and the prompt, the caller knows of {known}. "
                    f"Start with an empty cache, or give the new tokens alone with the mask of all tokens; assisted "
                    f"decoding needs transformers 5"
                )
        first = max(past - n, 0)  # the position of the first token, as the caller counts
        if keep is not None:
            if not self.counts:
                raise GraftError(
                    f"prompts of different lengths in one batch need a model that takes position_ids, which "
                    f"{type(self.site.module).__name__} does not here: give all rows prompts of one length"
                )
            if mask is None:
                mask = keep.new_ones(batch, first + count, dtype=torch.long)
            if positions is None and "position_ids" in self.names:
                at = torch.arange(first, first + count, device=keep.device) + self.first
                kwargs["position_ids"] = at.expand(batch, -1)
        if mask is not None:
            kwargs["attention_mask"] = _with_prompt(mask, n, keep)
        own = n if keep is None else keep.sum(1, keepdim=True)
        for key, length in (("position_ids", own), ("cache_position", n)):
            if (at := kwargs.get(key)) is not None:
                front = torch.arange(n, device=at.device, dtype=at.dtype)
                if key == "position_ids":
                    front = front + self.first
                if isinstance(length, Tensor):
                    front = front - (n - length)
                    at = at.expand(*at.shape[:-2], batch, -1)
                front = front.clamp(min=0).expand(*at.shape[:-1], n)
                kwargs[key] = at + length if past else torch.cat([front, at + length], -1)
        if kwargs.get("token_type_ids") is not None and not past:
            kwargs["token_type_ids"] = F.pad(kwargs["token_type_ids"], (n, 0))

    def _cross(self, kwargs: dict, n: int, keep: Tensor | None) -> dict:
        states, mask = kwargs.get("encoder_hidden_states"), kwargs.get("encoder_attention_mask")
        if states is None:
            return kwargs
        if keep is not None:
            keep = each_of(keep, len(states), self.site.path)
            if mask is None:
                mask = keep.new_ones(len(states), states.shape[1] - n, dtype=torch.long)
        if mask is not None and states.shape[1] - mask.shape[1] >= n:
            kwargs["encoder_attention_mask"] = _with_prompt(mask, n, keep)
        return kwargs

    def _tokens_only(self, out, n: int):
        """The output without what belongs to the n places of the prompt; the pooled state is the first token's."""
        for key, value in list(out.items()):
            if key == "last_hidden_state":
                out[key] = value[:, n:]
            elif key == "hidden_states":
                out[key] = tuple(h[:, n:] for h in value)
            elif key in ("attentions", "cross_attentions"):  # [batch, heads, queries, keys]
                out[key] = tuple(a[:, :, n:] for a in value)
        if out.get("pooler_output") is not None:
            out["pooler_output"] = self.site.module.pooler(out.last_hidden_state)
        return out


def _with_prompt(mask: Tensor, n: int, keep: Tensor | None) -> Tensor:
    """A mask [batch, tokens] with the n places before them."""
    return F.pad(mask, (n, 0), value=1) if keep is None else torch.cat([keep.to(mask.dtype), mask], 1)


def _arguments(module: nn.Module) -> tuple[str, ...]:
    return tuple(inspect.signature(type(module).forward).parameters)[1:]
