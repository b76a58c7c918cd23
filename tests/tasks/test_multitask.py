"""Eight tasks: the measured agreement of their labels is the relatedness that is claimed."""

import numpy as np
import pytest

from graft import tasks
from graft.core.errors import GraftError
from graft.tasks.multitask import DIRECTIONS, relatedness


def labels(task, split="train"):
    """[journeys, 8] of booleans."""
    found = {}
    for row in task.rows(split):
        text, name = row["prompt"].removesuffix("?").split(": ")
        assert name == row["task"]
        found.setdefault(text, {})[name] = row["completion"] == " yes"
    return np.array([[of[name] for name in DIRECTIONS] for of in found.values()])


def test_agreement_is_the_relatedness_within_chance():
    said = labels(tasks.task("multitask", examples=20_000, seed=3))
    agreement = (said[:, :, None] == said[:, None, :]).mean(0)
    assert np.abs(agreement - np.array(relatedness())).max() < 5 * 0.5 / np.sqrt(len(said))
    for i, a in enumerate(DIRECTIONS):
        assert agreement[i, (i + 4) % 8] == 0, a  # the opposite is known exactly
    assert relatedness()[0][:5] == [1, 0.75, 0.5, 0.25, 0]


def test_answers_follow_from_the_directions_of_the_words():
    task = tasks.task("multitask")
    angles = task.directions()
    assert len(angles) == 32 and np.allclose(np.diff(sorted(angles.values())), 2 * np.pi / 32)
    compass = {"north": 1j, "east": 1, "south": -1j, "west": -1}
    compass |= {"northeast": 1 + 1j, "southeast": 1 - 1j, "southwest": -1 - 1j, "northwest": -1 + 1j}
    for row in task.rows("test"):
        journey = sum(np.exp(1j * angles[word]) for word in row["prompt"].split(":")[0].split())
        toward = (journey * np.conj(compass[row["task"]])).real
        assert (toward > 0) == (row["completion"] == " yes")


def test_one_task_has_its_rows_of_all():
    everything = tasks.load("multitask", split="test")
    for name in DIRECTIONS:
        assert list(tasks.load("multitask", split="test", task=name)) == [r for r in everything if r["task"] == name]


def test_more_journeys_than_there_are_are_refused():
    with pytest.raises(GraftError, match="examples=3000: there are 4960 journeys of length=3, take at most 1456"):
        tasks.task("multitask", examples=3000, length=3)
