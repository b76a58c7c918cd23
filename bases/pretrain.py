"""Pre-train a causal language model: `python bases/pretrain.py RECIPE CORPUS TOKENIZER FOLDER`.

    loss = mean over tokens of -log p(token | tokens before it in the window)

Documents stand one after the other with `<|endoftext|>` between them, cut into windows; every epoch cuts at other
places and takes them in another order, both decided by the seed and the epoch alone. Matrices inside the blocks are
trained by Muon (Muon: An optimizer for hidden layers in neural networks. Jordan et al., 2024.
https://kellerjordan.github.io/posts/muon; with steps of AdamW's size: Muon is Scalable for LLM Training. Liu et al.,
2025. https://arxiv.org/abs/2502.16982), the embedding and the norms by AdamW. The learning rate rises in `warmup`
steps, stays, and falls to zero over the last share `decay` of the steps (MiniCPM. Hu et al., 2024.
https://arxiv.org/abs/2404.06395). Products are in bfloat16, weights and optimizers in fp32.

A run writes a checkpoint every `every` steps and goes on from it when it is started again; log.jsonl has the losses.
"""

import argparse
import itertools
import json
import math
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tokenizer import texts


def tokens(corpus: Path, split: str, tokenizer: Any, kind: str | None = None) -> np.ndarray:
    """The tokens of a split, [count] uint16, each document followed by the end of text."""
    found, rows = [], (row["text"] for row in texts(corpus, split) if kind in (None, row["kind"]))
    while batch := list(itertools.islice(rows, 1000)):
        for ids in tokenizer(batch)["input_ids"]:
            found.append(np.array([*ids, tokenizer.eos_token_id], dtype=np.uint16))
    return np.concatenate(found)


