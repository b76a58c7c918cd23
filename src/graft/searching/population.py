"""Population based training: all runs at once; the worst go on from the best, with another learning rate.

Population Based Training of Neural Networks. Jaderberg et al., 2017. https://arxiv.org/abs/1711.09846
(Ray Tune's scheduler chooses who goes on from whom, and with which rate)

A run that took over the parameters of another one is that one until then. So it is a configuration too, with
`rate_changes`, which gives the same metrics when it is made alone, from the beginning and with any seed.
"""

import json
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..core import disk
from ..core.errors import GraftError
from ..runs.configuration import Configuration
from ..runs.single import perform
from ..runs.store import Record
from .space import Choice, Domain, fixed
from .study import Study

STATE = ".state.json"  # beside the checkpoints: what was trained until the last one


def of(study: Study, store: Path, runs: Any) -> tuple[Any, dict[str, Any], dict[str, Any], list[Any]]:
    """A trial, the space of Tune with all members of the population, how it is searched, and who is told.

    The members are the points of the study; those that have ended before are told to it. Nothing left: an empty space.
    """
    from ray import tune
    from ray.tune.schedulers import PopulationBasedTraining

    if study.at_most is None or not study.common.also.get("points"):
        raise GraftError("the scheduler pbt needs the size of its population: set trials")
    domain, steps = study.space.training["learning_rate"], study.common.training["steps"]
    if fixed(domain):
        raise GraftError("the scheduler pbt changes learning rates: let learning_rate have several values")
    became, members = store.with_name("population.json"), []
    known = json.loads(became.read_text()) if became.exists() else {}
    while found := study.next():
        c = found[1]
        if c.id in known and (record := runs.store.get(Configuration.of(known[c.id]))):
            study.take(record, anew=False, asked=c)
        else:
            members.append({"configuration": c.plain(), "rate": c.training["learning_rate"]})
    how = {
        "scheduler": PopulationBasedTraining(
            time_attr="step", metric="loss", mode="min", log_config=False,
            perturbation_interval=-(-steps // study.common.also["points"]),
            hyperparam_mutations={"member": {"rate": _drawn(domain)}},
        ),
        "reuse_actors": True, "trial_dirname_creator": lambda trial: trial.trial_id,
    }  # fmt: skip

    class Told(tune.Callback):
        def on_trial_start(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
            if trial.trial_id not in runs.running:  # later its configuration may be that of another one
                runs.begin(trial.trial_id, Configuration.of(trial.config["member"]["configuration"]))

        def on_trial_complete(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
            self.end(trial, error=False)

        def on_trial_error(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
            self.end(trial, error=True)

        def end(self, trial: Any, error: bool) -> None:
            asked = runs.running[trial.trial_id]
            record: Record = runs.end(trial.trial_id, trial.last_result or {}, error)
            known[asked.id] = record.configuration.plain()
            disk.replace(became, json.dumps(known).encode())

    return member, {"member": tune.grid_search(members)} if members else {}, how, [Told()]


def member(config: dict[str, Any]) -> None:
    """A trial: a run from its beginning or from a checkpoint, its own or another one's, with the rate that is asked."""
    from ray import tune

    asked, checkpoint = config["member"], tune.get_checkpoint()
    state = {"configuration": asked["configuration"], "rate": asked["rate"], "step": 0}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "adapter"
        run = folder.with_name("adapter.run")
        if checkpoint:
            with checkpoint.as_directory() as held:
                shutil.copytree(held, run)
            state = json.loads((run / STATE).read_text())
        c = Configuration.of(state["configuration"])
        if state["rate"] != asked["rate"]:
            times = asked["rate"] / c.training["learning_rate"]
            changes = {**c.training.get("rate_changes", {}), str(state["step"]): times}
            c = replace(c, training={**c.training, "rate_changes": changes})
        state |= {"configuration": c.plain(), "rate": asked["rate"]}
        point: dict[str, Any] | None = None

        def watch(entry: dict[str, Any]) -> None:
            """Report a point of the validation loss at the step after it, when its checkpoint is there."""
            nonlocal point
            if "validation" in entry:
                point = entry
            elif point:
                state["step"] = point["step"]
                (run / STATE).write_text(json.dumps(state))
                tune.report(
                    {"step": point["step"], "loss": point["validation"]["loss"], "record": ""},
                    checkpoint=tune.Checkpoint.from_directory(run),
                )
                point = None

        record = perform(c, watch, folder)
    # As early as the last point, so that nothing is decided about a run that has ended.
    loss = record.metrics["validation"]["loss"] if record.done else float("inf")
    tune.report({"step": state["step"], "loss": loss, "record": record.json()})


def _drawn(domain: Domain) -> Any:
    """A domain as Tune has it."""
    from ray import tune

    if isinstance(domain, Choice):
        return list(domain.values)
    return (tune.loguniform if domain.log else tune.uniform)(domain.low, domain.high)
