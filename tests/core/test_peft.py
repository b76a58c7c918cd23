"""PEFT's format both ways: what one library saves, the other loads, with equal outputs."""

import json

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

import graft
from graft import GraftError

TOKENS = torch.tensor([[5, 9, 11, 2, 7], [3, 3, 8, 60, 1]])


def llama():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, num_hidden_layers=3, **sizes)).eval()


def gpt2():
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=16)).eval()


def bert(seed=1):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = BertForSequenceClassification(BertConfig(vocab_size=64, num_labels=3, **sizes)).eval()
    torch.manual_seed(seed)  # the classifier of a fresh base is random at every load
    nn.init.normal_(model.classifier.weight)
    return model


class Images(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 6, 3, stride=2, padding=1)
        self.second = nn.Conv2d(6, 9, (2, 3), bias=False)
        self.line = nn.Conv1d(9, 5, 2)
        self.out = nn.Linear(5, 4)

    def forward(self, x):
        h = self.second(self.first(x).relu()).flatten(2)
        return self.out(self.line(h).mean(-1))


def images():
    torch.manual_seed(0)
    return Images().eval()


def base(model):
    return model.get_base_model() if isinstance(model, peft.PeftModel) else model


def outputs(model):
    pictures = torch.linspace(-1, 1, 2 * 3 * 8 * 8).view(2, 3, 8, 8).sin()
    with torch.no_grad():
        y = model(pictures if isinstance(base(model), Images) else TOKENS)
    return y if isinstance(y, torch.Tensor) else y.logits


def disturb(parameters):
    torch.manual_seed(7)
    with torch.no_grad():
        for p in parameters:
            p.add_(0.3 * torch.randn_like(p))


CASES = {
    "all linear layers": (llama, graft.LoRA(rank=4, alpha=6.0), {"targets": "all-linear"}),
    "ranks by module": (llama, graft.LoRA(rank={".*q_proj": 2, r".*1\.mlp.*": 6}, alpha=lambda s: 3.0 + s.index), {}),
    "rslora and dropout": (llama, graft.LoRA(rank=4, rslora=True, dropout=0.2), {"targets": [".*q_proj", ".*v_proj"]}),
    "modules whose names end alike": (llama, graft.LoRA(rank=2), {"targets": r"model\.layers\.1\.self_attn\.q_proj"}),
    "embedding": (llama, graft.LoRA(rank=2), {"targets": ["embed_tokens", ".*v_proj"]}),
    "Conv1D": (gpt2, graft.LoRA(rank=2), {"targets": ["c_attn", "c_fc"]}),
    "convolutions": (images, graft.LoRA(rank=6), {"targets": ["first", "second", "line", "out"]}),
    "head": (bert, graft.LoRA(rank=2), {"targets": [".*query"], "heads": ["classifier"]}),
}


@pytest.mark.parametrize("make, recipe, options", CASES.values(), ids=CASES)
def test_saved_here_loads_there_and_here(tmp_path, make, recipe, options):
    model = make()
    plain = outputs(model)
    adapter = graft.attach(model, recipe, **options)
    disturb(adapter.parameters())
    expect = outputs(model)
    assert (expect - plain).abs().max() > 1e-2
    adapter.save(tmp_path / "a", format="peft")

    theirs = peft.PeftModel.from_pretrained(make(**({"seed": 2} if make is bert else {})), tmp_path / "a").eval()
    torch.testing.assert_close(outputs(theirs), expect, rtol=1e-5, atol=1e-5)
    names = {n for n, m in base(theirs).named_modules() if hasattr(m, "base_layer")}
    assert names == {p for p in adapter.deltas if p not in dict(adapter.heads)}

    ours = make()
    again = graft.load(ours, tmp_path / "a")
    assert torch.equal(outputs(ours), expect)
    assert again.deltas.keys() == adapter.deltas.keys()
    assert not again.parameters()[0].requires_grad


