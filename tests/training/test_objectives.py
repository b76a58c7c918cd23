from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn

import models
from graft.core.errors import GraftError
from graft.training import objectives, predict
from graft.training.evaluation import choose, evaluate, measure
from graft.training.guards import check_packing

CPU = torch.device("cpu")


def t5():
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    sizes = dict(vocab_size=50, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0)
    return T5ForConditionalGeneration(T5Config(**sizes, initializer_factor=1.5)).eval()


def vit(**config):
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    sizes = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=8)
    made = ViTConfig(**(sizes | config), patch_size=4, num_labels=2, initializer_range=0.3)
    return ViTForImageClassification(made).eval()


def pixels(images, return_tensors):
    return {"pixel_values": torch.stack([torch.tensor(np.asarray(i)).permute(2, 0, 1).float() / 255 for i in images])}


def task_for(name, model, processor, **options):
    return objectives.find(name)(model, processor, **options)


# Against the losses of transformers


def test_losses_are_those_of_transformers(tokenizer, sentences):
    texts, others = sentences(6), sentences(6, seed=1)
    cases = [
        ("classification", models.bert(2), [{"text": t, "label": i % 2} for i, t in enumerate(texts)]),
        ("regression", models.bert(1), [{"text": t, "label": i / 3} for i, t in enumerate(texts)]),
        ("causal-lm", models.llama(), [{"text": t} for t in texts]),
        ("causal-lm", models.gpt2(), [{"prompt": t, "completion": " " + o} for t, o in zip(texts, others)]),
        ("seq2seq", t5(), [{"input": t, "target": o} for t, o in zip(texts, others)]),
    ]
    for name, model, examples in cases:
        task = task_for(name, model, tokenizer)
        batch = task.collate(task.features(examples))
        with torch.no_grad():
            loss = task.loss(model, batch)[0] / task.terms(batch)
            if name == "regression":
                batch["labels"] = batch["labels"][:, 0]
            theirs = model(**batch).loss
        assert loss.item() == pytest.approx(theirs.item(), rel=1e-5), name


def test_the_head_computes_only_where_a_row_carries_loss(tokenizer):
    model, rows = models.llama(), [{"prompt": "a b c d", "completion": " e"}, {"prompt": "a b", "completion": " c d"}]
    task = task_for("causal-lm", model, tokenizer)
    batch = task.collate(task.features(rows))
    places = (batch["labels"][:, 1:] != -100).any(0).sum()
    shapes = []
    model.lm_head.register_forward_hook(lambda m, args, out: shapes.append(out.shape[:2]))
    task.loss(model, batch)
    assert shapes == [(2, places)] and places < batch["input_ids"].shape[1] - 1


def test_auto_goes_by_the_columns():
    cases = {
        "classification": {"text": "a", "label": "x", "extra": 1},
        "regression": {"text": "a", "label": 0.5},
        "causal-lm": {"text": "a"},
        "seq2seq": {"input": "a", "target": "b"},
        "image-classification": {"image": None, "label": 1},
    }
    for name, example in cases.items():
        assert objectives.guess([example]).name == name
    assert objectives.guess([{"prompt": "a", "completion": "b"}]).name == "causal-lm"
    assert objectives.guess([{"messages": []}]).name == "causal-lm"
    with pytest.raises(GraftError, match="no objective fits data with the columns sentence"):
        objectives.guess([{"sentence": "a"}])
    with pytest.raises(GraftError, match="'clasification': did you mean classification"):
        objectives.find("clasification")


# Metrics