def windows(data: np.ndarray, length: int, batch: int, seed: int, first: int) -> Iterator[Tensor]:
    """Batches [batch, length + 1] of windows without end, from the batch with number `first` on."""
    if not (per_epoch := (len(data) - length) // (length + 1) // batch):
        raise SystemExit(f"{len(data):,} tokens are too few for {batch} windows of {length}: take a larger corpus")
    for number in itertools.count(first):
        epoch, place = divmod(number, per_epoch)
        draw = np.random.default_rng([seed, epoch])
        start = draw.integers(length)
        order = draw.permutation(per_epoch * batch)[place * batch : (place + 1) * batch]
        rows = [data[start + i * (length + 1) :][: length + 1] for i in order]
        yield torch.from_numpy(np.stack(rows).astype(np.int64))


def rate(step: int, steps: int, warmup: int, decay: float) -> float:
    """The share of the learning rate at a step."""
    return min(1.0, (step + 1) / warmup, (steps - step) / (decay * steps))


def window(step: int, recipe: dict[str, Any]) -> int:
    """The tokens of a window at a step."""
    return [length for share, length in recipe["lengths"] if step >= round(share * recipe["steps"])][-1]


class Run:
    """A model in training: what a checkpoint holds, and one step."""

    def __init__(self, recipe: dict[str, Any], vocabulary: int, device: str):
        torch.manual_seed(recipe["seed"])
        self.recipe, self.device, self.step, self.seconds = recipe, device, 0, 0.0
        self.model = LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, **recipe["model"])).to(device)
        named = dict(self.model.model.named_parameters())
        inside = [p for n, p in named.items() if p.ndim == 2 and "embed" not in n]
        beside = [p for n, p in named.items() if p.ndim != 2 or "embed" in n]
        self.optimizers = {
            "muon": torch.optim.Muon(
                inside, lr=0.0, weight_decay=recipe["weight_decay"], adjust_lr_fn="match_rms_adamw"
            ),
            "adamw": torch.optim.AdamW(beside, lr=0.0, betas=(0.9, 0.95), weight_decay=0.0),
        }
        self.compiled = torch.compile(self.loss) if recipe["compile"] else self.loss

    def loss(self, ids: Tensor) -> Tensor:
        with torch.autocast(self.device, dtype=torch.bfloat16):
            states = self.model.model(input_ids=ids[:, :-1], use_cache=False).last_hidden_state
            logits = self.model.lm_head(states)
        return nn.functional.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())

    def update(self, ids: Tensor) -> float:
        """One step on a batch; its loss."""
        recipe, began = self.recipe, time.perf_counter()
        loss = self.compiled(ids.to(self.device))
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for name, optimizer in self.optimizers.items():
            for group in optimizer.param_groups:
                group["lr"] = recipe["learning_rate"][name] * rate(
                    self.step, recipe["steps"], recipe["warmup"], recipe["decay"]
                )
            optimizer.step()
            optimizer.zero_grad()
        self.step += 1
        self.seconds += time.perf_counter() - began
        return loss.item()

    def save(self, folder: Path) -> None:
        """Write the checkpoint, beside its place and then in it."""
        aside = folder.with_name(f".{folder.name}.new")
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        state = {f"model.{n}": p.detach() for n, p in self.model.model.named_parameters()}
        for name, optimizer in self.optimizers.items():
            for i, values in optimizer.state_dict()["state"].items():
                state |= {f"{name}.{i}.{key}": value for key, value in values.items()}
        save_file({k: v.contiguous().cpu() for k, v in state.items()}, aside / "state.safetensors")
        (aside / "step.json").write_text(json.dumps({"step": self.step, "seconds": self.seconds}))
        old = folder.with_name(f".{folder.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        if folder.exists():
            os.rename(folder, old)
        os.rename(aside, folder)
        shutil.rmtree(old, ignore_errors=True)

    def load(self, folder: Path) -> None:
        """Go on from a checkpoint, if there is one: the last whole one."""
        old = folder.with_name(f".{folder.name}.old")
        if not folder.exists() and old.exists():
            os.rename(old, folder)
        if not folder.exists():
            return
        state = load_file(folder / "state.safetensors")
        for name, parameter in self.model.model.named_parameters():
            parameter.data.copy_(state[f"model.{name}"])
        for name, optimizer in self.optimizers.items():
            whole = optimizer.state_dict()
            for key, value in state.items():
                if key.startswith(f"{name}."):
                    _, i, entry = key.split(".")
                    whole["state"].setdefault(int(i), {})[entry] = value
            optimizer.load_state_dict(whole)
        found = json.loads((folder / "step.json").read_text())
        self.step, self.seconds = found["step"], found["seconds"]

    @torch.no_grad()
    def held_out(self, data: dict[str, Tensor]) -> dict[str, float]:
        """The loss on fixed windows, by kind of text."""
        return {
            kind: sum(self.loss(part.to(self.device)).item() * len(part) for part in rows.split(16)) / len(rows)
            for kind, rows in data.items()
        }


def train(recipe: dict[str, Any], corpus: Path, tokenizer: Any, folder: Path, device: str, until: int | None) -> Run:
    """Train to the recipe's last step, or to the step `until`, and leave a checkpoint."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "tokens.npy").exists():
        np.save(folder / "tokens.npy.tmp.npy", tokens(corpus, "train", tokenizer))
        os.rename(folder / "tokens.npy.tmp.npy", folder / "tokens.npy")
    data = np.load(folder / "tokens.npy", mmap_mode="r")
    checks = {}
    for kind in ("prose", "code", "generated"):
        part = tokens(corpus, "validation", tokenizer, kind)
        count = min(64, len(part) // 257)
        checks[kind] = torch.from_numpy(part[: count * 257].reshape(count, 257).astype(np.int64))
    run = Run(recipe, len(tokenizer), device)
    run.load(folder / "checkpoint")
    # The log goes on where the checkpoint stands.
    log = folder / "log.jsonl"
    kept = [x for x in (log.read_text().splitlines() if log.exists() else []) if json.loads(x)["step"] <= run.step]
    log.write_text("".join(f"{x}\n" for x in kept))
    last, losses = min(until or recipe["steps"], recipe["steps"]), []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns) as progress:
        bar = progress.add_task(recipe["name"], total=last, completed=run.step)
        while run.step < last:
            length = window(run.step, recipe)
            for ids in windows(data, length, recipe["tokens"] // length, recipe["seed"], run.step):
                losses.append(run.update(ids))
                if math.isnan(losses[-1]):
                    raise SystemExit(f"the loss is not a number at step {run.step}")
                if run.step % recipe["every"] == 0 or run.step == last:
                    said = run.held_out(checks)
                    row = {
                        "step": run.step, "train": round(float(np.mean(losses)), 4), "seconds": round(run.seconds),
                        "threads": torch.get_num_threads(),
                        **{kind: round(loss, 4) for kind, loss in said.items()},
                    }  # fmt: skip
                    with open(log, "a") as file:
                        file.write(json.dumps(row) + "\n")
                    losses = []
                    run.save(folder / "checkpoint")
                    progress.console.print(json.dumps(row), soft_wrap=True)
                progress.update(bar, completed=run.step)
                if run.step >= last or window(run.step, recipe) != length:
                    break
    return run


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("recipe", type=Path)
    parser.add_argument("corpus", type=Path)
    parser.add_argument("tokenizer", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--until", type=int, help="stop at this step; the checkpoint goes on later")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    train(
        yaml.safe_load(given.recipe.read_text()),
        given.corpus,
        PreTrainedTokenizerFast.from_pretrained(given.tokenizer),
        given.folder,
        given.device,
        given.until,
    )
