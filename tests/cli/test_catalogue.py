"""graft methods and graft show."""

import json

import pytest
import torch

from graft.catalogue import families
from graft.core.delta import METHODS, Delta
from graft.core.factored import INITS, Initialised
from graft.core.hyper import hyperparameters
from graft.core.selection import SCORES


def test_methods_gives_the_registered_methods_as_json(graft):
    found = graft("methods", "--json").json
    listed = {m["name"]: m for m in found["methods"]}
    assert listed.keys() == METHODS.keys()
    for name, entry in listed.items():
        cls = METHODS[name]
        assert entry["mergeable"] == cls.mergeable()
        assert entry["hosts"] == list(cls.hosts)
        assert [p["url"] for p in entry["papers"]] == [p.url for p in cls.papers]
        assert [h["name"] for h in entry["hyperparameters"]] == list(hyperparameters(cls))
        assert entry["summary"] and entry["family"] in families() and entry["known"] == cls.known
    lora = {h["name"]: h for h in listed["lora"]["hyperparameters"]}
    assert lora["rank"] == {
        "name": "rank", "required": False, "default": 8, "type": ["int"], "choices": [],
        "range": "at least 1", "meaning": "rank of the update",
    }  # fmt: skip
    assert {p["year"] for p in listed["lora"]["papers"]} == {2021, 2023}


def test_families_divide_the_methods(graft):
    everything = {m["name"] for m in graft("methods", "--json").json["methods"]}
    parts = [{m["name"] for m in graft("methods", "--json", "--family", f).json["methods"]} for f in families()]
    assert set.union(*parts) == everything and sum(map(len, parts)) == len(everything)
    assert all(name in graft("methods").out for name in everything)
    assert graft("methods", "--family", "weigt").code == 2


def test_a_new_method_is_listed_and_shown(graft):
    class Shift(Delta, name="test_shift"):
        """W' = W + c, with [brackets] in the text."""

        def __init__(self, site, *, c: float = 0.5):
            super().__init__(site)

    try:
        assert "test_shift" in {m["name"] for m in graft("methods", "--json", "--family", "other").json["methods"]}
        shown = graft("show", "test_shift")
        assert "W' = W + c, with [brackets] in the text." in shown.out
        assert "0.5" in shown.out
    finally:
        del METHODS["test_shift"]


def test_initialisations_are_listed_with_the_methods_that_take_them(graft):
    listed = {i["name"]: i for i in graft("methods", "--json").json["initialisations"]}
    assert listed.keys() == INITS.keys() and {"pissa", "corda", "lora_ga"} <= listed.keys()
    takes = {name for name, cls in METHODS.items() if "init" in hyperparameters(cls) and issubclass(cls, Initialised)}
    for name, entry in listed.items():
        assert entry["known"] and entry["papers"] and set(entry["methods"]) == takes
        for method in entry["methods"]:
            asked = METHODS[method].asks(METHODS[method](init=name).hyper)
            assert {need.partition(":")[0] for need in asked} == {*entry["needs"], *METHODS[method].needs}
    shown = graft("show", "corda")
    assert "input_covariance" in shown.out and INITS["corda"].known in shown.out
    assert graft("show", "corda", "--json").json["kind"] == "initialisation"
    assert all(name in graft("methods").out for name in listed)


def test_scores_are_listed_with_the_methods_that_offer_them(graft):
    listed = {s["name"]: s for s in graft("methods", "--json").json["scores"]}
    assert listed.keys() == SCORES.keys()
    assert listed["wanda"]["methods"] == {"s2ft": "choice"} and listed["snip"]["needs"] == ["weight_grad"]
    for name, entry in listed.items():
        for method, key in entry["methods"].items():
            recipe = METHODS[method](**{key: name})
            assert set(SCORES[name].needs) <= set(METHODS[method].asks(recipe.hyper))


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
