import numpy as np
import pytest

import models
from graft.core.errors import GraftError
from graft.training import text

CONVERSATION = [
    {"role": "system", "content": "a"},
    {"role": "user", "content": "b c"},
    {"role": "assistant", "content": "d e"},
    {"role": "user", "content": "f"},
    {"role": "assistant", "content": "g"},
]
MARKED = (
    "{% for m in messages %}<{{ m.role }}> {% if m.role == 'assistant' %}{% generation %}{{ m.content }} <end>"
    "{% endgeneration %} {% else %}{{ m.content }} <end> {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)
FORGETFUL = (  # as some reasoning templates: only the last answer keeps its first word
    "{% for m in messages %}<{{ m.role }}> {{ m.content if loop.last or m.role != 'assistant' else m.content[2:] }} "
    "<end> {% endfor %}{% if add_generation_prompt %}<assistant> {% endif %}"
)


def learnt(tokenizer, tokens):
    return tokenizer.decode(tokens["labels"][tokens["labels"] != text.IGNORED])


def test_chat_learns_the_assistants_turns_and_nothing_else(tokenizer):
    tokens = text.chat(tokenizer, CONVERSATION, 64)
    assert tokenizer.decode(tokens["input_ids"]) == (
        "<system> a <end> <user> b c <end> <assistant> d e <end> <user> f <end> <assistant> g <end>"
    )
    assert learnt(tokenizer, tokens) == "d e <end> g <end>"


def test_both_ways_of_finding_the_turns_agree(tokenizer):
    derived = text.chat(tokenizer, CONVERSATION, 64)
    tokenizer.chat_template = MARKED
    marked = text.chat(tokenizer, CONVERSATION, 64)
    assert all(np.array_equal(derived[k], marked[k]) for k in derived)


def test_a_template_that_rewrites_earlier_turns_is_refused(tokenizer):
    tokenizer.chat_template = FORGETFUL
    with pytest.raises(GraftError, match="writes message 2 differently"):
        text.chat(tokenizer, CONVERSATION, 64)
    assert learnt(tokenizer, text.chat(tokenizer, CONVERSATION[:3], 64)) == "d e <end>"  # no later turn, no doubt


def test_columns_that_a_table_filled_with_none_do_not_reach_the_template(tokenizer):
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "{{ m.content }}", "{{ m.content }}{{ ' z' if m.tools is defined }}"
    )
    padded = [{**m, "tools": None} for m in CONVERSATION]
    assert "z" not in tokenizer.decode(text.chat(tokenizer, padded, 64)["input_ids"])


def test_conversations_that_cannot_be_learnt_from_are_refused(tokenizer):
    with pytest.raises(GraftError, match="no message of the role 'assistant'"):
        text.chat(tokenizer, CONVERSATION[:2], 64)
    with pytest.raises(GraftError, match="needs role and content, this one has role"):
        text.chat(tokenizer, [{"role": "user"}], 64)
    tokenizer.chat_template = None
    with pytest.raises(GraftError, match="no chat template"):
        text.chat(tokenizer, CONVERSATION, 64)


def test_a_completion_is_learnt_with_its_end_and_the_prompt_is_not(tokenizer):
    tokens = text.completion(tokenizer, "a b c", " d e", 64)
    assert tokenizer.decode(tokens["input_ids"]) == "a b c d e <eos>"
    assert learnt(tokenizer, tokens) == "d e <eos>"


def test_a_token_across_the_border_of_prompt_and_completion_is_learnt():
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers import models as kinds
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(kinds.BPE({"a": 0, "b": 1, "c": 2, "bc": 3, "<eos>": 4}, [("b", "c")]))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<eos>")
    tokens = text.completion(tokenizer, "ab", "c", 64)
    assert tokens["input_ids"].tolist() == [0, 3, 4]  # a, bc, end
    assert tokens["labels"].tolist() == [text.IGNORED, 3, 4]


def test_long_text_becomes_several_examples_that_lose_nothing(tokenizer):
    parts = text.plain(tokenizer, "a b c d e f g h", 4)
    assert [tokenizer.decode(p["input_ids"]) for p in parts] == ["a b c d", "e f g h"]  # a lone end teaches nothing
    parts = text.plain(tokenizer, "a b c d e f g", 4)
    assert [tokenizer.decode(p["input_ids"]) for p in parts] == ["a b c d", "e f g <eos>"]
    assert all(p["labels"].tolist() == [text.IGNORED, *p["input_ids"][1:]] for p in parts)


def test_the_longest_example_is_what_model_and_tokenizer_take(tokenizer):
    model = models.llama()
    assert text.limit(model, tokenizer, None) == 64  # the tokenizer's; the model takes 128
    assert text.limit(model, tokenizer, 20) == 20
    with pytest.raises(GraftError, match="max_length=65 is more than the 64"):
        text.limit(model, tokenizer, 65)
