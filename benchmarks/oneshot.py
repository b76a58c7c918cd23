"""Do the weights that a path inherits from a supernet rank it as training it anew does?

    python benchmarks/oneshot.py

NOAH's supernet on graft:sprout and task:digits; some of its paths are drawn, scored with inherited weights on the data
held out, and each trained anew on the same data with as many steps as a reference run has. The rank correlation of the
two losses (Spearman), with its 95 % bootstrap interval over the paths, goes into oneshot.json, and so do the test
figures of the path that the search finds and of its uniform rivals under the same cap.
"""

import argparse
import json
import random
import time
from pathlib import Path

import numpy as np
import torch
from scipy.stats import spearmanr

import graft
from graft import tasks
from graft.searching.oneshot import Budget, find
from graft.searching.oneshot.evolution import evolve
from graft.searching.oneshot.supernet import Judge, Supernet
from graft.training.data import held_out

TRAINING = {"batch_size": 32, "learning_rate": 5e-3}


def interval(x, y, rounds=2000):
    """The middle 95 % of Spearman's correlation over paths drawn with replacement."""
    rng, found = np.random.default_rng(0), []
    for _ in range(rounds):
        rows = rng.integers(0, len(x), len(x))
        found.append(spearmanr(np.take(x, rows), np.take(y, rows)).statistic)
    return [round(float(v), 3) for v in np.nanquantile(found, (0.025, 0.975))]


def main():
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("--paths", type=int, default=12, help="that are trained anew")
    asked.add_argument("--steps", type=int, default=200, help="of the supernet")
    asked.add_argument("--retrain", type=int, default=60, help="steps of a path that is trained anew")
    asked.add_argument("--scored", type=int, default=60, help="paths that evolution scores")
    asked.add_argument("--cap", type=int, default=8000, help="parameters of a path")
    asked.add_argument("--output", type=Path, default=Path(__file__).with_name("oneshot.json"))
    given = asked.parse_args()
    begun, task = time.perf_counter(), tasks.task("digits")
    rows = task.rows("train")
    base = graft.load_base("graft:sprout", objective="image-classification", examples=rows)
    examples, held = held_out(rows, 0.2, 0)
    budget = Budget(steps=given.steps, cap=given.cap)
    with Supernet(base, find("noah")().members(base), budget.seed) as net:
        net.train(examples, budget.steps, **TRAINING)
        judge, rng = Judge(net, held), random.Random(1)
        sample = [net.draw(rng) for _ in range(given.paths)]
        inherited = [-judge.score(path)[1] for path in sample]
        sampled = [net.found(path) for path in sample]
        found = evolve(
            net.draw, net.mutate, net.cross, judge.score, lambda p: net.parameters(p) <= given.cap, scored=given.scored
        )
        best = net.found(next(iter(found)))

    def anew(plan, steps, seed=0):
        done = graft.tune("graft:sprout", examples, steps=steps, seed=seed, progress=False, **TRAINING, **plan)
        return done.base, sum(p.numel() for a in done.adapters.values() for p in a.parameters())

    def measured(base, rows):
        return graft.evaluate(base.model, rows, **base.arguments())

    retrained = [measured(anew(f.plan(), given.retrain)[0], held)["loss"] for f in sampled]
    sizes = [f.parameters for f in sampled]
    result = {
        "paths": [
            {"parameters": n, "inherited": round(i, 4), "retrained": round(r, 4)}
            for n, i, r in zip(sizes, inherited, retrained)
        ],
        "spearman": round(float(spearmanr(inherited, retrained).statistic), 3),
        "interval": interval(inherited, retrained),
        "spearman of parameters": round(float(spearmanr([-n for n in sizes], retrained).statistic), 3),
        "settings": {k: v for k, v in vars(given).items() if k != "output"},
        "threads": torch.get_num_threads(),
    }
    contestants = {
        "found": best.plan(),
        "lora(rank=2) everywhere": {"method": graft.LoRA(rank=2, alpha=2.0), "targets": "qkv"},
        "vpt(length=10) everywhere": {"method": graft.VPT(length=10)},
        "houlsby(size=5) everywhere": {"method": graft.Houlsby(size=5), "targets": "mlp"},
    }
    result["test"] = {}
    for name, plan in contestants.items():
        trained, count = anew(plan, given.retrain)
        result["test"][name] = {
            "parameters with the head": count,
            **{k: round(v, 4) for k, v in measured(trained, task.rows("test")).items()},
        }
    result["seconds"] = round(time.perf_counter() - begun, 1)
    given.output.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