def test_metrics_are_those_of_scikit_learn(tokenizer, sentences):
    pearsonr = pytest.importorskip("scipy.stats").pearsonr
    from sklearn import metrics

    texts = sentences(40)
    model = models.bert(3, initializer_range=0.5)
    examples = [{"text": t, "label": i % 3} for i, t in enumerate(texts)]
    said = [int(p["label"]) for p in predict(model, examples, objective="classification", processor=tokenizer,
                                             labels=["0", "1", "2"])]  # fmt: skip
    scores = evaluate(model, examples, processor=tokenizer, labels=["0", "1", "2"], batch_size=7)
    assert len(set(said)) > 1
    assert scores["accuracy"] == pytest.approx(metrics.accuracy_score([e["label"] for e in examples], said))
    assert scores["f1"] == pytest.approx(metrics.f1_score([e["label"] for e in examples], said, average="macro"))

    model = models.bert(1, initializer_range=0.5)
    examples = [{"text": t, "label": len(t) / 10} for t in texts]
    true, said = [e["label"] for e in examples], predict(model, examples, objective="regression", processor=tokenizer)
    scores = evaluate(model, examples, processor=tokenizer, batch_size=7)
    assert scores["mse"] == pytest.approx(metrics.mean_squared_error(true, said), rel=1e-5) == scores["loss"]
    assert scores["mae"] == pytest.approx(metrics.mean_absolute_error(true, said), rel=1e-5)
    assert scores["r2"] == pytest.approx(metrics.r2_score(true, said), rel=1e-5)
    assert scores["pearson"] == pytest.approx(pearsonr(true, said).statistic, rel=1e-4)


@pytest.mark.parametrize("name", ["causal-lm", "seq2seq"])
def test_metrics_over_tokens_do_not_depend_on_the_batches(name, tokenizer, sentences):
    model = models.llama() if name == "causal-lm" else t5()
    texts = sentences(11)
    examples = [{"text": t, "input": t, "target": t} for t in texts]
    task = task_for(name, model, tokenizer)
    features = task.features(examples)
    one, many = (measure(model, task, features, size, CPU, False) for size in (11, 2))
    assert one == pytest.approx(many, rel=1e-5)
    assert one["perplexity"] == pytest.approx(np.exp(one["loss"]))
    assert 0 < one["token_accuracy"] < 1


def test_evaluation_leaves_every_mode_as_it_was(tokenizer, sentences):
    model = models.bert(2)
    model.train()
    model.bert.encoder.layer[0].eval()
    before = [m.training for m in model.modules()]
    evaluate(model, [{"text": t, "label": i % 2} for i, t in enumerate(sentences(4))], processor=tokenizer)
    assert [m.training for m in model.modules()] == before


# Labels


def test_labels_have_the_order_of_the_model_the_data_or_the_alphabet(tokenizer):
    import datasets

    def ids(values, model=None, labels=None, features=None):
        examples = [{"text": "a", "label": v} for v in values]
        if features:
            examples = datasets.Dataset.from_list(examples, features=features)
        task = task_for("classification", model or models.bert(2), tokenizer, labels=labels)
        return [f["labels"] for f in task.features(examples)], task.labels

    assert ids(["no", "yes", "no"]) == ([0, 1, 0], ["no", "yes"])
    assert ids([2, 0, 2]) == ([2, 0, 2], ["0", "1", "2"])  # numbers of classes
    assert ids([10, 2, 10]) == ([1, 0, 1], ["2", "10"])  # numbers as names, by size
    assert ids([True, False]) == ([1, 0], ["False", "True"])
    assert ids(["no"], labels=["yes", "no"]) == ([1], ["yes", "no"])
    named = models.bert(2)
    named.config.id2label = {0: "yes", 1: "no"}
    assert ids(["no", "yes"], named) == ([1, 0], ["yes", "no"])
    assert ids([1, 0], named) == ([1, 0], ["yes", "no"])
    table = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])})
    assert ids([1, 0], features=table) == ([1, 0], ["no", "yes"])
    assert ids([1, 0], named, features=table) == ([0, 1], ["yes", "no"])  # by name, not by number
    with pytest.raises(GraftError, match="row 1 has the label 'maybe', which is none of yes, no"):
        ids(["no", "maybe"], named)


