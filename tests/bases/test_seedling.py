"""The language models: what they know of text that no corpus held, and what they can do at once."""

import random

import pytest
import torch

import generated
from graft import bases, tasks
from graft.models import load_base

MODELS = [name for name in bases.names() if bases.find(name).card["kind"] == "causal-lm"]


@pytest.fixture(scope="module", params=MODELS)
def base(request):
    return load_base(f"graft:{request.param}", dtype="float32")


def test_text_of_the_tasks_is_far_from_chance_although_it_was_left_out(base):
    """Uniform guessing costs ln 4,096 = 8.3 a token; the docstrings of the tasks are no part of the corpus."""
    texts = [row["text"] for row in tasks.load("chapters", split="test")[:64]]
    rows = base.processor(texts, return_tensors="pt", padding=True, truncation=True, max_length=128)
    labels = rows["input_ids"].masked_fill(rows["attention_mask"] == 0, -100)
    with torch.no_grad():
        assert base.model(**rows, labels=labels).loss < 5


def test_what_was_just_read_is_copied(base):
    """Exercises that were not trained on, eight lines of the same kind before them."""
    draw = random.Random("held out")
    right, total = 0, 20
    for _ in range(total):
        before = "\n".join(generated.copy(draw) for _ in range(4))
        letters = " ".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=5))
        ids = base.processor(f"{before}\ncopy: {letters} ->", return_tensors="pt")["input_ids"]
        made = base.model.generate(ids, max_new_tokens=5, do_sample=False)[0, ids.shape[1] :]
        right += base.processor.decode(made).strip() == letters
    assert right >= 0.8 * total


def test_tokens_are_those_of_the_other_models(base):
    """A pair of models reads the same tokens."""
    other = load_base(f"graft:{MODELS[0]}").processor
    for text in ("def f(x):\n    return 2 * x\n", "The quick brown fox, 1234."):
        assert base.processor(text)["input_ids"] == other(text)["input_ids"]
        assert base.processor.decode(base.processor(text)["input_ids"]) == text
    assert base.model.config.vocab_size == len(base.processor) == 4096


@pytest.mark.parametrize("name", MODELS)
def test_the_card_has_the_model_below_the_5_gram_and_that_below_an_untrained_network(name):
    measured = bases.find(name).card["measured"]
    for kind in ("prose", "code", "generated"):
        bits = measured[f"bits per byte, {kind}"]
        assert bits[name] < bits["5-gram"] < bits["untrained"]
