"""Records that no run made, and tiny bases and tasks for real ones."""

from dataclasses import replace

from graft.runs.configuration import Configuration
from graft.runs.store import Record

COMMON = Configuration(base="tiny", task="rewrites", method="lora", training={"learning_rate": 1e-3, "steps": 3})
FACTS = {"people": 4, "strangers": 1, "edits": 2, "forget": 1}


def configuration(rate=1e-3, **changes):
    training = {"steps": 3} | ({} if rate is None else {"learning_rate": rate})
    return replace(COMMON, training=training, **changes)


def record(rate=1e-3, exact_match=0.0, loss=1.0, *, test=None, reason=None, **changes):
    """A record of a run that tried a rate, or one with what it got on the test split, or of one that failed."""
    made = configuration(rate, splits=("validation",) if test is None else ("validation", "test"), **changes)
    if reason:
        return Record(configuration=made, status="failed", reason=reason)
    metrics = {"validation": {"exact_match": exact_match, "loss": loss}}
    if test is not None:
        metrics["test"] = {"exact_match": test, "loss": loss}
    return Record(
        configuration=made, status="done", metrics=metrics, parameters=10, adapter_bytes=100, peak_memory=1000,
        seconds={"training": 2.0, "step": 0.5}, baseline={"test": {"exact_match": 0.25}},
        environment={"cpu": "some", "cores": 2, "threads": 1, "python": "3", "torch": "2", "transformers": "5"},
    )  # fmt: skip
