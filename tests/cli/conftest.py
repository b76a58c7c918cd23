"""Tiny models with tokenizers made on the spot, data to train them on, and a command line in this process."""

import json
import random
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from graft.cli import run
from graft.runs import pool
from graft.runs.single import perform
from graft.runs.store import Store
from models import tokenizer


class Done(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def json(self):
        return json.loads(self.out)


@pytest.fixture
def graft(capsys):
    """Run a command line: graft("show", "lora")."""

    def call(*args):
        capsys.readouterr()
        code = run([str(a) for a in args])
        return Done(code, *capsys.readouterr())

    return call


def _write(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="session")
def house(tmp_path_factory) -> Path:
    """A folder with the models llama, bert, t5 and data for each of them."""
    from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration
    from transformers.utils import logging

    logging.disable_progress_bar()
    root, words = tmp_path_factory.mktemp("house"), tokenizer()
    sizes = dict(hidden_size=16, num_hidden_layers=2, intermediate_size=24, num_attention_heads=2)
    sizes |= dict(vocab_size=len(words), initializer_range=0.3)
    torch.manual_seed(0)
    models = {
        "llama": LlamaForCausalLM(
            LlamaConfig(**sizes, max_position_embeddings=64, attention_bias=True, pad_token_id=0, bos_token_id=None,
                        eos_token_id=2)
        ),
        "bert": BertModel(
            BertConfig(**sizes, max_position_embeddings=64, pad_token_id=0, hidden_dropout_prob=0.0),
            add_pooling_layer=False,
        ),
        "t5": T5ForConditionalGeneration(
            T5Config(d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, vocab_size=len(words), pad_token_id=0,
                     eos_token_id=2, decoder_start_token_id=0)
        ),
    }  # fmt: skip
    for name, model in models.items():
        model.save_pretrained(root / name)
        words.save_pretrained(root / name)
    draw = random.Random(0)
    said = {"liked": ["good", "great", "lovely"], "disliked": ["bad", "awful", "dull"]}
    rows = [
        {"text": f"the {draw.choice(['film', 'book', 'story'])} was {draw.choice(said[label])}", "label": label}
        for label in ["liked", "disliked"] * 16
    ]
    _write(root / "reviews.jsonl", rows)
    _write(root / "prompts.jsonl", [{"prompt": "the film was", "completion": " very good"}] * 8)
    _write(root / "pairs.jsonl", [{"input": "good film", "target": "great story"}] * 8)
    return root


@pytest.fixture(scope="session")
def classifier(house) -> Path:
    """A LoRA adapter with a new classifier, trained by the command line."""
    folder = house / "classifier"
    code = run(
        ["tune", f"{house}/bert", "--data", f"{house}/reviews.jsonl", "--output", str(folder), "--rank", "4"]
        + ["--learning-rate", "1e-2", "--epochs", "40", "--validation", "0.25", "--json"]
    )
    assert code == 0
    return folder


@pytest.fixture
def here(monkeypatch):
    """Runs in this process."""

    def run(configurations, folder, **options):
        for c in configurations:
            if Store(folder).get(c) is None:
                Store(folder).put(perform(c))
        return [Store(folder).get(c) for c in configurations]

    monkeypatch.setattr(pool, "run", run)
