"""Plain LoRA as vLLM serves it: PEFT's folder, with one rank and one scaling for all modules and nothing else.

What vLLM accepts is in its vllm/lora/peft_helper.py, lora_model.py and utils.py: no magnitudes (DoRA), no biases, no
heads; Linear modules and the embedding; names of the model which it serves; a rank up to its --max-lora-rank, of which
512 is the highest. (Its older versions read neither rank_pattern nor alpha_pattern, and say nothing.)
"""

from typing import Any

from torch import nn

from ..delta import Delta
from ..errors import GraftError
from ..folder import json_bytes, tensor_bytes
from ..host import base_modules
from . import CONFIG, OWN, TENSORS, Format
from .peft import PREFIX, target_modules, task_type

MOST_RANK = 512
CONVERT = "graft.convert makes a LoRA of an adapter"


class VllmFormat(Format, name="vllm"):
    """For writing: any method whose update is a product B A at every module, padded with zeros to one rank.

    What is written is PEFT's format and read as such.
    """

    title = "vLLM"
    library = "peft"
    loading = (
        "vLLM serves it: `vllm serve BASE --enable-lora --lora-modules NAME={title} --max-lora-rank R`, with R not "
        "below `r` of adapter_config.json."
    )

    @classmethod
    def stored(cls, method):
        return "its update is no product of two factors" if method.factors is Delta.factors else method.factors

    def write(self, adapter, base):
        model, modules = adapter.model, base_modules(adapter.model)
        if adapter.heads:
            raise GraftError(f"vLLM serves no heads, such as {adapter.heads[0][0]}: {OWN}")
        if getattr(model, "base_model", None) is model:
            raise GraftError(
                f"vLLM names modules as models with a head do, {type(model).__name__} is without: load the adapter on "
                f"such a model (...ForCausalLM) and save it from there"
            )
        factors = {path: _factors(delta) for path, delta in adapter.deltas.items()}
        rank = max(len(a) for a, _ in factors.values())
        if rank > MOST_RANK:
            raise GraftError(f"vLLM serves ranks up to {MOST_RANK}, this adapter has {rank}: {CONVERT} of a lower rank")
        tensors = {}
        for path, (a, b) in factors.items():
            names = ("lora_embedding_A", "lora_embedding_B")
            if adapter.deltas[path].site.kind != "embedding":
                names = ("lora_A.weight", "lora_B.weight")
            lack = rank - len(a)
            tensors[f"{PREFIX}{path}.{names[0]}"] = nn.functional.pad(a, (0, 0, 0, lack))
            tensors[f"{PREFIX}{path}.{names[1]}"] = nn.functional.pad(b, (0, lack))
        config = {
            "peft_type": "LORA",
            "task_type": task_type(model, modules, []),
            "base_model_name_or_path": base,
            "inference_mode": True,
            "r": rank,
            "lora_alpha": rank,  # the scaling is in B
            "lora_dropout": 0.0,
            "bias": "none",
            "target_modules": target_modules(modules, list(factors)),
            "modules_to_save": None,
        }
        return {TENSORS: tensor_bytes(tensors), CONFIG: json_bytes(config)}


def _factors(delta: Any) -> tuple[Any, Any]:
    """A [k, in] and B [out, k] of a delta that is W + B A and nothing else, on a module which vLLM adapts."""
    site = delta.site
    module = site.module
    cls = getattr(module, "host_class", type(module))
    names = {c.__name__ for c in cls.__mro__}
    if not names & {"Linear", "Embedding"}:
        raise GraftError(f"vLLM adapts Linear modules and embeddings, {site.path} is a {cls.__name__}: {OWN}")
    if "Embedding" in names and site.path.rpartition(".")[2] != "embed_tokens":
        raise GraftError(f"vLLM adapts the embedding embed_tokens, not {site.path}: {OWN}")
    factors = delta.factors()
    if factors is None:
        raise GraftError(f"vLLM serves plain LoRA, {delta.name} at {site.path} is none: {CONVERT}")
    if delta.bias(site.bias) is not site.bias:
        raise GraftError(f"vLLM's LoRA leaves biases alone, {delta.name} at {site.path} changes one: {CONVERT}")
    return factors
