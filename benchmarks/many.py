"""Many adapters at once: rows of one batch served by different ones, and a bank of a thousand.

    python benchmarks/many.py [loras mixed bank curves ...] [--width 1024] [--layers 2] [--rows 32] [--threads 1]
                              [--dtype fp32] [--rounds 7] [--quick] [--plots FOLDER] [--json FILE]

The model is a Llama with random weights, the adapters are frozen and away from their start. `prefill` is a forward of
32 new tokens a row, `decode` of one new token a row with 32 tokens in the cache, both in inference mode.

    loras    rows with 8 and with as many different LoRAs as rows, beside the base, a hand-batched version (every LoRA's
             A and B gathered to the rows once, then two batched products at each layer) and PEFT's `adapter_names`
    mixed    as many different adapters of one method as rows, against one adapter of it for all rows; then six methods
             in one batch, against the mean of what these six cost by themselves
    bank     1,000 adapters on disk: adding, loading, memory, and a switch between those that are resident
    curves   one step of decoding against the number of different LoRAs and against their rank; drawn with --plots

All contestants of a line share the base's weights and take turns; only ratios within a round count. Each line has a
process of its own, because peers keep models alive.
"""

import argparse
import gc
import json
import multiprocessing
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import graft
from contestants import GRAFT, LINEAR
from harness import in_turns, machine, ratio, table

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
NEW = {"prefill": (32, 0), "decode": (1, 32)}  # new tokens a row, tokens in the cache
MIXED = [
    "lora", "dora", "vera", "oft", "hra", "ia3", "houlsby", "pfeiffer", "parallel_adapter", "loreft", "prompt_tuning",
    "prefix_tuning", "llama_adapter",
]  # fmt: skip
SIX = ["lora", "dora", "ia3", "oft", "houlsby", "prefix_tuning"]
COUNTS, RANKS = [1, 2, 4, 8, 16, 32], [4, 8, 16, 32, 64]


def base(args: argparse.Namespace) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=args.width, intermediate_size=args.width * 11 // 4, num_hidden_layers=args.layers,
        num_attention_heads=args.width // 64, num_key_value_heads=max(1, args.width // 256), vocab_size=1000,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(DTYPES[args.dtype]).eval().requires_grad_(False)


def twin(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """Another model of the same weights, in the same memory."""
    other = type(model)(model.config).to(model.dtype)
    other.load_state_dict(model.state_dict(), assign=True)
    return other.eval().requires_grad_(False)


@torch.no_grad()
def moved(parameters: Any) -> None:
    """Away from where adapters start."""
    for p in parameters:
        p.add_(0.01 * torch.randn_like(p)).requires_grad_(False)


# The contestants: calls of models


def with_bank(model: nn.Module, adapters: dict[str, tuple]) -> graft.Bank:
    """A bank on `model` with adapters {name: (method, targets, hyperparameters)}, all of them resident."""
    bank = graft.Bank(model, capacity=len(adapters))
    for name, (method, targets, hyper) in adapters.items():
        adapter = graft.attach(model, method, targets, name=name, **hyper)
        moved(adapter.parameters())
        bank.add(name, adapter)
        adapter.detach()
    bank.load(*adapters)
    return bank


def with_one(model: nn.Module, method: str, targets: Any, hyper: dict) -> nn.Module:
    """The model with one frozen adapter, switched on for all rows."""
    moved(graft.attach(model, method, targets, **hyper).parameters())
    return model


def factors(bank: graft.Bank) -> dict[str, dict[str, Any]]:
    """{path: {adapter: its LoRA there}}."""
    taken = {name: bank.take(name)[0] for name in bank}
    return {path: {name: a.deltas[path] for name, a in taken.items()} for path in next(iter(taken.values())).deltas}


class ByHand(nn.Module):
    """x W^T + (x A_i^T) B_i^T for row i of a batch, A [rows, rank, in] and B [rows, rank, out]."""

    def __init__(self, host: nn.Linear, A: Tensor, B: Tensor):
        super().__init__()
        self.weight = host.weight
        self.register_buffer("A", A)
        self.register_buffer("B", B)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight).baddbmm_(torch.bmm(x, self.A.mT), self.B)


