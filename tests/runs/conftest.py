import json
from dataclasses import replace

import pytest
import torch
from made_up import record

from graft.runs import pool
from graft.runs.single import perform
from graft.runs.store import Store
from models import tokenizer


@pytest.fixture(scope="session")
def bases(tmp_path_factory):
    """A folder with a tiny language model, which has no biases, and a tiny encoder."""
    from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    root, words = tmp_path_factory.mktemp("bases"), tokenizer()
    sizes = dict(hidden_size=16, num_hidden_layers=1, intermediate_size=24, num_attention_heads=2)
    sizes |= dict(vocab_size=len(words), max_position_embeddings=64, pad_token_id=0, initializer_range=0.3)
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**sizes, bos_token_id=None, eos_token_id=2)).save_pretrained(root / "llama")
    BertModel(BertConfig(**sizes), add_pooling_layer=False).save_pretrained(root / "bert")
    for name in ("llama", "bert"):
        words.save_pretrained(root / name)
    return root


@pytest.fixture
def here(monkeypatch):
    """Runs in this process instead of others; gives the configurations that were run."""
    made = []

    def run(
        configurations, folder, *, jobs=1, threads=1, retry=False, limit=None, until=None, progress=True, within=None
    ):
        store = Store(folder)
        for c in configurations:
            if store.get(c) is None:
                made.append(c)
                store.put(perform(c))
        return [store.get(c) for c in configurations]

    monkeypatch.setattr(pool, "run", run)
    return made


@pytest.fixture(scope="session")
def reviews(tmp_path_factory):
    """A small file of labelled texts."""
    words = {"liked": ["good", "great", "lovely"], "disliked": ["bad", "awful", "dull"]}
    place = tmp_path_factory.mktemp("data") / "reviews.jsonl"
    rows = [
        {"text": f"the {noun} was {word} {n}", "label": label}
        for n, noun in enumerate(["film", "book", "story", "plot"])
        for label, of in words.items()
        for word in of
    ]
    place.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return place


@pytest.fixture
def some():
    """Records of a comparison that no run made: values on the test split by method, and figures of their runs."""

    def made(values, figures=None, rates=(1e-3, 1e-2), metric="test"):
        found = []
        for method, of in values.items():
            rate = None if method in ("no-op", "zero-shot") else 1e-2
            for tried in [None] if rate is None else rates:
                found.append(record(tried, 0.5 if tried == rate else 0.4, method=method))
            for seed, value in enumerate(of):
                last = record(rate, 0.5, loss=1 - value, test=value, seed=seed, method=method)
                found.append(replace(last, figures=(figures or {}).get(method, {})))
        return found

    return made
