"""A small tokenizer and texts for it, made on the spot; 33 tokens, so that the models of tests/models.py take them."""

import random

import pytest

CHAT = (
    "{% for m in messages %}<{{ m.role }}> {{ m.content }} <end> {% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)
WORDS = list("abcdefghijklmnopqrstuvwxyz")
SPECIAL = ["<pad>", "<unk>", "<eos>", "<end>", "<user>", "<assistant>", "<system>"]


@pytest.fixture
def tokenizer():
    """One token a word: the letters, and the markers of a conversation."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {w: i for i, w in enumerate(SPECIAL + WORDS)}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", unk_token="<unk>", eos_token="<eos>", model_max_length=64
    )
    made.chat_template = CHAT
    return made


@pytest.fixture(scope="session")
def sentences():
    """`count` texts of different lengths over the letters, the same for the same seed."""

    def make(count, seed=0, longest=12):
        draw = random.Random(seed)
        return [" ".join(draw.choices(WORDS, k=draw.randint(2, longest))) for _ in range(count)]

    return make
