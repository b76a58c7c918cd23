"""Base models by name, and what `tune` does beyond the command line."""

import pytest
import torch
from torch import nn

import graft as library
from graft import models
from graft.core.delta import METHODS, Delta
from graft.core.errors import GraftError
from published import announce

OWN = """
from torch import nn
from transformers import BertConfig, BertModel, BertPreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput


class TinyConfig(BertConfig):
    model_type = "tiny-of-its-own"


class TinyForSequenceClassification(BertPreTrainedModel):
    config_class = TinyConfig

    def __init__(self, config):
        super().__init__(config)
        self.bert = BertModel(config, add_pooling_layer=False)
        self.judge = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def forward(self, input_ids, attention_mask=None, **kwargs):
        hidden = self.bert(input_ids, attention_mask=attention_mask).last_hidden_state
        return SequenceClassifierOutput(logits=self.judge(hidden.max(1).values))
"""


def test_a_base_may_define_a_model_that_transformers_does_not_have(graft, house, tmp_path, monkeypatch):
    made = {}
    exec(OWN, made)
    torch.manual_seed(0)
    config = made["TinyConfig"](**library.load_base(house / "bert").model.config.to_dict() | {"num_labels": 2})
    model = made["TinyForSequenceClassification"](config)
    announce(monkeypatch, tmp_path / "site", "tiny-two", model, code=OWN, kind="encoder")
    loaded = library.load_base("graft:tiny-two", dtype="float32")
    assert loaded.heads == [] and type(loaded.model).__module__ == "tiny_two"
    assert torch.equal(loaded.model.judge.weight, model.judge.weight.bfloat16().float())
    shown = graft("show", "tiny-two", "--json").json
    assert shown["class"] == "TinyForSequenceClassification"
    run = ["--data", house / "reviews.jsonl", "--output", tmp_path / "a", "--steps", 2, "--dtype", "float32", "--json"]
    done = graft("tune", "tiny-two", *run)
    assert done.code == 0, done.err
    ask = ["--text", "the film was good", "--dtype", "float32", "--json"]
    said = graft("predict", "graft:tiny-two", "--adapter", tmp_path / "a", *ask).json
    merged = ["--adapter", tmp_path / "a", "--output", tmp_path / "plain", "--dtype", "float32"]
    assert graft("merge", "graft:tiny-two", *merged).code == 0
    plain = graft("predict", tmp_path / "plain", "--objective", "classification", *ask).json
    assert plain[0]["label"] == said[0]["label"]
    assert plain[0]["probability"] == pytest.approx(said[0]["probability"], rel=1e-4)


def test_new_heads_are_the_same_in_every_load(house):
    options = dict(objective="classification", labels=["a", "b", "c"])
    torch.manual_seed(1)
    first = library.load_base(house / "bert", **options)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    second = library.load_base(house / "bert", **options)
    assert torch.equal(torch.get_rng_state(), state)
    assert first.heads == second.heads == ["bert.pooler", "classifier"]
    assert first.model.config.id2label == {0: "a", 1: "b", 2: "c"}
    for (name, a), b in zip(first.model.named_parameters(), second.model.parameters()):
        assert torch.equal(a, b), name


def test_a_classifier_that_knows_the_labels_keeps_its_head(house, classifier, tmp_path):
    base = library.load_adapted(house / "bert", classifier)
    library.save_merged(base.model, tmp_path / "plain", base.processor)
    examples = [{"text": "good film", "label": "liked"}]
    again = library.load_base(tmp_path / "plain", objective="classification", examples=examples)
    assert again.heads == []
    other = library.load_base(tmp_path / "plain", objective="classification", labels=["x", "y", "z"])
    assert other.heads == ["classifier"] and other.model.classifier.out_features == 3


def test_regression_loads_as_many_outputs_as_numbers(house, tmp_path):
    rows = [{"text": f"{'good ' * i}film", "label": [i / 4, 1 - i / 4]} for i in range(4)]
    done = library.tune(
        house / "bert", rows, objective="regression", steps=2, output=tmp_path / "numbers", progress=False
    )
    wanted = library.predict(done.base.model, rows, **done.base.arguments())
    base = library.load_adapted(house / "bert", tmp_path / "numbers")
    assert base.model.config.num_labels == 2 and base.objective == "regression"
    torch.testing.assert_close(
        torch.tensor(library.predict(base.model, rows, **base.arguments())), torch.tensor(wanted), rtol=0, atol=0
    )


def test_presets_leave_out_what_belongs_to_a_new_head(house):
    base = library.load_base(house / "bert", objective="classification", labels=["a", "b"])
    adapter = library.attach(base.model, "lora", "all-linear", heads=base.heads)
    assert not any(path.startswith("bert.pooler.") for path in adapter.deltas)
    adapter.detach()
    with pytest.raises(GraftError, match=r"belongs to the head bert\.pooler"):
        library.attach(base.model, "lora", [r"pooler\.dense", "query"], heads=base.heads)


def test_statistics_are_collected_for_methods_that_need_them(house):
    seen = {}

    class Along(Delta, name="test_along"):
        """W' = W + a G, with the gradient G [out, in] of the loss."""

        needs = ("weight_grad",)
        hosts = ("linear",)

        def __init__(self, site):
            super().__init__(site)
            seen[site.path] = site.stats["weight_grad"]
            self.a = nn.Parameter(torch.zeros(()))
            self.register_buffer("g", site.stats["weight_grad"].clone())

        def weight(self, w):
            return w + self.a * self.g

    try:
        library.tune(
            house / "llama", f"{house}/prompts.jsonl", method="test_along", targets="qv", steps=1, progress=False,
            examples_for_statistics=2,
        )  # fmt: skip
    finally:
        del METHODS["test_along"]
    base = library.load_base(house / "llama", objective="causal-lm")
    ids = base.processor(["the film was very good</s>"], return_tensors="pt")["input_ids"]
    labels = ids.clone()
    labels[:, :3] = -100
    model = base.model.requires_grad_(True)
    model(input_ids=ids, labels=labels).loss.backward()
    path = "model.layers.0.self_attn.q_proj"
    torch.testing.assert_close(seen[path], model.get_submodule(path).weight.grad, rtol=1e-4, atol=1e-6)


def test_a_failed_merge_leaves_nothing(house, tmp_path, monkeypatch):
    base = library.load_base(house / "llama")
    adapter = library.attach(base.model, "lora", "qv")
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(0.1)
    before = {k: v.clone() for k, v in base.model.state_dict().items()}
    monkeypatch.setattr(models, "_check", lambda *_: (_ for _ in ()).throw(GraftError("no")))
    with pytest.raises(GraftError, match="no"):
        library.save_merged(base.model, tmp_path / "plain")
    assert list(tmp_path.iterdir()) == []
    after = base.model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)
    assert adapter.active
    with torch.no_grad():
        next(iter(adapter.parameters())).fill_(float("nan"))
    with pytest.raises(GraftError, match="NaN"):
        library.save_merged(base.model, tmp_path / "plain")
    assert list(tmp_path.iterdir()) == []
