"""Searchers against random search, on tables: every point of a finite space is run once, and searches are replayed.

    python benchmarks/search.py table --task digits --jobs 2       # make or go on with benchmarks/search/digits.json
    python benchmarks/search.py again --task digits --jobs 2       # run the best points of it again, as a search does
    python benchmarks/search.py replay                             # print the table over all tasks that there are

A replay asks a searcher for points, whose outcomes are looked up, until it had as many runs as it may; a point that
cannot be run costs nothing. What was found is the point with the best metric on the validation split. Its figure there
flatters it, as that of the best of many does; `again` gives its mean on the test split over three seeds, which is what
`graft search` reports. Random search gets four times the runs; its figures are its expectations over all orders of the
points, by counting. Searchers know the tables of other tasks (`graft.evidence`), not those of tasks made of the same
data as the one that is replayed; with --blind none.
"""

import argparse
import json
import statistics
from collections.abc import Sequence
from dataclasses import replace
from math import comb
from pathlib import Path
from typing import Any

from graft import evidence, tasks
from graft.catalogue import plain
from graft.models import load_base
from graft.runs import pool
from graft.runs.configuration import Configuration
from graft.runs.reference import final, tuning
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
KIN = {  # tasks made of the same data
    "digits": ("digits", "digits-shifted", "digits-incremental"),
    "prefer": ("prefer", "rewrites"),
    "chapters": ("chapters", "code", "names"),
}
SEEDS = 20
FEW = 5  # seeds, of which the mean is printed as well
AGAIN = (0, 1, 2)  # seeds of `again`


def common_of(task: str, steps: int | None = None) -> Configuration:
    base, usual = TASKS[task]
    return tuning(tasks.task(task), method=["lora"], base=base, steps=steps or usual, learning_rates=[1e-3])[0][0]


