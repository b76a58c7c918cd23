"""The recipes of the language models (the folder bases/), on a tiny corpus."""

import itertools
import json
import textwrap
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

import corpus
import generated
import ngram
import pretrain
import release
import tokenizer as tokenizers

RECIPE = {
    "name": "tiny",
    "model": {
        "hidden_size": 16, "num_hidden_layers": 2, "intermediate_size": 24, "num_attention_heads": 2,
        "num_key_value_heads": 1, "max_position_embeddings": 64, "tie_word_embeddings": True, "bos_token_id": 0,
        "eos_token_id": 0, "pad_token_id": 1,
    },
    "seed": 0, "compile": False, "tokens": 64, "lengths": [[0.0, 16], [0.5, 32]], "steps": 8, "warmup": 2,
    "decay": 0.5, "learning_rate": {"muon": 0.01, "adamw": 0.01}, "weight_decay": 0.1, "every": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A corpus of exercises in the form that corpus.py writes."""
    path = tmp_path_factory.mktemp("corpus")
    for split in corpus.SPLITS:
        rows = [
            json.dumps({"kind": kind, "source": "generated", "text": text})
            for kind in ("prose", "code", "generated")
            for text in generated.texts(f"{split} {kind}", 20_000)
        ]
        (path / f"{split}.jsonl").write_text("\n".join(rows) + "\n")
    return path


@pytest.fixture(scope="module")
def tokenizer(folder):
    return tokenizers.train(folder)


def test_the_tokenizer_gives_every_text_back(tokenizer):
    for text in ("    def f(x):\r\n\treturn  x\n\n\n", "naïve – 日本\x00 🙂", "a b c", " 1234 don't", ""):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_letters_that_stand_apart_are_tokens_of_their_own(tokenizer):
    assert tokenizer.tokenize(" a b x") == ["Ġa", "Ġb", "Ġx"]


def test_windows_of_an_epoch_do_not_overlap_and_do_not_depend_on_where_a_run_begins():
    data = np.arange(1000, dtype=np.uint16)
    per_epoch = (1000 - 9) // 10 // 4
    batches = list(itertools.islice(pretrain.windows(data, 9, 4, 0, 0), 2 * per_epoch))
    for epoch in (batches[:per_epoch], batches[per_epoch:]):
        rows = torch.cat(epoch)
        assert (rows.diff() == 1).all()
        assert len(rows.flatten().unique()) == rows.numel()
    assert not torch.equal(batches[0], batches[per_epoch])
    for first in (1, per_epoch - 1, per_epoch + 3):
        assert torch.equal(next(pretrain.windows(data, 9, 4, 0, first)), batches[first])


def test_a_run_that_stops_and_goes_on_ends_with_the_same_weights(folder, tokenizer, tmp_path):
    whole = pretrain.train(RECIPE, folder, tokenizer, tmp_path / "whole", "cpu", None)
    pretrain.train(RECIPE, folder, tokenizer, tmp_path / "parts", "cpu", 3)
    # What follows the checkpoint in the log, and half a checkpoint, are what a killed run leaves.
    with open(tmp_path / "parts" / "log.jsonl", "a") as log:
        log.write(json.dumps({"step": 4}) + "\n")
    (tmp_path / "parts" / ".checkpoint.new").mkdir()
    parts = pretrain.train(RECIPE, folder, tokenizer, tmp_path / "parts", "cpu", None)
    for (name, a), b in zip(whole.model.named_parameters(), parts.model.parameters()):
        assert torch.equal(a, b), name
    steps = [json.loads(line)["step"] for line in (tmp_path / "parts" / "log.jsonl").read_text().splitlines()]
    assert steps == [2, 3, 4, 6, 8]


def test_the_rate_rises_stays_and_falls_to_zero():
    rates = [pretrain.rate(step, 100, 10, 0.3) for step in range(101)]
    assert rates[0] == 0.1 and rates[9:71] == [1.0] * 62 and rates[100] == 0
    assert rates[85] == pytest.approx(0.5)


def test_the_ngram_model_is_interpolated_kneser_ney():
    """Against the definition, written out with dictionaries."""
    draw = np.random.default_rng(0)
    train, test = draw.integers(0, 5, 400), draw.integers(0, 5, 50)
    counts = {3: Counter(tuple(train[i : i + 3]) for i in range(398))}
    for n in (2, 1):
        counts[n] = Counter(gram[1:] for gram in counts[n + 1])

    def p(n, gram):
        if n == 0:
            return 1 / 5
        of = {g: c for g, c in counts[n].items() if g[:-1] == gram[:-1]}
        ones, twos = (sum(c == k for c in counts[n].values()) for k in (1, 2))
        discount = ones / (ones + 2 * twos) if ones and twos else 0.5
        if not of:
            return p(n - 1, gram[1:])
        rest = discount * len(of) * p(n - 1, gram[1:])
        return (max(of.get(gram, 0) - discount, 0) + rest) / sum(of.values())

    expected = [p(3, tuple(test[i : i + 3])) for i in range(48)]
    np.testing.assert_allclose(ngram.KneserNey(train, 3, 5).probabilities(test), expected, rtol=1e-12)


def test_bits_count_every_token_once(folder, tokenizer):
    """A network that gives all tokens the same share needs log2(size) bits for each."""
    model = pretrain.Run(RECIPE | {"model": RECIPE["model"] | {"max_position_embeddings": 512}}, 64, "cpu").model
    torch.nn.init.zeros_(model.lm_head.weight)
    for count in (2, 511, 512, 513, 768, 1000, 1300):
        data = np.random.default_rng(count).integers(0, 64, count)
        assert release.bits(model, data) == pytest.approx(6 * (count - 1), rel=1e-4)


def test_texts_without_docstrings_are_still_the_same_code():
    import ast

    source = Path(corpus.__file__).read_text()
    lines = source.split("\n")
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef):
            (bare,) = ast.parse(corpus.without_docstrings(node, lines)).body
            assert ast.get_docstring(bare) is None
            body = node.body[1:] if ast.get_docstring(node) else node.body
            assert [ast.dump(n) for n in bare.body] == [ast.dump(n) for n in body]


def test_no_file_of_the_tasks_is_a_source_of_the_corpus():
    from graft.tasks import chapters

    modules = {name for name, _ in chapters.sources()}
    files = {file.removesuffix(".py").removesuffix("/__init__").replace("/", ".") for file, _ in corpus.library_files()}
    assert files and not files & modules


def test_copies_of_what_the_tasks_are_made_of_are_seen():
    from graft.tasks import chapters, code

    taken = {line for _, source in chapters.sources() for line in corpus.long_lines(source.decode("utf-8", "replace"))}
    for function in code.functions()[:200]:
        if corpus.long_lines(function.code):
            assert corpus.copied(function.code, taken)
            assert corpus.copied(textwrap.indent(function.code, "        "), taken)
    assert not corpus.copied("A sentence of this very test, which no module of the library has.", taken)
    assert not corpus.copied("", taken)