def test_a_model_with_another_number_of_outputs_is_refused(tokenizer):
    with pytest.raises(
        GraftError, match="the model has 2 outputs and the data 3 labels: load the model with num_labels=3"
    ):
        evaluate(models.bert(2), [{"text": "a", "label": c} for c in "xyz"], processor=tokenizer)
    with pytest.raises(GraftError, match="row 0 has the label 'x', which is not a number"):
        evaluate(models.bert(1), [{"text": "a", "label": "x"}], processor=tokenizer, objective="regression")


def test_pairs_of_texts_are_read_as_the_tokenizer_joins_them(tokenizer):
    task = task_for("classification", models.bert(2), tokenizer)
    pair = task.features([{"text": "a b", "text_pair": "c", "label": 0}])[0]
    assert pair["input_ids"].tolist() == tokenizer("a b", "c")["input_ids"]


# Predictions


def test_generation_does_not_depend_on_the_other_rows(tokenizer, sentences):
    for name, model in (("causal-lm", models.llama(initializer_range=0.3)), ("seq2seq", t5())):
        examples = [{"prompt": t, "input": t} for t in sentences(4)]
        options = {"objective": name, "processor": tokenizer, "max_new_tokens": 5}
        together = predict(model, examples, **options)
        assert together == [predict(model, [e], **options)[0] for e in examples]
        assert len(set(together)) > 1


def test_a_conversation_is_answered_after_its_last_question(tokenizer):
    model = models.llama(initializer_range=0.3)
    asked = [{"role": "user", "content": "b c"}]
    answered = [*asked, {"role": "assistant", "content": "d"}]
    options = {"objective": "causal-lm", "processor": tokenizer, "max_new_tokens": 5}
    header = [{"prompt": "<user> b c <end> <assistant> "}]
    assert predict(model, [{"messages": asked}], **options) == predict(model, header, **options)
    assert predict(model, [{"messages": answered}], **options) == predict(model, header, **options)


def test_what_does_not_write_text_refuses_options_of_generation(tokenizer):
    with pytest.raises(GraftError, match="classification does not generate: max_new_tokens"):
        predict(models.bert(2), [{"text": "a"}], objective="classification", processor=tokenizer, max_new_tokens=3)


# Images


def test_images_come_as_objects_paths_bytes_or_arrays(tmp_path):
    Image = pytest.importorskip("PIL.Image")

    arrays = [np.random.default_rng(i).integers(0, 255, (8, 8, 3), dtype=np.uint8) for i in range(4)]
    paths = [tmp_path / f"{i}.png" for i in range(4)]
    for array, path in zip(arrays, paths):
        Image.fromarray(array).save(path)
    images = [arrays[0], str(paths[1]), {"bytes": paths[2].read_bytes()}, Image.open(paths[3])]
    model = vit()
    task = task_for("image-classification", model, pixels)
    examples = [{"image": image, "label": i % 2} for i, image in enumerate(images)]
    batch = task.collate([task.features(examples)[i] for i in range(4)])
    expected = pixels(arrays, "pt")["pixel_values"]
    assert torch.equal(batch["pixel_values"], expected) and batch["labels"].tolist() == [0, 1, 0, 1]
    assert task.loss(model, batch)[0].item() == pytest.approx(4 * model(expected, labels=batch["labels"]).loss.item())
    (tmp_path / "bad.png").write_text("no image")
    with pytest.raises(GraftError, match=r"cannot read the image .*bad\.png"):
        predict(model, [{"image": str(tmp_path / "bad.png")}], objective="image-classification", processor=pixels)