def made(task: str, small: bool, steps: int | None, jobs: int, store: Path) -> None:
    """Run what the table has not, and write it."""
    base = TASKS[task][0]
    texts, rates = SMALL if small else (SPACE, RATES)
    space = Space.of(texts, {"learning_rate": rates}, load_base(base, dtype=DTYPE).model)
    common = common_of(task, steps)
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
        rows.append({
            "point": plain(point),
            "metrics": record.metrics["validation"] if record and record.done else None,
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


def again(task: str, count: int, jobs: int, store: Path) -> None:
    """Run the best points of a table with other seeds too, on the test split as well, and write that into it."""
    table = Table(FOLDER / f"{task}.json")
    best = table.ranked[:count]
    plans = [final(table.space.configuration(row["point"], common_of(task)), AGAIN) for row in best]
    records = {r.configuration.id: r for r in pool.run([c for plan in plans for c in plan], store, jobs=jobs)}
    for row, plan in zip(best, plans):
        row["test"] = [records[c.id].metrics["test"][table.metric] for c in plan]
    table.place.write_text(f"{json.dumps(table.content, indent=0)}\n")
    print(f"{len(best)} points again in {table.place}")


class Table:
    """A file of `made`. `ranked` are the rows of points that can be run, the best first."""

    def __init__(self, place: Path):
        self.place, self.content = place, json.loads(place.read_text())
        content = self.content
        self.name, (self.metric,), self.task = place.stem, content["metric"], content["task"]
        model = load_base(content["base"], dtype=DTYPE).model
        self.space = Space.of(content["space"], {"learning_rate": content["learning_rate"]}, model)
        self.rows = {key(row["point"]): row for row in content["rows"]}
        self.ranked = sorted((row for row in content["rows"] if row["metrics"]), key=self.order)

    def worth(self, row: dict) -> float:
        """More is better."""
        value = float(row["metrics"][self.metric])
        return -value if self.metric == "loss" else value

    def order(self, row: dict) -> tuple[float, float]:
        """Less is better: as `graft search` chooses."""
        return -self.worth(row), row["metrics"]["loss"]

    def test(self, row: dict) -> float | None:
        return statistics.fmean(row["test"]) if "test" in row else None

    def replay(self, name: str, seed: int, runs: int, blind: bool = False) -> dict[str, Any]:
        """The row that a search finds with so many runs."""
        known = [] if blind else [t for t in evidence.tables() if t["task"] not in KIN[self.task]]
        searcher, found = searchers.find(name)(self.space, seed=seed, tables=known), dict[str, dict]()
        for _ in range(VAIN):
            if len(found) == runs or (point := searcher.ask()) is None:
                break
            row = self.rows[key(point)]
            losses = (-self.worth(row),) if row["metrics"] else None
            searcher.tell(point, Outcome(losses, {}, row["seconds"]))
            if losses:
                found[key(point)] = row
        return min(found.values(), key=self.order)

    def chance(self, runs: int) -> list[float]:
        """How likely each of `ranked` is the best of so many drawn without replacement."""
        every = len(self.ranked)
        return [comb(every - 1 - i, runs - 1) / comb(every, runs) for i in range(every)]


def mean(values: Sequence[float | None], weights: Sequence[float] | None = None) -> float | None:
    """None where more than a hundredth is not known."""
    weights = weights or [1 / len(values)] * len(values)
    known = [(v, w) for v, w in zip(values, weights) if v is not None]
    share = sum(w for _, w in known)
    return sum(v * w for v, w in known) / share if share > 0.99 else None


def replayed(names: Sequence[str], runs: int, seeds: int, blind: bool) -> None:
    for table in (Table(place) for place in sorted(FOLDER.glob("*.json"))):
        print(f"\n{table.name}, {table.metric}: {len(table.ranked)} points can be run; "
              f"the best has {abs(table.worth(table.ranked[0])):.4f}")  # fmt: skip
        print(f"{'searcher':10} {'runs':>5} {f'{seeds} seeds':>9} {f'{FEW} seeds':>9} {'test':>8}")
        rows = table.ranked
        for times in (1, 4):
            chance = table.chance(min(times * runs, len(rows)))
            values = mean([abs(table.worth(r)) for r in rows], chance), mean([table.test(r) for r in rows], chance)
            print(f"{'random':10} {times * runs:5} {figure(values[0]):>9} {'':9} {figure(values[1]):>8}")
        for name in names:
            found = [table.replay(name, seed, runs, blind) for seed in range(seeds)]
            own = [abs(table.worth(row)) for row in found]
            shown = mean(own), mean(own[:FEW]), mean([table.test(row) for row in found])
            print(f"{name:10} {runs:5} {figure(shown[0]):>9} {figure(shown[1]):>9} {figure(shown[2]):>8}")


def figure(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    table = commands.add_parser("table", help="make the table of a task; what was run is not run again")
    table.add_argument("--task", choices=TASKS, required=True)
    table.add_argument("--small", action="store_true", help="of a small space, to try it out")
    table.add_argument("--steps", type=int)
    more = commands.add_parser("again", help="run the best points of a table again, with several seeds")
    more.add_argument("--task", choices=TASKS, required=True)
    more.add_argument("--count", type=int, default=12)
    for command in (table, more):
        command.add_argument("--jobs", type=int, default=1)
        command.add_argument("--store", type=Path, default=Path("runs/search-table"))
    replay = commands.add_parser("replay", help="replay searches on all tables")
    replay.add_argument("--searchers", default="config,autopeft,carbs,tpe,gp")
    replay.add_argument("--runs", type=int, default=16)
    replay.add_argument("--seeds", type=int, default=SEEDS)
    replay.add_argument("--blind", action="store_true", help="searchers know nothing of other tasks")
    given = parser.parse_args()
    if given.command == "table":
        made(given.task, given.small, given.steps, given.jobs, given.store)
    elif given.command == "again":
        again(given.task, given.count, given.jobs, given.store)
    else:
        replayed(given.searchers.split(","), given.runs, given.seeds, given.blind)


if __name__ == "__main__":
    main()
