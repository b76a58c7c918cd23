"""What a switch between two merged adapters costs: SHiRA writes its entries, LoRA forms new matrices.

    python benchmarks/switching.py [--rounds 9] [--json benchmarks/switching.json]

Square linear layers in float32, one thread. Per width, in turns, in seconds of the processor:

switch  take the merged adapter out and merge the other one: graft's undo, activate, merge
load    the same with the other adapter loaded from its file first, and taken off afterwards
torch   the tensor operations alone, on one matrix: index_put of the entries against W + B A formed anew
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

import graft
from harness import in_turns, machine, ratio, table

WIDTHS, LAYERS = (512, 1024, 2048, 4096), 2
CONTESTANTS = {
    "lora": dict(rank=32),
    "shira 1 %": dict(density=0.01, mask="magnitude"),
    "shira 2 %": dict(density=0.02, mask="magnitude"),
}
COLUMNS = [
    "width", "", "switch, ms", "LoRA / it, switch", "load, ms", "LoRA / it, load", "torch, ms", "LoRA / it, torch",
]  # fmt: skip


def adapted(label: str, width: int, folder: Path) -> nn.Sequential:
    """A model with two adapters, the first one merged; the second one is in `folder` too."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(width, width) for _ in range(LAYERS)))
    for i, name in enumerate("ab"):
        paths = [str(n) for n in range(LAYERS)]
        adapter = graft.attach(model, label.split()[0], paths, name=name, seed=i, **CONTESTANTS[label])
        with torch.no_grad():
            for p in adapter.parameters():
                p.normal_(std=0.01)
        adapter.requires_grad_(False)
        adapter.save(folder / label / name)
    return model


def switching(model: nn.Module) -> Callable[[], object]:
    state = {"running": "a", "merged": merged(model, "a")}

    def switch():
        state["running"] = "b" if state["running"] == "a" else "a"
        state["merged"].undo()
        state["merged"] = merged(model, state["running"])

    return switch


def merged(model: nn.Module, name: str):
    graft.activate(model, name)
    return graft.merge(model)


def loading(model: nn.Module, folder: Path) -> Callable[[], object]:
    for adapter in list(graft.adapters(model).values()):
        adapter.detach()
    state = {"adapter": graft.load(model, folder / "a"), "name": "a"}
    state["merged"] = graft.merge(model)

    def load():
        state["merged"].undo()
        state["adapter"].detach()
        state["name"] = "b" if state["name"] == "a" else "a"
        state["adapter"] = graft.load(model, folder / state["name"])
        state["merged"] = graft.merge(model)

    return load


def alone(label: str, width: int) -> Callable[[], object]:
    hyper = CONTESTANTS[label]
    w = torch.randn(width, width)
    if label == "lora":
        A, B = torch.randn(hyper["rank"], width), torch.randn(width, hyper["rank"])
        return lambda: torch.addmm(w, B, A)
    flat, count = w.view(-1), round(hyper["density"] * w.numel())
    index, values = torch.randperm(w.numel())[:count].sort().values, torch.randn(count)
    return lambda: flat.index_put_((index,), values)


def measure(width: int, rounds: int) -> list[dict]:
    with tempfile.TemporaryDirectory() as made, torch.no_grad():
        folder = Path(made)
        models = {label: adapted(label, width, folder) for label in CONTESTANTS}
        times = {"switch": in_turns({label: switching(m) for label, m in models.items()}, rounds, 2, time.process_time)}
        models = {label: adapted(label, width, folder / "again") for label in CONTESTANTS}
        loads = {label: loading(m, folder / "again" / label) for label, m in models.items()}
        times["load"] = in_turns(loads, rounds, 2, time.process_time)
        times["torch"] = in_turns({label: alone(label, width) for label in CONTESTANTS}, rounds, 2, time.process_time)
    rows = []
    for label in CONTESTANTS:
        row: dict = {"width": width, "": label}
        for what, found in times.items():
            row[f"{what}, ms"] = 1e3 * statistics.median(found[label])
            row[f"LoRA / it, {what}"] = ratio(found, "lora", label)
        rows.append(row)
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path, default=Path(__file__).with_name("switching.json"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = [row for width in WIDTHS for row in measure(width, args.rounds)]
    print(f"{LAYERS} matrices, float32, {args.rounds} rounds. {machine()}\n")
    print(table(rows, COLUMNS))
    args.json.write_text(json.dumps({"machine": machine(), "rounds": args.rounds, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
