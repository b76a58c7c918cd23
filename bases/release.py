"""Measure a language model and publish it: `python bases/release.py RECIPE CORPUS TOKENIZER FOLDER`.

    bits per byte = sum over tokens of -log2 p(token | tokens before it) / bytes of the text

on the test split of the corpus, by kind, for the model with its weights in bfloat16, an untrained network of the same
shape (the first of its run), and an interpolated Kneser-Ney 5-gram of the same tokens and the same training text
(ngram.py). Documents stand one after the other as in training. A network reads windows of 512 tokens and is scored on
the second half of each, so that it sees at least 256 tokens before (the first window counts whole).
"""

import argparse
import json
import math
import os
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from safetensors.torch import load_file
from torch import nn
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from ngram import KneserNey
from pretrain import Run, tokens
from publish import publish

KINDS = ("prose", "code", "generated")
LENGTH = 512
BATCH = 16
MEASURED = 100_000  # tokens of each kind, at most


@torch.no_grad()
def bits(model: Any, data: np.ndarray) -> float:
    """-log2 p summed over all tokens [count] but the first."""
    half = LENGTH // 2
    ends = [*range(min(LENGTH, len(data)), len(data), half), len(data)]
    fresh = [ends[0] - 1, *(b - a for a, b in pairwise(ends))]
    total, places = 0.0, list(zip(ends, fresh))
    # The first and the last window score another number of tokens than those between, which run in batches.
    for some in (places[:1], *batched(places[1:-1], BATCH), places[1:][-1:]):
        if some:
            rows = np.stack([data[max(0, end - LENGTH) : end] for end, _ in some]).astype(np.int64)
            ids, count = torch.from_numpy(rows), some[0][1]
            with torch.autocast("cpu", dtype=torch.bfloat16):
                logits = model(input_ids=ids).logits[:, :-1]
            logits, targets = logits[:, len(logits[0]) - count :].float(), ids[:, ids.shape[1] - count :]
            total += nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum").item()
    return total / math.log(2)


def batched(items: list, size: int) -> list[list]:
    """Lists of at most so many."""
    return [items[i : i + size] for i in range(0, len(items), size)]


def trained(recipe: dict[str, Any], size: int, folder: Path) -> LlamaForCausalLM:
    """The model of a finished run, its weights rounded to bfloat16 and held in fp32."""
    model = Run(recipe | {"compile": False}, size, "cpu").model
    state = load_file(folder / "checkpoint" / "state.safetensors")
    for name, parameter in model.model.named_parameters():
        parameter.data.copy_(state[f"model.{name}"].to(torch.bfloat16))
    return model.eval()


def measure(models: dict[str, Any], corpus: Path, tokenizer: Any) -> dict[str, dict[str, float]]:
    """{"bits per byte of ...": {who: figure}}, the 5-gram among them, and the perplexity per token of each kind."""
    grams = KneserNey(tokens(corpus, "train", tokenizer))
    found: dict[str, dict[str, float]] = {}
    for kind in KINDS:
        data = tokens(corpus, "test", tokenizer, kind)[:MEASURED]
        size = len(tokenizer.decode(data.tolist(), skip_special_tokens=True).encode())
        total = {name: bits(model, data) for name, model in models.items()}
        total["5-gram"] = float(-np.log2(grams.probabilities(data)).sum())
        found[f"bits per byte, {kind}"] = {name: round(b / size, 4) for name, b in total.items()}
        found[f"perplexity per token, {kind}"] = {name: round(2 ** (b / len(data)), 2) for name, b in total.items()}
        print(kind, len(data), "tokens,", size, "bytes:", json.dumps(found[f"bits per byte, {kind}"]), flush=True)
    return found


def release(file: Path, corpus: Path, tokenizer: Any, folder: Path) -> Path:
    """Measure and publish the finished run in `folder`."""
    recipe = yaml.safe_load(file.read_text())
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    if log[-1]["step"] != recipe["steps"]:
        raise SystemExit(f"{folder} stands at step {log[-1]['step']} of {recipe['steps']}: let pretrain.py finish")
    manifest = json.loads((corpus / "manifest.json").read_text())
    model = trained(recipe, len(tokenizer), folder)
    untrained = Run(recipe | {"compile": False}, len(tokenizer), "cpu").model.eval()
    card = {
        "summary": recipe["summary"],
        "kind": "causal-lm",
        "licence": "Apache-2.0",
        "data": [
            {
                "what": name, "licence": counts["licence"], "version": counts["version"],
                **{f"{kind} (characters)": counts.get("train", {}).get(kind, 0) for kind in KINDS},
            }
            for name, counts in manifest["sources"].items()
        ],
        "training": {
            "recipe": f"bases/{file.name}",
            "corpus": "bases/corpus.py; nothing of the modules that the tasks are made of",
            "sha256 of the corpus": manifest["sha256"]["train"],
            "steps": recipe["steps"],
            "tokens of a step": recipe["tokens"],
            "tokens": recipe["steps"] * recipe["tokens"],
            "tokens of the corpus": len(np.load(folder / "tokens.npy", mmap_mode="r")),
            "objective": "next token",
            "optimizer": "Muon for the matrices of the blocks, AdamW for the rest",
            "learning rate": recipe["learning_rate"],
            "seconds": log[-1]["seconds"],
            "threads": log[-1]["threads"],
            "torch": torch.__version__,
        },
        "measured": measure({recipe["name"]: model, "untrained": untrained}, corpus, tokenizer),
        "curve": [[x["step"], x["train"], round((x["prose"] + x["code"]) / 2, 4)] for x in log],
    }  # fmt: skip
    return publish(recipe["name"], model, tokenizer, card)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    for name in ("recipe", "corpus", "tokenizer", "folder"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    found = PreTrainedTokenizerFast.from_pretrained(given.tokenizer)
    print(release(given.recipe, given.corpus, found, given.folder))
