"""Step time and memory of each method: graft, a hand-written layer, PEFT and `adapters`, in turns in one run.

    python benchmarks/methods.py [METHOD ...] [--precision fp32 bf16] [--compile] [--rounds 15] [--json FILE]

One step is forward and backward of a small Llama (width 512, 4 layers, 4 x 128 tokens), the base frozen, the input
embeddings requiring a gradient, so that every contestant differentiates through the whole model. `floor` is that and
nothing else. Columns: the median over rounds of the ratio within a round; `kept` is what autograd keeps for backward
beside parameters and buffers. A method that PEFT or `adapters` lacks has an empty cell.
"""

import argparse
import gc
import json
import multiprocessing
import statistics
import warnings
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import graft
import graft.methods
from contestants import ADAPTERS, GRAFT, PEFT
from graft.core.targets import resolve
from handwritten import HAND
from harness import in_turns, kept_for_backward, machine, ratio, table

SIZES = dict(hidden_size=512, intermediate_size=1408, num_hidden_layers=4, num_attention_heads=8, vocab_size=1000)
TOKENS = (4, 128)


def base(dtype: torch.dtype) -> LlamaForCausalLM:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES, use_cache=False)).to(dtype).train()
    model.requires_grad_(False)
    model.get_input_embeddings().register_forward_hook(lambda module, args, out: out.requires_grad_())
    return model


def by_graft(name: str, dtype: torch.dtype) -> nn.Module:
    model = base(dtype)
    method, targets, hyper = GRAFT[name]
    graft.attach(model, method, targets, **hyper)
    return model


def by_hand(name: str, dtype: torch.dtype) -> nn.Module:
    """The model with every target replaced by a layer that was written for this one method."""
    model = base(dtype)
    method, targets, _ = GRAFT[name]
    layer = HAND[name]
    for path, module in resolve(model, targets, graft.METHODS[method].hosts):
        parent, _, child = path.rpartition(".")
        setattr(model.get_submodule(parent), child, layer(module))
    return model


def step_of(model: nn.Module, compiled: bool):
    ids = torch.randint(0, SIZES["vocab_size"], TOKENS, generator=torch.Generator().manual_seed(0))
    run = torch.compile(model) if compiled else model
    trained = [p for p in model.parameters() if p.requires_grad]

    def forward():
        return run(input_ids=ids, labels=ids).loss

    def step():
        forward().backward()
        for p in trained:
            p.grad = None

    return forward, step


def contest(name: str, dtype: torch.dtype, compiled: bool, rounds: int) -> dict:
    builders = {"floor": lambda: base(dtype), "graft": lambda: by_graft(name, dtype)}
    if name in HAND:
        builders["hand"] = lambda: by_hand(name, dtype)
    for label, peers in (("PEFT", PEFT), ("adapters", ADAPTERS)):
        if name in peers:
            builders[label] = lambda make=peers[name]: make(base(dtype))
    steps, kept = {}, {}
    for label, build in builders.items():
        gc.collect()
        torch._dynamo.reset()
        model = build()
        forward, steps[label] = step_of(model, compiled)
        if not compiled:
            kept[label] = None if (bytes_ := kept_for_backward(model, forward)) is None else bytes_ / 2**20
    times = in_turns(steps, rounds)
    row = {"method": name, "floor, ms": 1e3 * statistics.median(times["floor"])}
    for label in ("graft", "hand", "PEFT", "adapters"):
        if label in times:
            row[f"{label} / floor"] = ratio(times, label, "floor")
            if label != "graft":
                row[f"graft / {label}"] = ratio(times, "graft", label)
            if kept:
                row[f"kept {label}, MiB"] = kept[label]
    return row


COLUMNS = [
    "method", "graft / floor", "hand / floor", "PEFT / floor", "adapters / floor", "graft / hand", "graft / PEFT",
    "graft / adapters", "kept graft, MiB", "kept hand, MiB", "kept PEFT, MiB", "kept adapters, MiB",
]  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("methods", nargs="*", default=list(GRAFT), help=f"default: {' '.join(GRAFT)}")
    parser.add_argument("--precision", nargs="+", choices=["fp32", "bf16"], default=["fp32", "bf16"])
    parser.add_argument(
        "--compile", action="store_true", help="compile the whole model (inductor); memory is not shown"
    )
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    results = {"machine": machine(args.threads), "rounds": args.rounds, "compiled": args.compile}
    results |= {precision: [] for precision in args.precision}
    # A process for each method: peers keep models alive, and a compiler remembers what it saw.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, max_tasks_per_child=1) as pool:
        for name in track(args.methods, "measuring ", transient=True, console=Console(stderr=True)):
            for precision, row in pool.submit(contests, name, args).result().items():
                results[precision].append(row)
            if args.json:
                args.json.write_text(json.dumps(results, indent=2))
    for precision in args.precision:
        rows = results[precision]
        used = [c for c in COLUMNS if any(c in row for row in rows)]
        how = "compiled" if args.compile else "eager"
        print(f"\n{precision}, {how}, {args.rounds} rounds. {results['machine']}\n")
        print(table(rows, used), flush=True)


def contests(name: str, args: argparse.Namespace) -> dict[str, dict]:
    """{precision: row} of one method, in a process of its own."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(args.threads)
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16}
    return {p: contest(name, dtypes[p], args.compile, args.rounds) for p in args.precision}


if __name__ == "__main__":
    main()
