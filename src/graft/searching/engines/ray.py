"""Runs as trials of Ray Tune: on the cores of this machine, or on a cluster."""

import logging
import os
import tempfile
from pathlib import Path
from typing import Any

from ...core.errors import GraftError
from ...runs import pool
from ...runs.configuration import Configuration
from ...runs.single import failed, perform
from ...runs.store import Record, Store
from .. import population
from ..study import Study

RUNGS = 8  # the first of which is at this share of the steps
BRACKETS = {"asha": 1, "hyperband": 3}
RETRIES = 2  # of a run whose worker dies


def run(
    study: Study, store: Path, *, jobs: int, threads: int, tell: bool | pool.Tell, address: str | None = None,
    scheduler: str | None = None, **_: Any,
) -> None:  # fmt: skip
    """Up to `jobs` runs at a time, the next one as soon as one has ended.

    address    of a cluster: "auto", or "ray://HOST:10001"; without it, Ray is started on this machine and ended again
    scheduler  asha: runs whose validation loss is among the worse half at 1/8, 1/4 and 1/2 of their steps are stopped
               there (asynchronous successive halving); hyperband: so, but some only at the later of these points. A
               stopped run is a record without a result. pbt: population based training, see `searching.population`

    A run whose worker dies is made again, twice at most; with pbt it goes on from its last checkpoint. The record of a
    run comes back to this process, which keeps it under the id of its configuration.

    A System for Massively Parallel Hyperparameter Tuning. Li et al., 2020. https://arxiv.org/abs/1810.05934
    Hyperband: A Novel Bandit-Based Approach to Hyperparameter Optimization. Li et al., 2018.
    https://arxiv.org/abs/1603.06560
    """
    try:
        import ray
        from ray import tune
        from ray.tune.schedulers import AsyncHyperBandScheduler
    except ImportError:
        raise GraftError("the engine ray needs Ray Tune: pip install 'graft[ray]'") from None
    if scheduler not in (None, *BRACKETS, "pbt"):
        raise GraftError(f"there is no scheduler {scheduler!r}; there are {', '.join((*BRACKETS, 'pbt'))}")
    steps, begun = study.common.training["steps"], not ray.is_initialized()
    runs, trial = Runs(study, Store(store), tell), made
    if scheduler == "pbt":
        trial, space, how, callbacks = population.of(study, store, runs)
        if not space:
            return
    else:
        halving = None if scheduler is None else AsyncHyperBandScheduler(
            time_attr="step", metric="loss", mode="min", max_t=steps + 1, grace_period=max(1, steps // RUNGS),
            reduction_factor=2, brackets=BRACKETS[scheduler],
        )  # fmt: skip
        space, callbacks = None, None
        how = {"search_alg": _asking(runs), "scheduler": halving, "num_samples": -1, "max_concurrent_trials": jobs}
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    if begun:
        ray.init(
            address=address, num_cpus=None if address else jobs * threads, include_dashboard=False,
            log_to_driver=False, logging_level=logging.ERROR, runtime_env={"env_vars": _environment(threads)},
        )  # fmt: skip
    try:
        with tempfile.TemporaryDirectory() as place:
            found = tune.Tuner(
                tune.with_resources(trial, {"cpu": threads, "gpu": 1 if ray.cluster_resources().get("GPU") else 0}),
                param_space=space,
                tune_config=tune.TuneConfig(**how),
                run_config=tune.RunConfig(
                    storage_path=place, name="search", verbose=0, callbacks=callbacks,
                    failure_config=tune.FailureConfig(max_failures=RETRIES),
                ),
            )  # fmt: skip
            found.fit()
    finally:
        if begun:
            ray.shutdown()


def made(asked: dict[str, Any]) -> None:
    """A trial: the run of a configuration, whose points of the validation loss and whose record are reported."""
    from ray import tune

    configuration = Configuration.of(asked["configuration"])

    def watch(entry: dict[str, Any]) -> None:
        if "validation" in entry:
            tune.report({"step": entry["step"], "loss": entry["validation"]["loss"], "record": ""})

    record = perform(configuration, watch)
    loss = record.metrics["validation"]["loss"] if record.done else float("inf")
    tune.report({"step": configuration.training["steps"] + 1, "loss": loss, "record": record.json()})


def _environment(threads: int) -> dict[str, str]:
    source = str(Path(__file__).parents[3])
    path = os.pathsep.join(filter(None, [source, os.environ.get("PYTHONPATH")]))
    return {"PYTHONPATH": path, "OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}


class Runs:
    """The runs of a study by the ids of their trials."""

    def __init__(self, study: Study, store: Store, tell: bool | pool.Tell):
        self.study, self.store, self.tell = study, store, tell
        self.running: dict[str, Configuration] = {}

    def begin(self, trial: str, c: Configuration) -> None:
        self.running[trial] = c
        self._tell(None)

    def end(self, trial: str, last: dict[str, Any], error: bool) -> Record:
        """Keep the record that came last, or one that says why there is none."""
        c = self.running.pop(trial)
        if last.get("record"):
            record = Record.of(last["record"])
        else:
            at = f"after {last['step']} of {c.training['steps']} steps" if "step" in last else "at once"
            why = "its worker died, again and again" if error else f"stopped by the scheduler {at}"
            record = failed(c, why, last.get("time_total_s", 0.0))
        self.store.put(record)
        self.study.take(record, anew=True, asked=c)
        self._tell(record)
        return record

    def _tell(self, record: Record | None) -> None:
        if callable(self.tell):
            self.tell(list(self.running.values()), record)


def _asking(runs: Runs) -> Any:
    """What Tune asks for trials: the points of the study."""
    from ray.tune.search import Searcher

    class Asking(Searcher):
        def __init__(self):
            super().__init__(metric="loss", mode="min")
            self.last: dict[str, dict[str, Any]] = {}

        def suggest(self, trial_id: str) -> Any:
            while found := runs.study.next():
                if record := runs.store.get(found[1]):
                    runs.study.take(record, anew=False)
                    continue
                runs.begin(trial_id, found[1])
                return {"configuration": found[1].plain()}
            return Searcher.FINISHED

        def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
            self.last[trial_id] = result

        def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
            runs.end(trial_id, result or self.last.get(trial_id) or {}, error)

    return Asking()
