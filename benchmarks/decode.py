"""One step of decoding: a frozen adapter of each method beside the bare base, and PEFT's beside it.

    python benchmarks/decode.py [METHOD ...] [--width 2048] [--layers 2] [--batch 1 8] [--precision fp32 bf16]
                                [--past 128] [--rounds 15] [--threads 2] [--json FILE]

One step is a forward of a Llama over one new token a row, with `past` tokens in the cache, in inference mode. The
adapters are away from their start, frozen and switched on. A cell is the median over rounds of the ratio to the base
within a round; `PEFT` is PEFT's adapter, not merged either, to the same base.
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
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import graft
import graft.methods
from contestants import GRAFT, PEFT
from harness import in_turns, machine, ratio, table

METHODS = [name for name in GRAFT if name != "lora, dropout"]  # dropout rests in inference
PEERS = ["lora", "dora", "vera", "oft", "ia3"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def base(args: argparse.Namespace, dtype: torch.dtype) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=args.width, intermediate_size=args.width * 11 // 4, num_hidden_layers=args.layers,
        num_attention_heads=args.width // 64, num_key_value_heads=args.width // 256, vocab_size=1000,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(dtype).eval()


def moved(model: nn.Module) -> nn.Module:
    """The model with its adapter away from its start, and frozen."""
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.01 * torch.randn_like(p))
    return model.requires_grad_(False).eval()


def by_graft(name: str, args: argparse.Namespace, dtype: torch.dtype) -> nn.Module:
    model = base(args, dtype)
    method, targets, hyper = GRAFT[name]
    graft.attach(model, method, targets, **hyper)
    return moved(model)


def step_of(model: nn.Module, batch: int, past: int):
    """The step, after which the cache is as it was."""
    ids = torch.randint(0, 1000, (batch, past), generator=torch.Generator().manual_seed(0))
    token = ids[:, :1]
    with torch.inference_mode():
        cache = model(input_ids=ids, past_key_values=DynamicCache(), use_cache=True).past_key_values

    def step():
        with torch.inference_mode():
            model(input_ids=token, past_key_values=cache, use_cache=True)
        cache.crop(-1)

    return step


def contest(name: str, args: argparse.Namespace) -> dict:
    row: dict = {"method": name}
    for precision in args.precision:
        gc.collect()
        models: dict = {"base": base(args, DTYPES[precision]), "graft": by_graft(name, args, DTYPES[precision])}
        if name in PEERS:
            models["PEFT"] = moved(PEFT[name](base(args, DTYPES[precision])))
        for batch in args.batch:
            times = in_turns({label: step_of(m, batch, args.past) for label, m in models.items()}, args.rounds)
            row[f"base, {precision}, {batch}"] = 1e3 * statistics.median(times["base"])
            for label in models:
                if label != "base":
                    row[f"{label}, {precision}, {batch}"] = ratio(times, label, "base")
    return row


def alone(name: str, args: argparse.Namespace) -> dict:
    """The row of one method, in a process of its own: peers keep models alive."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(args.threads)
    return contest(name, args)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("methods", nargs="*", default=METHODS, help=f"default: {' '.join(METHODS)}")
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--precision", nargs="+", choices=list(DTYPES), default=list(DTYPES))
    parser.add_argument("--past", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, max_tasks_per_child=1) as pool:
        rows = [
            pool.submit(alone, name, args).result()
            for name in track(args.methods, "measuring ", transient=True, console=Console(stderr=True))
        ]
    where = machine(args.threads)
    columns = [f"{who}, {p}, {b}" for p in args.precision for b in args.batch for who in ("graft", "PEFT")]
    print(f"width {args.width}, {args.layers} layers, {args.past} tokens in the cache, {args.rounds} rounds. {where}\n")
    print(table(rows, ["method", *columns]))
    for p in args.precision:
        for b in args.batch:
            print(f"\nbase, {p}, batch {b}: {statistics.median(row[f'base, {p}, {b}'] for row in rows):.1f} ms")
    if args.json:
        settings = {k: v for k, v in vars(args).items() if k not in ("json", "methods")}
        args.json.write_text(json.dumps({"machine": where, **settings, "rows": rows}, indent=2))


if __name__ == "__main__":
    main()
