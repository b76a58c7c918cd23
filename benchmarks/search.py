"""Searchers against random search, on tables: every point of a finite space is run once, and searches are replayed.

    python benchmarks/search.py table --task digits --jobs 2       # make or go on with benchmarks/search/digits.json
    python benchmarks/search.py replay                             # print the table over all tasks that there are

A replay asks a searcher for points, whose outcomes are looked up, until its budget is spent: as many runs, or, with
--cost, as many seconds of them. What counts is the metric on the validation split of the best point found, and random
search gets four times the budget. A regret is the metric of the best point of the table less that of the point found.
"""

import argparse
import json
import statistics
from dataclasses import replace
from pathlib import Path

from graft import tasks
from graft.catalogue import plain
from graft.models import load_base
from graft.runs import pool
from graft.runs.reference import tuning
from graft.runs.single import DTYPE
from graft.searching import searchers
from graft.searching.fits import Fits
from graft.searching.outcome import Outcome
from graft.searching.space import Space, key
from graft.searching.study import VAIN

FOLDER = Path(__file__).parent / "search"
RANKS = "2|4|8|16"
SPACE = [
    f"lora(rank={RANKS}) on attention|mlp|all-linear", f"dora(rank={RANKS}) on attention|all-linear",
    "pfeiffer(size=4|16|64)", "houlsby(size=4|16|64)", "ia3", "bitfit",
]  # fmt: skip
RATES = "3e-4|1e-3|3e-3|1e-2|3e-2|1e-1"
SMALL = ["lora(rank=2|8) on attention|mlp", "ia3"], "1e-3|3e-3|1e-2|3e-2"
TASKS = {
    "digits": ("graft:sprout", 60),
    "prefer": ("graft:seedling-small", 40),
    "chapters": ("graft:minilm", 20),
}
SEEDS = 20


def made(task: str, small: bool, steps: int | None, jobs: int, store: Path) -> None:
    """Run what the table has not, and write it."""
    base, usual = TASKS[task]
    texts, rates = SMALL if small else (SPACE, RATES)
    space = Space.of(texts, {"learning_rate": rates}, load_base(base, dtype=DTYPE).model)
    common = tuning(tasks.task(task), method=["lora"], base=base, steps=steps or usual, learning_rates=[1e-3])[0][0]
    fits, wanted = Fits(common, {}), {}
    for point in space.points():
        configuration = space.configuration(point, common)
        if fits.refused(configuration) is None:
            wanted[key(point)] = configuration
    records = {r.configuration.id: r for r in pool.run(wanted.values(), store, jobs=jobs)}
    rows = []
    for point in space.points():
        c = wanted.get(key(point))
        record = records[c.id] if c else None
        done = record is not None and record.done
        rows.append({
            "point": plain(point),
            "metrics": record.metrics["validation"] if done else None,
            "seconds": round(record.seconds["in_all"], 3) if record else 0.0,
            "parameters": record.parameters if record else None,
        })  # fmt: skip
    content = {
        "task": task, "base": base, "space": list(texts), "learning_rate": rates,
        "training": plain(replace(common).training),
        "metric": [m.__name__ for m in tasks.find(task).judged(common.knobs)][:1] or ["loss"],
        "environment": next(r.environment for r in records.values() if r.done), "rows": rows,
    }  # fmt: skip
    FOLDER.mkdir(exist_ok=True)
    place = FOLDER / f"{task}{'-small' if small else ''}.json"
    place.write_text(f"{json.dumps(content, indent=0)}\n")
    print(f"{len(rows)} points in {place}")


class Table:
    """A file of `made`."""

    def __init__(self, place: Path):
        content = json.loads(place.read_text())
        self.name, (self.metric,) = place.stem, content["metric"]
        self.base, texts, rates = content["base"], content["space"], content["learning_rate"]
        self.space = Space.of(texts, {"learning_rate": rates}, load_base(self.base, dtype=DTYPE).model)
        self.rows = {key(row["point"]): row for row in content["rows"]}
        worths = [self.worth(row) for row in content["rows"] if row["metrics"]]
        self.best, self.worst = max(worths), min(worths)

    def worth(self, row: dict) -> float:
        """More is better."""
        value = float(row["metrics"][self.metric])
        return -value if self.metric == "loss" else value

    def replay(self, name: str, seed: int, runs: int, seconds: float) -> float:
        """The best worth that a search finds with so many runs, in at most so many seconds of them."""
        searcher, best, spent, seen = searchers.find(name)(self.space, seed=seed), self.worst, 0.0, set[str]()
        for _ in range(VAIN):
            if (point := searcher.ask()) is None or len(seen) >= runs:
                break
            row, known = self.rows[key(point)], key(point) in seen
            spent += 0.0 if known else row["seconds"]
            if spent > seconds:
                break
            seen.add(key(point))
            losses = None if row["metrics"] is None else (-self.worth(row),)
            searcher.tell(point, Outcome(losses, {}, row["seconds"]))
            best = max(best, -losses[0]) if losses else best
        return best


def replayed(names: list[str], runs: int, seeds: int, cost: bool) -> None:
    tables = [Table(place) for place in sorted(FOLDER.glob("*.json"))]
    for table in tables:
        mean = statistics.fmean(row["seconds"] for row in table.rows.values())
        print(f"\n{table.name}: {len(table.rows)} points, best {table.metric} {abs(table.best):.4f}")
        plans = [(n, 1) for n in ["random", *names]] + [("random", 4)]
        found = {}
        for name, times in plans:
            limit = (10**6, times * runs * mean) if cost else (times * runs, float("inf"))
            found[name, times] = [table.replay(name, seed, *limit) for seed in range(seeds)]
        bar = statistics.fmean(found["random", 4])
        budget = f"{runs * mean:.0f} s" if cost else f"{runs} runs"
        print(f"{'searcher':12} {'budget':>10} {'mean':>8} {'sd':>7} {'regret':>8}  at least random x 4")
        for (name, times), values in found.items():
            own = statistics.fmean(values)
            verdict = "" if (name, times) == ("random", 4) else "yes" if own >= bar else "no"
            row = f"{name:12} {f'{times} x {budget}':>10} {own:8.4f} {statistics.stdev(values):7.4f}"
            print(f"{row} {table.best - own:8.4f}  {verdict}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    table = commands.add_parser("table", help="make the table of a task; what was run is not run again")
    table.add_argument("--task", choices=TASKS, required=True)
    table.add_argument("--small", action="store_true", help="of a small space, to try it out")
    table.add_argument("--steps", type=int)
    table.add_argument("--jobs", type=int, default=1)
    table.add_argument("--store", type=Path, default=Path("runs/search-table"))
    replay = commands.add_parser("replay", help="replay searches on all tables")
    replay.add_argument("--searchers", default="config,autopeft,carbs,tpe,gp")
    replay.add_argument("--runs", type=int, default=16)
    replay.add_argument("--seeds", type=int, default=SEEDS)
    replay.add_argument("--cost", action="store_true", help="the budget is seconds instead of runs")
    given = parser.parse_args()
    if given.command == "table":
        made(given.task, given.small, given.steps, given.jobs, given.store)
    else:
        replayed(given.searchers.split(","), given.runs, given.seeds, given.cost)


if __name__ == "__main__":
    main()
