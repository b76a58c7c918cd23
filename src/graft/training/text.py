"""From text to token ids, and to the tokens that carry loss.

A tokenised example is {"input_ids": int32 [n], "labels": int32 [n]}; a label is the token itself, or IGNORED where no
loss is taken. The first token of an example never has loss: nothing stands before it.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..core.errors import GraftError
from ..core.prompt import Prompt
from ..core.registry import adapters
from .data import Examples, column, columns_of

IGNORED = -100
LONGEST = 1024  # of the default limit: what a long-context model could take rarely fits into memory

Tokens = dict[str, np.ndarray]


def limit(model: Any, tokenizer: Any, asked: int | None) -> int:
    """Tokens of one example: what was asked, or what model and tokenizer allow, but LONGEST at most.

    A prompt in front of the tokens takes positions of its own.
    """
    config = getattr(model, "config", None)
    allowed = [
        n
        for n in (getattr(tokenizer, "model_max_length", None), getattr(config, "max_position_embeddings", None))
        if isinstance(n, int) and 0 < n < 10**6
    ]
    prompt = sum(
        d.length for a in adapters(model).values() for d in a.deltas.values() if isinstance(d, Prompt) and d.reads
    )
    allowed = [n - prompt for n in allowed]
    if allowed and min(allowed) < 2:
        raise GraftError(
            f"a prompt of {prompt} vectors leaves no room for text in the {min(allowed) + prompt} positions of the "
            "model: use a smaller length"
        )
    if asked is None:
        return min([LONGEST, *allowed])
    if allowed and asked > min(allowed):
        raise GraftError(
            f"max_length={asked} is more than the {min(allowed)} tokens that the model takes"
            f"{f' beside a prompt of {prompt} vectors' if prompt else ''}"
        )
    return asked


def plain(tokenizer: Any, text: str, longest: int) -> list[Tokens]:
    """Loss on every token and on the end; a long text becomes several examples, so that nothing is lost."""
    ids = _ids(tokenizer(text)) + _end(tokenizer)
    ids = ids[:-1] if len(ids) > 1 and ids[-2:] == _end(tokenizer) * 2 else ids
    return [_tokens(ids[i : i + longest], 1) for i in range(0, len(ids), longest) if len(ids[i : i + longest]) > 1]


def completion(tokenizer: Any, prompt: str, answer: str, longest: int) -> Tokens:
    """Loss on the answer and on the end.

    Prompt and answer are tokenised together. Where that joins the last letters of the prompt and the first ones of the
    answer into one token, this token carries loss.
    """
    given = _ids(tokenizer(prompt))
    ids = _ids(tokenizer(prompt + answer)) + _end(tokenizer)
    ids = ids[:-1] if ids[-2:] == _end(tokenizer) * 2 else ids
    shared = next((i for i, (a, b) in enumerate(zip(given, ids)) if a != b), min(len(given), len(ids)))
    return _tokens(ids[:longest], shared)


def chat(tokenizer: Any, messages: Sequence[Mapping[str, Any]], longest: int) -> Tokens:
    """Loss on what the assistant says.

    A template with {% generation %} marks those tokens itself. Otherwise an assistant's turn is what the template adds
    to the messages before it and the header of the turn; this is refused where the template writes earlier messages
    in another way once later ones follow.
    """
    template = getattr(tokenizer, "chat_template", None)
    if not template:
        raise GraftError(
            f"the tokenizer of {_name(tokenizer)} has no chat template: set one, or give prompt and completion"
        )
    turns = [{k: v for k, v in m.items() if v is not None} for m in messages]  # tables fill what is absent with None
    if bad := [m for m in turns if not {"role", "content"} <= m.keys()]:
        raise GraftError(f"a message needs role and content, this one has {', '.join(bad[0]) or 'nothing'}")
    if not any(m["role"] == "assistant" for m in turns):
        raise GraftError("a conversation has no message of the role 'assistant', so there is nothing to learn from it")
    if isinstance(template, str) and re.search(r"\{%-?\s*generation\s*-?%\}", template):
        out = tokenizer.apply_chat_template(turns, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
        ids, spoken = list(out["input_ids"]), np.asarray(out["assistant_masks"], dtype=bool)
    else:
        ids = _render(tokenizer, turns)
        spoken = np.zeros(len(ids), dtype=bool)
        for i, message in enumerate(turns):
            if message["role"] == "assistant":
                before = _render(tokenizer, turns[:i], add_generation_prompt=True)
                through = _render(tokenizer, turns[: i + 1])
                if ids[: len(through)] != through or through[: len(before)] != before:
                    raise GraftError(
                        f"the chat template of {_name(tokenizer)} writes message {i} differently when it stands in a "
                        "conversation, so the assistant's tokens cannot be told from the others: use a template with "
                        "{% generation %}, or give prompt and completion"
                    )
                spoken[len(before) : len(through)] = True
    labels = np.where(spoken, ids, IGNORED).astype(np.int32)
    labels[:1] = IGNORED
    return {"input_ids": np.asarray(ids[:longest], dtype=np.int32), "labels": labels[:longest]}


def has_loss(tokens: Tokens) -> bool:
    return bool((tokens["labels"] != IGNORED).any())


def join(parts: Sequence[Tokens]) -> Tokens:
    """Several examples in one row; the positions start again with each of them."""
    positions = [np.arange(len(p["input_ids"]), dtype=np.int32) for p in parts]
    return {
        "input_ids": np.concatenate([p["input_ids"] for p in parts]),
        "labels": np.concatenate([p["labels"] for p in parts]),
        "position_ids": np.concatenate(positions),
    }


def encoded(tokenizer: Any, examples: Examples, longest: int | None) -> list[dict[str, Any]]:
    """Token ids and what else the tokenizer gives of the columns `text` and, if there is one, `text_pair`."""
    texts = [column(examples, k) for k in ("text", "text_pair") if k in columns_of(examples) or k == "text"]
    out = tokenizer(*texts, truncation=True, max_length=longest)
    names = [k for k in out if k != "attention_mask"]
    return [{k: np.asarray(out[k][i], dtype=np.int32) for k in names} for i in range(len(examples))]


def padded(tokenizer: Any, features: Sequence[dict[str, Any]], kind: torch.dtype | None = None) -> dict[str, Tensor]:
    """A batch as long as its longest example."""
    batch = dict(tokenizer.pad([{k: v for k, v in f.items() if k != "labels"} for f in features], return_tensors="pt"))
    return batch if kind is None else {**batch, "labels": torch.tensor([f["labels"] for f in features], dtype=kind)}


def right_padded(rows: Sequence[np.ndarray], value: int) -> Tensor:
    """Rows of token ids as one matrix [rows, longest]."""
    out = torch.full((len(rows), max(map(len, rows))), value, dtype=torch.long)
    for i, row in enumerate(rows):
        out[i, : len(row)] = torch.from_numpy(row)
    return out


def _tokens(ids: list[int], start: int) -> Tokens:
    array = np.asarray(ids, dtype=np.int32)
    labels = array.copy()
    labels[: max(start, 1)] = IGNORED
    return {"input_ids": array, "labels": labels}


def _render(tokenizer: Any, messages: list[dict[str, Any]], **options: Any) -> list[int]:
    try:
        return _ids(tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, **options))
    except Exception as error:
        raise GraftError(f"the chat template of {_name(tokenizer)} cannot write this conversation: {error}") from error


def _ids(encoded: Any) -> list[int]:
    return list(encoded["input_ids"])


def _end(tokenizer: Any) -> list[int]:
    return [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]


def _name(tokenizer: Any) -> str:
    return getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