def test_a_model_of_one_channel_gets_images_in_grey(tmp_path):
    Image = pytest.importorskip("PIL.Image")

    model = vit(num_channels=1)
    array = np.random.default_rng(0).integers(0, 255, (8, 8, 3), dtype=np.uint8)
    file, bright = tmp_path / "0.png", np.asarray(Image.fromarray(array).convert("L"))
    Image.fromarray(array).save(file)
    task = task_for("image-classification", model, pixels)
    images = [array, str(file), Image.fromarray(array), bright, bright[..., None], Image.fromarray(bright)]
    batch = task.pixels(images)["pixel_values"]
    assert batch.shape == (6, 1, 8, 8)
    assert (batch - torch.tensor(bright) / 255).abs().max() < 1.01 / 255  # Pillow rounds otherwise
    assert torch.equal(batch[0], batch[1]) and torch.equal(batch[3], batch[5])
    alike = np.repeat(bright[..., None], 3, axis=-1)
    assert torch.equal(task.pixels([alike])["pixel_values"][0], batch[3])


# Flow matching


def dew(**config):
    from graft.bases.dew import DewConfig, DewForImageGeneration

    torch.manual_seed(0)
    sizes = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, num_labels=3)
    model = DewForImageGeneration(DewConfig(**(sizes | config))).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return model


def drawings(count):
    draw = np.random.default_rng(0)
    return [{"image": draw.integers(0, 255, (8, 8, 3), dtype=np.uint8), "label": str(i % 3)} for i in range(count)]


def test_flow_matching_is_for_models_that_are_made_for_it():
    rows = drawings(2)
    assert objectives.guess(rows).name == objectives.guess(rows, "ViTModel").name == "image-classification"
    assert objectives.guess(rows, "DewForImageGeneration").name == "flow-matching"
    assert choose("auto", rows, dew()).name == "flow-matching" and choose("auto", rows, vit()).name != "flow-matching"
    for name in ("BertForSequenceClassification", "LlamaForCausalLM"):  # the data comes first
        assert objectives.guess([{"text": "a", "label": "b"}], name).name == "classification"
        assert objectives.guess([{"text": "a"}], name).name == "causal-lm"