THEIRS = {
    "all linear layers": (llama, {"r": 4, "lora_alpha": 6, "target_modules": "all-linear"}),
    "chosen layers": (llama, {"r": 4, "target_modules": ["q_proj", "up_proj"], "layers_to_transform": [0, 2]}),
    "an expression": (llama, {"r": 3, "target_modules": r".*\.1\.mlp\.(up|down)_proj", "lora_dropout": 0.1}),
    "excluded modules": (llama, {"target_modules": ["q_proj", "v_proj"], "exclude_modules": r".*\.0\..*"}),
    "ranks by module": (
        llama,
        {
            "r": 4,
            "use_rslora": True,
            "target_modules": ["q_proj", "v_proj", "o_proj"],
            "rank_pattern": {"^model.layers.1.self_attn.q_proj": 6, r"layers.[01].self_attn\.v_proj": 2},
            "alpha_pattern": {"o_proj": 30},
        },
    ),
    "embedding": (llama, {"r": 2, "target_modules": ["embed_tokens", "k_proj"]}),
    "Conv1D": (gpt2, {"r": 2, "target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    "convolutions": (images, {"r": 3, "target_modules": ["first", "second", "line", "out"]}),
    "head": (bert, {"r": 2, "target_modules": ["query", "value"], "task_type": "SEQ_CLS"}),
    "head of several modules": (
        bert,
        {"r": 2, "target_modules": ["query"], "modules_to_save": ["pooler", "classifier"]},
    ),
    "gaussian start": (llama, {"r": 2, "target_modules": ["q_proj"], "init_lora_weights": "gaussian"}),
}


def trained_there(make, config, folder):
    theirs = peft.get_peft_model(make(), peft.LoraConfig(**config)).eval()
    disturb(p for p in theirs.parameters() if p.requires_grad)
    theirs.save_pretrained(folder)
    return theirs


@pytest.mark.parametrize("make, config", THEIRS.values(), ids=THEIRS)
def test_saved_there_loads_here(tmp_path, make, config):
    theirs = trained_there(make, config, tmp_path)
    ours = make(**({"seed": 2} if make is bert else {}))
    graft.load(ours, tmp_path)
    torch.testing.assert_close(outputs(ours), outputs(theirs), rtol=1e-5, atol=1e-5)


def test_there_and_back_gives_the_same_tensors(tmp_path):
    config = THEIRS["ranks by module"][1] | {"modules_to_save": ["lm_head"]}
    trained_there(llama, config, tmp_path / "theirs")
    graft.load(llama(), tmp_path / "theirs").save(tmp_path / "ours", format="peft")
    before, after = (load_file(tmp_path / f / "adapter_model.safetensors") for f in ("theirs", "ours"))
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)


def change(folder, **entries):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | entries))


REFUSED = {
    "bias": ({"bias": "lora_only"}, "bias='lora_only'"),
    "start from the base": ({"init_lora_weights": "pissa"}, "path_initial_model_for_weight_conversion"),
    "a feature of later versions": ({"use_wonder": {"depth": 3}}, "use_wonder"),
    "layer replication": ({"layer_replication": [[0, 2]]}, "layer_replication"),
    "unknown method": ({"peft_type": "LORRA"}, "LORRA"),
    "no rank": ({"r": None}, "rank"),
    "another rank": ({"r": 5}, "shape"),
    "a pattern that is none": ({"rank_pattern": {"(": 3}}, "rank_pattern"),
    "a pattern that is no table": ({"alpha_pattern": [3]}, "alpha_pattern"),
    "heads that are no list": ({"modules_to_save": 3}, "modules_to_save"),
}


@pytest.mark.parametrize("entries, word", REFUSED.values(), ids=REFUSED)
def test_what_we_do_not_have_is_refused_with_its_reason(tmp_path, entries, word):
    trained_there(llama, {"r": 4, "target_modules": ["q_proj"]}, tmp_path)
    change(tmp_path, **entries)
    model = llama()
    with pytest.raises(GraftError, match=word):
        graft.load(model, tmp_path)
    assert not graft.adapters(model) and type(model.model.layers[0].self_attn.q_proj) is nn.Linear


def test_an_embedding_which_peft_saved_along_must_be_the_base_s(tmp_path):
    trained_there(llama, {"r": 2, "target_modules": ["embed_tokens"]}, tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    (along,) = (key for key in tensors if "base_layer" in key)
    tensors[along] += 1
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(GraftError, match="base_layer"):
        graft.load(llama(), tmp_path)


@pytest.mark.parametrize("damage", ["lost", "alien", "other module"])
def test_tensors_must_be_those_of_the_method(tmp_path, damage):
    trained_there(llama, {"r": 2, "target_modules": ["q_proj"]}, tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    key = next(iter(tensors))
    if damage == "lost":
        del tensors[key]
    elif damage == "alien":
        tensors[key.replace("lora_", "lore_")] = tensors[key].clone()
    else:
        tensors = {k.replace("layers.0", "layers.9"): v for k, v in tensors.items()}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(GraftError):
        graft.load(llama(), tmp_path)


@pytest.mark.parametrize("option", [{"groups": 2}, {"dilation": 2}, {"padding_mode": "circular"}])
def test_convolutions_on_which_peft_computes_something_else_are_refused(tmp_path, option):
    model = nn.Sequential(nn.Conv2d(4, 6, 3, padding=1, **option))
    adapter = graft.attach(model, graft.LoRA(rank=2), targets="0")
    with pytest.raises(GraftError, match="own format"):
        adapter.save(tmp_path / "a", format="peft")
    assert not (tmp_path / "a").exists()


def test_a_method_which_peft_lacks_is_refused(tmp_path):
    adapter = graft.attach(llama(), "full", targets="lm_head")
    with pytest.raises(GraftError, match="own format"):
        adapter.save(tmp_path / "a", format="peft")


def test_targets_are_written_so_that_peft_chooses_no_others(tmp_path):
    # "down" at the top is the end of the path of "inner.down"
    model = nn.ModuleDict({"down": nn.Linear(4, 4), "inner": nn.ModuleDict({"down": nn.Linear(4, 4)})})
    graft.attach(model, graft.LoRA(rank=2), targets=lambda path, m: path == "down").save(tmp_path / "a", format="peft")
    model = nn.ModuleDict({"down": nn.Linear(4, 4), "inner": nn.ModuleDict({"down": nn.Linear(4, 4)})})
    theirs = peft.PeftModel.from_pretrained(model, tmp_path / "a")
    assert [n for n, m in base(theirs).named_modules() if hasattr(m, "base_layer")] == ["down"]
