"""Does a placement of methods by DARTS beat one method everywhere, and does the majority vote of several?

    python benchmarks/placement.py

On graft:sprout and task:digits, for each seed: LoRA, (IA)3 and BitFit at all matrices, each tuned alone; the majority
vote of the three; and the placement that DARTS finds among them, tuned anew with as many steps. Test accuracies go into
placement.json. After https://arxiv.org/abs/2401.02122, where the vote wins and DARTS does not.
"""

import argparse
import json
from pathlib import Path

import graft
from graft import tasks
from graft.searching.oneshot import search
from graft.searching.oneshot.voting import vote

RATES = {"lora": 5e-3, "ia3": 1e-2, "bitfit": 1e-2, "darts": 5e-3}


def main():
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    asked.add_argument("--search", type=int, default=40, help="steps of the supernet")
    asked.add_argument("--steps", type=int, default=60, help="of a run that is measured")
    asked.add_argument("--output", type=Path, default=Path(__file__).with_name("placement.json"))
    given = asked.parse_args()
    task, rows = tasks.task("digits"), []
    test = task.rows("test")
    right = [row["label"] for row in test]

    def tuned(name, seed, **plan):
        done = graft.tune(
            "graft:sprout", task.rows("train"), steps=given.steps, seed=seed, batch_size=32,
            learning_rate=RATES[name], progress=False, **plan,
        )  # fmt: skip
        said = [p["label"] for p in graft.predict(done.base.model, test, **done.base.arguments())]
        return said, sum(p.numel() for a in done.adapters.values() for p in a.parameters())

    for seed in given.seeds:
        alone = {name: tuned(name, seed, method=name, targets="all-linear") for name in ("lora", "ia3", "bitfit")}
        found = search(
            "graft:sprout", task.rows("train"), method="darts", options={"methods": ("lora", "ia3", "bitfit")},
            steps=given.search, seed=seed, batch_size=32, learning_rate=RATES["darts"],
        )  # fmt: skip
        every = alone | {"darts": tuned("darts", seed, **found.plan())}
        every["vote"] = vote([said for said, _ in alone.values()]), sum(count for _, count in alone.values())
        rows += [
            {
                "seed": seed,
                "contestant": name,
                "accuracy": round(sum(map(str.__eq__, said, right)) / len(right), 4),
                "parameters with heads": count,
                **({"placement": found.table[0]} if name == "darts" else {}),
            }
            for name, (said, count) in every.items()
        ]
    given.output.write_text(
        json.dumps({"settings": {k: v for k, v in vars(given).items() if k != "output"}, "rows": rows}, indent=1) + "\n"
    )
    for row in rows:
        print({k: v for k, v in row.items() if k != "placement"})


if __name__ == "__main__":
    main()