def test_the_loss_of_a_flow_is_its_formula_at_the_fixed_times_and_noises():
    model, rows = dew(), drawings(4)
    task = task_for("flow-matching", model, pixels)
    batch = task.collate([task.features(rows)[i] for i in range(4)])
    images, total = batch["pixel_values"], 0.0
    noises = torch.randn(8, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for i, noise in enumerate(noises):
            t = (i + 0.5) / 8
            said = model(t * images + (1 - t) * noise, torch.full((4,), t), batch["labels"])
            total += sum(float((v - (x - noise)).square().mean()) for v, x in zip(said, images)) / 8
        assert float(task.loss(model, batch)[0]) == pytest.approx(total, rel=1e-5) and task.terms(batch) == 4


def test_a_measured_flow_depends_on_nothing_but_the_images():
    model, rows = dew(), drawings(11)
    task = task_for("flow-matching", model, pixels)
    features = task.features(rows)
    found = []
    for seed, size in ((0, 11), (1, 2)):
        torch.manual_seed(seed)
        found.append(measure(model, task, features, size, CPU, False)["loss"])
    assert found[0] == pytest.approx(found[1], rel=1e-5)


def test_training_a_flow_draws_anew_from_the_seed_and_drops_labels():
    model, rows = dew(label_dropout=0.3), drawings(6)
    task = task_for("flow-matching", model.train(), pixels)
    batch = task.collate([task.features(rows)[i] for i in range(6)])
    seen, first, losses = [], model.label_embedding.forward, []
    model.label_embedding.forward = lambda labels: seen.append(labels) or first(labels)
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        losses.append(float(task.loss(model, batch)[0].detach()))
    assert losses[0] == losses[1] != losses[2]
    for _ in range(300):
        task.loss(model, batch)
    seen = torch.stack(seen)
    assert ((seen == batch["labels"]) | (seen == 3)).all()
    assert (seen == 3).double().mean() == pytest.approx(0.3, abs=0.04)


def test_a_flow_says_the_label_of_the_least_loss():
    model, rows = dew(), drawings(7)
    task = task_for("flow-matching", model, pixels, labels=["0", "1", "2"])
    losses = []
    for label in "012":
        features = task.features([{**row, "label": label} for row in rows])
        with torch.no_grad():
            losses.append(task.loss(model, task.collate([features[i] for i in range(7)]))[1])
    losses = torch.stack(losses, 1)
    said = predict(model, rows, objective="flow-matching", processor=pixels, labels=["0", "1", "2"], batch_size=3)
    assert [s["label"] for s in said] == [str(i) for i in losses.argmin(1).tolist()]
    weights = (-losses * 32).softmax(1).amax(1)  # 64 pixels, halved
    assert [s["probability"] for s in said] == pytest.approx(weights.tolist(), rel=1e-3)


# Packing


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("make", [models.llama, models.gpt2])
def test_a_packed_row_computes_what_its_rows_compute_alone(make, attention, tokenizer, sentences):
    model = make(attn_implementation=attention)
    assert model.config._attn_implementation == attention
    examples = [{"text": t} for t in sentences(9)]
    packed, alone = (task_for("causal-lm", model, tokenizer, max_length=24, packing=p) for p in (True, False))
    rows = packed.features(examples)
    assert len(rows) < 9
    batch = packed.collate(rows)
    with torch.no_grad():
        logits = model(**{k: v for k, v in batch.items() if k != "labels"}).logits
        for row, out in zip(rows, logits):
            starts = [*np.flatnonzero(row["position_ids"] == 0), len(row["input_ids"])]
            for a, b in pairwise(starts):
                single = model(input_ids=torch.tensor(row["input_ids"][None, a:b]).long()).logits[0]
                assert torch.allclose(out[a:b], single, atol=1e-5, rtol=1e-4)
    losses = [sum_of(model, t, t.features(examples)) for t in (packed, alone)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def sum_of(model, task, features):
    batch = task.collate(features)
    with torch.no_grad():
        return task.loss(model, batch)[0].item(), task.terms(batch)


def test_for_flash_attention_a_batch_is_one_row_without_padding(tokenizer, sentences):
    model = models.llama()
    model.config._attn_implementation = "flash_attention_2"
    task = task_for("causal-lm", model, tokenizer, max_length=24, packing=True)
    rows = task.features([{"text": t} for t in sentences(9)])
    batch = task.collate(rows)
    assert set(batch) == {"input_ids", "labels", "position_ids"}
    assert batch["input_ids"].shape == (1, sum(len(r["input_ids"]) for r in rows))
    assert (batch["position_ids"] == 0).sum() == 9


class Recurrent(nn.Module):
    """Carries a state from left to right, whatever the mask says."""

    def __init__(self):
        super().__init__()
        self.embedding, self.rnn, self.head = nn.Embedding(33, 8), nn.GRU(8, 8, batch_first=True), nn.Linear(8, 33)

    def forward(self, input_ids, attention_mask=None, position_ids=None):
        return self.head(self.rnn(self.embedding(input_ids))[0])


def test_a_model_in_which_packed_examples_see_each_other_is_refused(tokenizer, sentences):
    examples = [{"text": t} for t in sentences(9)]
    for model, refused in ((models.llama(), False), (models.gpt2(), False), (Recurrent(), True)):
        task = task_for("causal-lm", model, tokenizer, max_length=24, packing=True)
        features = task.features(examples)
        if refused:
            with pytest.raises(GraftError, match="Recurrent computes something else"):
                check_packing(model, task, features, CPU, False)
        else:
            check_packing(model, task, features, CPU, False)
            check_packing(model, task, features, CPU, True)


def test_only_causal_language_models_pack(tokenizer):
    with pytest.raises(GraftError, match="classification cannot put several examples in a row"):
        task_for("classification", models.bert(2), tokenizer, packing=True)
