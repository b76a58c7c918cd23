"""graft methods and graft show."""

import json

import pytest
import torch

from graft.catalogue import families
from graft.core.delta import METHODS, Delta
from graft.core.hyper import hyperparameters


def test_methods_gives_the_registered_methods_as_json(graft):
    listed = {m["name"]: m for m in graft("methods", "--json").json}
    assert listed.keys() == METHODS.keys()
    for name, entry in listed.items():
        cls = METHODS[name]
        assert entry["mergeable"] == cls.mergeable()
        assert entry["hosts"] == list(cls.hosts)
        assert [p["url"] for p in entry["papers"]] == [p.url for p in cls.papers]
        assert [h["name"] for h in entry["hyperparameters"]] == list(hyperparameters(cls))
        assert entry["summary"] and entry["family"] in families()
    lora = {h["name"]: h for h in listed["lora"]["hyperparameters"]}
    assert lora["rank"] == {
        "name": "rank", "required": False, "default": 8, "type": ["int"], "choices": [],
        "range": "at least 1", "meaning": "rank of the update",
    }  # fmt: skip
    assert {p["year"] for p in listed["lora"]["papers"]} == {2021, 2023}


def test_families_divide_the_methods(graft):
    everything = {m["name"] for m in graft("methods", "--json").json}
    parts = [{m["name"] for m in graft("methods", "--json", "--family", f).json} for f in families()]
    assert set.union(*parts) == everything and sum(map(len, parts)) == len(everything)
    assert all(name in graft("methods").out for name in everything)
    assert graft("methods", "--family", "weigt").code == 2


def test_a_new_method_is_listed_and_shown(graft):
    class Shift(Delta, name="test_shift"):
        """W' = W + c, with [brackets] in the text."""

        def __init__(self, site, *, c: float = 0.5):
            super().__init__(site)

    try:
        assert "test_shift" in {m["name"] for m in graft("methods", "--json", "--family", "other").json}
        shown = graft("show", "test_shift")
        assert "W' = W + c, with [brackets] in the text." in shown.out
        assert "0.5" in shown.out
    finally:
        del METHODS["test_shift"]


def test_show_tells_what_an_adapter_holds(graft, classifier):
    shown = graft("show", classifier, "--json").json
    assert shown["kind"] == "adapter" and shown["method"] == "lora" and shown["heads"] == ["bert.pooler", "classifier"]
    from safetensors.torch import load_file

    tensors = load_file(classifier / "adapter_model.safetensors")
    assert shown["parameters"] == sum(t.numel() for t in tensors.values())
    assert shown["tensors"] == {k: list(t.shape) for k, t in tensors.items()}
    assert shown["sites"] == 12
    assert "classifier" in graft("show", classifier).out


def test_show_reads_a_folder_of_peft(graft, house, tmp_path):
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(house / "llama")
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    model.save_pretrained(tmp_path / "theirs")
    shown = graft("show", tmp_path / "theirs", "--json").json
    assert (shown["format"], shown["method"]) == ("peft", "lora")
    assert shown["parameters"] == sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_show_resolves_targets_of_a_model_without_its_weights(graft, house, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("weights were read")

    monkeypatch.setattr("transformers.PreTrainedModel.from_pretrained", refuse)
    shown = graft("show", house / "llama", "--targets", "qv", "--json").json
    assert shown["kind"] == "model" and shown["class"] == "LlamaForCausalLM"
    projections = [f"model.layers.{i}.self_attn.{p}_proj" for i in range(2) for p in "qv"]
    assert [t["path"] for t in shown["targets"]] == projections == shown["presets"]["qv"]
    assert len(shown["presets"]["all-linear"]) == 14
    listed = graft("show", house / "llama", "--targets", "q_proj,v_proj", "--json").json
    assert [t["path"] for t in listed["targets"]] == projections


def test_what_is_printed_for_machines_is_json_alone(graft, house):
    done = graft("show", house / "bert", "--json")
    json.loads(done.out)
    assert done.err == ""
    assert torch.is_grad_enabled()


def test_an_unknown_name_gets_near_misses(graft):
    done = graft("show", "lroa")
    assert done.code == 2 and "lora" in done.err and done.err.count("\n") == 1