def by_hand(model: nn.Module, loras: dict[str, dict], rows: list[str]) -> nn.Module:
    for path, deltas in loras.items():
        A = torch.stack([deltas[name].A for name in rows])
        B = torch.stack([deltas[name].scaling * deltas[name].B.T for name in rows])
        parent, _, child = path.rpartition(".")
        setattr(model.get_submodule(parent), child, ByHand(model.get_submodule(path), A, B))
    return model


def by_peft(model: Any, loras: dict[str, dict], rank: int) -> nn.Module:
    import peft

    names, config = list(next(iter(loras.values()))), peft.LoraConfig(r=rank, lora_alpha=16, target_modules=LINEAR)
    wrapped = peft.get_peft_model(model, config, adapter_name=names[0])
    for name in names[1:]:
        wrapped.add_adapter(name, config)
    with torch.no_grad():
        for path, deltas in loras.items():
            layer = wrapped.get_base_model().get_submodule(path)
            for name, delta in deltas.items():
                layer.lora_A[name].weight.copy_(delta.A)
                layer.lora_B[name].weight.copy_(delta.B)
    return wrapped.eval().requires_grad_(False)


def step_of(call: Callable, rows: int, new: int, past: int) -> Callable[[], Tensor]:
    """One forward, after which the cache is as it was."""
    ids = torch.randint(0, 1000, (rows, past + new), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        filled = call(input_ids=ids[:, :past], past_key_values=DynamicCache(), use_cache=True) if past else None

    def step():
        cache = filled.past_key_values if filled else DynamicCache()
        with torch.inference_mode():
            logits = call(input_ids=ids[:, past:], past_key_values=cache, use_cache=True).logits
        if filled:
            cache.crop(-new)
        return logits

    return step


def contest(calls: dict[str, Callable], when: str, args: argparse.Namespace) -> dict[str, list[float]]:
    return in_turns({name: step_of(call, args.rows, *NEW[when]) for name, call in calls.items()}, args.rounds)


# The sections. Each line of a table is made in a process of its own


def loras(args: argparse.Namespace, count: int, rank: int, phases: list[str]) -> list[dict]:
    """`count` different LoRAs serve the rows."""
    model = base(args)
    names = [f"a{i}" for i in range(count)]
    rows = [names[i % count] for i in range(args.rows)]
    ours = twin(model)
    bank = with_bank(ours, {name: ("lora", LINEAR, dict(rank=rank)) for name in names})
    own = factors(bank)
    calls = {
        "base": model,
        "hand": by_hand(twin(model), own, rows),
        "graft": ours,
        "PEFT": partial(by_peft(twin(model), own, rank), adapter_names=rows),
    }
    lines = []
    with graft.route(ours, rows):
        for when in phases:
            logits = {who: step_of(call, args.rows, *NEW[when])() for who, call in calls.items()}
            for who in ("graft", "PEFT"):
                torch.testing.assert_close(logits[who], logits["hand"], rtol=0.02, atol=0.02)
            times = contest(calls, when, args)
            line: dict[str, Any] = {
                "": when,
                "LoRAs": count,
                "rank": rank,
                "graft / hand": ratio(times, "graft", "hand"),
            }
            line["PEFT / hand"] = ratio(times, "PEFT", "hand")
            lines.append(line | {f"{who} / base": ratio(times, who, "base") for who in ("graft", "hand", "PEFT")})
            lines[-1]["base, ms"] = 1e3 * statistics.median(times["base"])
    return lines


def mixed(args: argparse.Namespace, *methods: str) -> dict:
    """As many adapters as rows, of one method or of several in turn."""
    model = base(args)
    kinds = [_of(name, args) for name in methods]
    names = [f"a{i}" for i in range(args.rows)]
    ours = twin(model)
    with_bank(ours, {name: kinds[i % len(kinds)] for i, name in enumerate(names)})
    calls = {"mixed": ours} | {name: with_one(twin(model), *kind) for name, kind in zip(methods, kinds)}
    row: dict[str, Any] = {"rows": ", ".join(methods)}
    with graft.route(ours, names):
        for when in NEW:
            times = contest({"base": model} | calls, when, args)
            single = [statistics.mean(round_) for round_ in zip(*(times[name] for name in methods))]
            times["single"] = single
            row[f"single / base, {when}"] = ratio(times, "single", "base")
            row[f"mixed / base, {when}"] = ratio(times, "mixed", "base")
            row[f"mixed / single, {when}"] = ratio(times, "mixed", "single")
    return row


def _of(name: str, args: argparse.Namespace) -> tuple[str, Any, dict]:
    method, targets, hyper = GRAFT[name]
    return method, targets, hyper | (dict(layers=args.layers) if name == "llama_adapter" else {})


def bank(args: argparse.Namespace) -> list[dict]:
    """A bank of many LoRAs that are read from disk; the same of PEFT for as many as rows."""
    import peft

    model, part = base(args), min(50, args.adapters // 2)
    theirs = peft.get_peft_model(twin(model), peft.LoraConfig(r=8, target_modules=LINEAR), adapter_name="a0").eval()
    with tempfile.TemporaryDirectory() as folder:
        folders = [f"{folder}/a{i}" for i in range(args.adapters)]
        first = graft.attach(model, "lora", LINEAR, rank=8)
        for place in folders:
            moved(first.parameters())
            first.save(place)
        first.detach()
        size = sum(f.stat().st_size for f in Path(folders[0]).iterdir()) / 1024
        theirs.save_pretrained(f"{folder}/peft")
        held = graft.Bank(model, capacity=args.adapters)
        add, load, memory = [], [], {0: private()}
        for i, place in enumerate(folders):
            add.append(timed(lambda i=i, place=place: held.add(f"a{i}", place)))
        for i in range(args.adapters):
            load.append(timed(lambda i=i: held.load(f"a{i}")))
            if i + 1 in (part, args.adapters - part, args.adapters):
                memory[i + 1] = private()
        peft_load, before = [], private()
        for i in range(1, args.rows):
            peft_load.append(timed(lambda i=i: theirs.load_adapter(f"{folder}/peft/a0", f"a{i}")))
        peft_memory = private() - before
    ids = torch.zeros(args.rows, 1, dtype=torch.long)
    opened, one, again, peft_switch = [], [], [], []
    with torch.inference_mode():
        for i in range(args.rounds + 2):
            name = f"a{(7 + 11 * i) % args.adapters}"
            several = [f"a{(13 * i + 3 * j) % args.adapters}" for j in range(args.rows)]
            one.append(timed(lambda name=name: _open(model, [name])))
            opened.append(timed(lambda several=several: _open(model, several)))
            with graft.route(model, several):
                again.append([timed(lambda: model(input_ids=ids)) for _ in range(4)])
            peft_switch.append(timed(lambda i=i: theirs.set_adapter(f"a{i % args.rows}")))
    median = lambda values: statistics.median(values[2:])
    between = lambda at: (memory[at + part] - memory[at]) / part
    last = args.adapters - part
    count, n = len(held), args.rows
    return [
        {"": f"add one, ms: the first {part} of {count}", "measured": median(add[:part])},
        {"": f"add one, ms: the last {part}", "measured": median(add[last:])},
        {"": f"load one, ms: the first {part}", "measured": median(load[:part])},
        {"": f"load one, ms: the last {part}", "measured": median(load[last:])},
        {"": f"private memory of one, KiB: the first {part}", "measured": between(0)},
        {"": f"private memory of one, KiB: the last {part}", "measured": between(last)},
        {"": "one on disk, KiB", "measured": size},
        {"": "switch, ms: to one other adapter for all rows", "measured": median(one)},
        {"": f"switch, ms: to {n} others, one a row", "measured": median(opened)},
        {"": f"first forward after that, {n} x 1 tokens, ms", "measured": median([t[0] for t in again])},
        {"": "every later one, ms", "measured": median([statistics.median(t[1:]) for t in again])},
        {"": "PEFT: load the 2nd, ms", "measured": peft_load[0]},
        {"": f"PEFT: load the {n}th, ms", "measured": statistics.median(peft_load[-3:])},
        {"": f"PEFT: private memory of one, KiB: {n}", "measured": peft_memory / (n - 1)},
        {"": "PEFT: switch to one other for all rows, ms", "measured": median(peft_switch)},
    ]


def _open(model: nn.Module, rows: list[str]) -> None:
    with graft.route(model, rows):
        pass


def timed(act: Callable) -> float:
    start = time.perf_counter()
    act()
    return 1e3 * (time.perf_counter() - start)


def private() -> float:
    """KiB of memory that belong to this process and to no file. Linux tells; elsewhere all of the resident memory."""
    gc.collect()
    try:
        lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
        return float(next(line.split()[1] for line in lines if line.startswith("Anonymous:")))
    except OSError:
        return psutil.Process().memory_info().rss / 1024


def draw(counts: list[dict], ranks: list[dict], file: Path) -> None:
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "graft"
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.6), sharey=True, layout="constrained")
    marks = {"PEFT": ("s--", "tab:red"), "graft": ("o-", "tab:blue"), "hand": ("x:", "black")}
    for ax, lines, key, title in (
        (axes[0], counts, "LoRAs", "different LoRAs of rank 8 in the batch"),
        (axes[1], ranks, "rank", "rank, one LoRA for each row"),
    ):
        x = [line[key] for line in lines]
        for who, (mark, colour) in marks.items():
            ax.plot(x, [line[f"{who} / base"] for line in lines], mark, color=colour, label=who, fillstyle="none")
        ax.set_xscale("log", base=2)
        ax.set_xticks(x, [str(n) for n in x])
        ax.set_xlabel(title)
        ax.axhline(1, color="grey", linewidth=0.8)
        ax.grid(alpha=0.3)
    axes[0].set_ylabel("time of one step of decoding / base")
    axes[0].legend()
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, metadata={"Date": None})


