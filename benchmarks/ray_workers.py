"""How long a set of runs takes with two workers of Ray, against one.

    python benchmarks/ray_workers.py --runs 8 --steps 60

Each run is a trial of its own process with one thread, so that two workers need two free cores.
"""

import argparse
import tempfile
import time
from pathlib import Path

from graft import tasks
from graft.runs.reference import tuning
from graft.runs.store import Store
from graft.searching import engines, searchers
from graft.searching.fits import Fits
from graft.searching.space import Space
from graft.searching.study import Study


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=8)
    parser.add_argument("--steps", type=int, default=60)
    given = parser.parse_args()
    rates = "|".join(f"{(i + 1) * 1e-3:g}" for i in range(given.runs))
    space = Space.of(["lora"], {"learning_rate": rates})
    common = tuning(
        tasks.task("digits"), method=["lora"], base="graft:sprout", steps=given.steps, learning_rates=[1e-3]
    )[0][0]  # fmt: skip
    took = {}
    for jobs in (1, 2):
        study = Study(
            space, searchers.find("random")(space), common, Fits(common, {}), ("quality",),
            at_most=given.runs, seconds=None, reserved=0, jobs=jobs,
        )  # fmt: skip
        with tempfile.TemporaryDirectory() as place:
            begun = time.perf_counter()
            engines.find("ray")(study, Path(place), jobs=jobs, threads=1, tell=False)
            took[jobs] = time.perf_counter() - begun
            done = sum(r.done for r in Store(place).records())
        print(f"{jobs} worker{'s' * (jobs > 1)}: {done} runs in {took[jobs]:.1f} s, with the start of Ray", flush=True)
    print(f"two against one: {took[2] / took[1]:.2f}")


if __name__ == "__main__":
    main()
