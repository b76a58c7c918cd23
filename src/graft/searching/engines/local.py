"""Runs on this machine, in processes of their own."""

from pathlib import Path

from ...runs import pool
from ...runs.forks import Forks
from ...runs.store import Store
from ..study import Study


def run(study: Study, store: Path, *, jobs: int, threads: int, tell: bool | pool.Tell, within: Forks) -> None:
    """As many runs at a time as there are jobs, the next ones when all of these have ended.

    So the order in which a searcher is told does not depend on how long runs take, and a search that goes on asks for
    the same points again, whose records are there.
    """
    while batch := [found for _ in range(jobs) if (found := study.next())]:
        wanted = [c for _, c in batch]
        missing = {c.id for c in wanted if Store(store).get(c) is None}
        for record in pool.run(wanted, store, jobs=jobs, threads=threads, progress=tell, within=within):
            study.take(record, anew=record.configuration.id in missing)