def apart(threads: int, line: Callable, *how: Any) -> Any:
    """A line of a table, in a process of its own."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(threads)
    return line(*how)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sections = ["loras", "mixed", "bank", "curves"]
    parser.add_argument("sections", nargs="*", default=sections, help=f"default: {' '.join(sections)}")
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--adapters", type=int, default=1000, help="in the bank; at the default width 1.2 MiB each")
    parser.add_argument("--methods", nargs="+", default=MIXED, choices=list(GRAFT), help="of the section mixed")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", choices=list(DTYPES), default="fp32")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="a small run: width 256, 8 rows, 40 adapters, 3 rounds")
    parser.add_argument("--plots", type=Path, default=Path(__file__).parent / "many.svg", help="where curves are drawn")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.quick:
        args.width, args.rows, args.adapters, args.rounds = 256, 8, 40, 3
    counts, ranks = [n for n in COUNTS if n <= args.rows], RANKS[: 2 if args.quick else None]
    work: dict[str, list[tuple]] = {
        "loras": [(loras, args, n, 8, list(NEW)) for n in dict.fromkeys((args.rows // 4, args.rows))],
        "mixed": [(mixed, args, name) for name in args.methods] + [(mixed, args, *SIX)],
        "bank": [(bank, args)],
        "curves": [(loras, args, n, 8, ["decode"]) for n in counts]
        + [(loras, args, args.rows, rank, ["decode"]) for rank in ranks],
    }
    where = machine(args.threads)
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items() if k not in ("json", "sections")}
    results: dict[str, Any] = {"machine": where, **settings}
    print(f"width {args.width}, {args.layers} layers, {args.rows} rows, {args.dtype}, {args.rounds} rounds. {where}")
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, max_tasks_per_child=1) as pool:
        for section in args.sections:
            lines: list = []
            for job in track(work[section], f"{section} ", transient=True, console=Console(stderr=True)):
                made = pool.submit(apart, args.threads, *job).result()
                lines += made if isinstance(made, list) else [made]
            results[section] = lines
            print(
                f"\n{section}\n\n{table(lines, list(dict.fromkeys(key for line in lines for key in line)))}", flush=True
            )
            if section == "curves":
                draw(lines[: len(counts)], lines[len(counts) :], args.plots)
            if args.json:
                args.json.write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
