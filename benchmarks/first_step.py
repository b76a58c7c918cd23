"""How far the first step of low-rank methods goes where the first step of full fine-tuning goes.

    python benchmarks/first_step.py [--seeds 3] [--json benchmarks/first_step.json]

`graft:seedling-small` on `task:rewrites`, all linear layers, rank 8. One step of full fine-tuning changes the matrices
by D = -lr G (SGD) or -lr sign(G) (AdamW, whose first update that is), G the gradient of the loss over 64 examples. Each
start or method takes one step of the same optimizer on the same examples. Cosines with D, over the entries of all
matrices together or, `by matrix`, as the mean over matrices, of

step      the change of the matrices by the step
from base their change from the base, which some starts leave before the step

`other data`: of `step`, where the start saw 64 other examples than the step. `optimum`: the cosine of the best
approximation of D of rank 8, and of rank 16, which is what the two factors of LoRA may reach in a step from a start
that is not zero. Mean over seeds, which choose the examples and the random starts.
"""

import argparse
import json
import statistics
from pathlib import Path

import torch
from torch import Tensor, nn

import graft
from graft import tasks
from graft.training import objectives
from harness import machine, table

RANK, EXAMPLES, RATE = 8, 64, 1e-4
OPTIMIZERS = {"SGD": torch.optim.SGD, "AdamW": lambda p, lr: torch.optim.AdamW(p, lr, weight_decay=0.0)}
STARTS = ("random", "orthogonal", "pissa", "olora", "eva,rho=1", "corda", "lora_ga")
COLUMNS = ["", "optimizer", "step", "step, by matrix", "from base", "from base, by matrix", "other data"]


def batch(base, rows) -> dict[str, Tensor]:
    doing = objectives.find("causal-lm")(base.model, base.processor)
    features = doing.features(rows)
    return doing.collate(list(features))


def loss(model: nn.Module, data: dict[str, Tensor]) -> Tensor:
    return model(**{k: v for k, v in data.items() if torch.is_tensor(v)}).loss


def cosines(change: dict[str, Tensor], D: dict[str, Tensor], label: str) -> dict[str, float]:
    inner = torch.stack(
        [torch.stack([(a * b).sum() for a, b in ((c, d), (c, c), (d, d))]) for c, d in ((change[k], D[k]) for k in D)]
    )
    (together, c, d), each = inner.sum(0), inner[:, 0] / (inner[:, 1] * inner[:, 2]).sqrt()
    return {label: float(together / (c * d).sqrt()), f"{label}, by matrix": float(each.mean())}


def best(D: dict[str, Tensor], rank: int) -> dict[str, Tensor]:
    """The best approximation of each matrix."""
    parts = {path: torch.linalg.svd(d, full_matrices=False) for path, d in D.items()}
    return {path: (U[:, :rank] * S[:rank]) @ V[:rank] for path, (U, S, V) in parts.items()}


def matrices(adapter: graft.Adapter) -> dict[str, Tensor]:
    return {path: d.weight(d.site.weight).detach().double() for path, d in adapter.deltas.items()}


def stepped(base, recipe, optimizer, data, seen) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The change of the matrices by one step on `data` from a start that saw `seen`, and that from the base."""
    cls, model = recipe.method, base.model
    needs = cls.asks(recipe.hyper)
    stats = graft.collect(model, [seen], needs, loss=loss) if needs else None
    adapter = graft.attach(model, recipe, stats=stats)
    before = matrices(adapter)
    steps = OPTIMIZERS[optimizer]([p for p in adapter.parameters() if p.requires_grad], RATE)
    loss(model, data).backward()
    steps.step()
    after, plain = matrices(adapter), {p: d.site.weight.detach().double() for p, d in adapter.deltas.items()}
    adapter.detach()
    return {p: after[p] - before[p] for p in after}, {p: after[p] - plain[p] for p in after}


def contestants(optimizer: str) -> dict:
    made = {
        f"lora, {init.split(',')[0]}": graft.LoRA(rank=RANK, rslora=init == "lora_ga", init=init) for init in STARTS
    }
    own = f"lora_sb,optimizer={optimizer.lower()},learning_rate={RATE}"
    return made | {
        "lora, lora_sb": graft.LoRA(rank=RANK, init=own),
        "lora_sb": graft.METHODS["lora_sb"](rank=RANK, init=own),
    }


def measure(base, seed: int) -> list[dict]:
    rows = tasks.load("rewrites", split="train")
    chosen = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))[: 2 * EXAMPLES].tolist()
    data, other = (batch(base, [rows[i] for i in part]) for part in (chosen[:EXAMPLES], chosen[EXAMPLES:]))
    G = {p: s["weight_grad"].double() for p, s in graft.collect(base.model, [data], ["weight_grad"], loss=loss).items()}
    found = []
    for optimizer in OPTIMIZERS:
        D = {p: -(g.sign() if optimizer == "AdamW" else g) for p, g in G.items()}
        for rank in (RANK, 2 * RANK):
            found.append({"": f"optimum of rank {rank}", "optimizer": optimizer, **cosines(best(D, rank), D, "step")})
        for label, recipe in contestants(optimizer).items():
            torch.manual_seed(seed)
            by_step, by_all = stepped(base, recipe, optimizer, data, data)
            row = {"": label, "optimizer": optimizer, **cosines(by_step, D, "step"), **cosines(by_all, D, "from base")}
            if recipe.method.asks(recipe.hyper):
                row["other data"] = cosines(stepped(base, recipe, optimizer, data, other)[0], D, "step")["step"]
            found.append(row)
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--json", type=Path, default=Path(__file__).with_name("first_step.json"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    base = graft.load_base("graft:seedling-small", objective="causal-lm", dtype="float32", device="cpu")
    runs = [measure(base, seed) for seed in range(args.seeds)]
    rows = [
        {k: statistics.fmean(r[k] for r in same) if isinstance(v, float) else v for k, v in same[0].items()}
        for same in zip(*runs)
    ]
    print(f"rank {RANK}, {EXAMPLES} examples, {args.seeds} seeds. {machine()}\n")
    print(table(rows, COLUMNS))
    args.json.write_text(json.dumps({"machine": machine(), "seeds": args.seeds, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
