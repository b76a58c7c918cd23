"""Train the tokenizer of the language models: `python bases/tokenizer.py CORPUS FOLDER`.

Byte-level BPE (Neural Machine Translation of Rare Words with Subword Units. Sennrich et al., 2016.
https://arxiv.org/abs/1508.07909) of 4,096 tokens: it writes any text and reads it back exactly. Digits stand apart;
lines and the spaces that indent them are pieces of their own. `<|endoftext|>` stands between documents and ends an
answer; `<|pad|>` fills batches. Nothing is put before a text.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

SIZE, LENGTH = 4096, 512
END, PAD = "<|endoftext|>", "<|pad|>"
PIECES = r"'(?:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def texts(corpus: Path, split: str = "train") -> Iterator[dict]:
    """The rows of one split: kind, source, text."""
    with open(corpus / f"{split}.jsonl", encoding="utf-8") as lines:
        yield from map(json.loads, lines)


def train(corpus: Path) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(PIECES), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=SIZE,
        special_tokens=[END, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((row["text"] for row in texts(corpus)), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        bos_token=END,
        pad_token=PAD,
        model_max_length=LENGTH,
        model_input_names=["input_ids", "attention_mask"],
    )


if __name__ == "__main__":
    made = train(Path(sys.argv[1]))
    made.save_pretrained(sys.argv[2])
    held_out = [row["text"] for row in texts(Path(sys.argv[1]), "test")]
    count = sum(map(len, made(held_out)["input_ids"]))
    print(f"{len(made)} tokens; {sum(len(text.encode()) for text in held_out) / count:.2f} bytes a token")
