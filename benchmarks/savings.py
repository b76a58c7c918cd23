"""What LISA, S2FT and GreenTrainer save against full fine-tuning.

    python benchmarks/savings.py [--rounds 5] [--json benchmarks/savings.json]

A Llama of 8 layers, width 256, 4 x 128 tokens, float32, one thread. `full fine-tuning` trains the model's own
parameters, without Graft; the others have their default hyperparameters and targets, LISA draws anew every 4 steps;
LoRA (rank 8) stands by for scale.

step      forward, backward, the method's schedule and AdamW, in seconds of the processor; the median over rounds of the
          ratio to full fine-tuning in the same round
kept      bytes that autograd keeps for backward beside parameters and buffers
gradients of all parameters, after the backward of the last step
state     of AdamW after the last step
beside    what the adapter holds beside the base
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import graft
from graft.training.optimizers import forget
from harness import in_turns, kept_for_backward, machine, ratio, table

METHODS = {
    "full fine-tuning": None,
    "lisa": dict(interval=4),
    "s2ft": {},
    "greentrainer": {},
    "lora": {},
}
COLUMNS = ["", "trained in a step", "step", "kept, MiB", "gradients, MiB", "state, MiB", "beside, MiB"]


class Run:
    """A model in training."""

    def __init__(self, name: str, steps: int):
        torch.manual_seed(0)
        sizes: dict[str, Any] = dict(
            hidden_size=256, intermediate_size=768, num_hidden_layers=8, num_attention_heads=4, vocab_size=1000
        )
        self.model: nn.Module = LlamaForCausalLM(LlamaConfig(**sizes, use_cache=False)).train()
        ids = torch.randint(0, 1000, (4, 128))
        self.data, self.steps, self.done = {"input_ids": ids, "labels": ids}, steps, 0
        hyper, self.adapter = METHODS[name], None
        if hyper is not None:
            recipe = graft.Recipe.of(name, **hyper)
            needs = recipe.method.asks(recipe.hyper)
            stats = graft.collect(self.model, [self.data], needs, recipe.method.targets) if needs else None
            self.adapter = graft.attach(self.model, recipe, stats=stats)
        self.trained = [*(self.model if self.adapter is None else self.adapter).parameters()]
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-4)

    def forward(self) -> Tensor:
        return self.model(**self.data).loss

    def step(self) -> None:
        self.optimizer.zero_grad()
        self.forward().backward()
        self.gradients = [p.grad for p in self.trained if p.grad is not None]
        if self.adapter is not None:
            forget(self.optimizer, self.adapter.step(min(self.done / self.steps, 1.0)))
        self.optimizer.step()
        self.done += 1

    def row(self) -> dict:
        state = [t for s in self.optimizer.state.values() for t in s.values() if torch.is_tensor(t)]
        sizes = {
            "kept": kept_for_backward(self.model, self.forward),
            "gradients": sum(g.nbytes for g in self.gradients),
            "state": sum(t.nbytes for t in state),
            "beside": 0 if self.adapter is None else sum(t.nbytes for t in self.adapter.state_dict().values()),
        }
        trained = sum(g.numel() for g in self.gradients)
        return {"trained in a step": f"{trained:,}"} | {f"{k}, MiB": (v or 0) / 2**20 for k, v in sizes.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, default=Path(__file__).with_name("savings.json"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    runs = {name: Run(name, args.rounds + 2) for name in METHODS}
    times = in_turns({name: run.step for name, run in runs.items()}, args.rounds, 2, time.process_time)
    rows = [{"": name, "step": ratio(times, name, "full fine-tuning"), **run.row()} for name, run in runs.items()]
    print(f"{args.rounds} rounds. {machine()}\n")
    print(table(rows, COLUMNS))
    args.json.write_text(json.dumps({"machine": machine(), "rounds": args.rounds, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
