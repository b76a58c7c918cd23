"""LoRA folders for vLLM: by the rules with which vLLM reads them, and by what PEFT computes from them."""

import json

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import graft
from graft import METHODS, GraftError
from models import attach, bert, gpt2, llama, tokens

graft.LoRA  # noqa: B018  fills METHODS


def read_as_vllm(folder, max_lora_rank=512):
    """(scaling, {module: (A, B)}) by the rules of vLLM's PEFTHelper and LoRAModel.from_local_checkpoint.

    `r`, `lora_alpha` and `target_modules` must be there; no heads, no DoRA, no bias; every tensor is the A or the B of
    a module, of one rank; older versions take `r` and `lora_alpha` for all modules, whatever patterns say.
    """
    config = json.loads((folder / "adapter_config.json").read_text())
    assert {"r", "lora_alpha", "target_modules"} <= config.keys()
    assert not config.get("modules_to_save") and not config.get("use_dora") and config.get("bias") == "none"
    assert not config.get("rank_pattern") and not config.get("alpha_pattern") and not config.get("lora_bias")
    assert 0 < config["r"] <= max_lora_rank
    found = {}
    for key, value in load_file(folder / "adapter_model.safetensors").items():
        assert key.startswith("base_model.model.")
        parts = key.split(".")
        if parts[-1] == "weight" and parts[-2] in ("lora_A", "lora_B"):
            module, is_a = ".".join(parts[2:-2]), parts[-2] == "lora_A"
        else:
            assert parts[-1] in ("lora_embedding_A", "lora_embedding_B"), f"{key} is unsupported LoRA weight"
            module, is_a = ".".join(parts[2:-1]), parts[-1] == "lora_embedding_A"
        assert value.shape[0 if is_a else 1] == config["r"]
        found.setdefault(module, {})[is_a] = value
    scaling = config["lora_alpha"] / (config["r"] ** 0.5 if config.get("use_rslora") else config["r"])
    return scaling, {module: (pair[True], pair[False]) for module, pair in found.items()}


def served(model, folder):
    """The logits of `model` with the products that vLLM would add."""
    scaling, loras = read_as_vllm(folder)
    with torch.no_grad():
        for path, (a, b) in loras.items():
            host = model.get_submodule(path)
            change = scaling * b @ a
            host.weight += change.T if isinstance(host, nn.Embedding) else change
    return model(tokens()).logits


ADDITIVE = sorted(name for name, cls in METHODS.items() if cls.factors is not graft.Delta.factors)
CASES = {name: (name, METHODS[name].small, {}) for name in ADDITIVE} | {
    "ranks and scalings by module": (
        "lora",
        {"rank": {"q_proj": 2, "*": 5}, "alpha": {"down_proj": 3.0, "*": 8.0}},
        {},
    ),
    "rslora": ("lora", {"rank": 3, "rslora": True}, {}),
    "embedding and head": ("lora", {"rank": 3}, {"targets": ["embed_tokens", "lm_head", "v_proj"]}),
}


@pytest.mark.parametrize("name, hyper, options", CASES.values(), ids=CASES)
def test_what_vllm_and_peft_compute_is_what_the_adapter_does(tmp_path, name, hyper, options):
    ours = llama()
    adapter = attach(ours, name, "default", **({"targets": "all-linear"} | options), **hyper)
    adapter.save(tmp_path / "a", format="vllm")
    expect = ours(tokens()).logits
    assert (expect - llama()(tokens()).logits).abs().max() > 1e-2
    torch.testing.assert_close(served(llama(), tmp_path / "a"), expect, rtol=1e-4, atol=1e-5)
    theirs = peft.PeftModel.from_pretrained(llama(), tmp_path / "a").eval()
    torch.testing.assert_close(theirs(tokens()).logits, expect, rtol=1e-4, atol=1e-5)
    again = llama()
    assert graft.load(again, tmp_path / "a").deltas.keys() == adapter.deltas.keys()
    torch.testing.assert_close(again(tokens()).logits, expect, rtol=1e-4, atol=1e-5)


REFUSED = {
    "no product": (lambda: graft.attach(llama(), "oft", block=4), r"graft\.convert makes a LoRA"),
    "magnitudes": (lambda: graft.attach(llama(), "dora"), r"graft\.convert"),
    "a head": (lambda: graft.attach(bert(), "lora", "qv", heads="classifier"), "heads"),
    "a rank beyond": (lambda: graft.attach(llama(), "lora", "q_proj", rank=513), "512"),
    "another embedding": (lambda: graft.attach(bert(), "lora", "position_embeddings"), "embed_tokens"),
    "GPT-2's matrices": (lambda: graft.attach(gpt2(), "lora", "c_attn"), "Conv1D"),
    "a convolution": (lambda: graft.attach(nn.Sequential(nn.Conv2d(2, 2, 3)), "lora", "0"), "Conv2d"),
    "a model without head": (lambda: graft.attach(llama().model, "lora"), "ForCausalLM"),
    "a change of an activation": (lambda: graft.attach(llama(), "houlsby"), "LlamaAttention|LlamaMLP"),
}


@pytest.mark.parametrize("make, words", REFUSED.values(), ids=REFUSED)
def test_what_vllm_does_not_serve_is_refused(tmp_path, make, words):
    with pytest.raises(GraftError, match=words):
        make().save(tmp_path / "a", format="vllm")
    assert not list(tmp_path.iterdir())
