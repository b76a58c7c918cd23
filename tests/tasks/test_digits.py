"""Digits: the images of scikit-learn, shifted as the card says, and in steps."""

from collections import Counter

import numpy as np
import pytest
import torch

from graft import tasks
from graft.core.errors import GraftError
from graft.tasks import SPLITS
from graft.tasks import digits as module

datasets = pytest.importorskip("sklearn.datasets")
IMAGES = datasets.load_digits()


def bright(rows):
    """[n, 8, 8] from 0 to 255."""
    found = np.stack([row["image"] for row in rows])
    assert found.dtype == np.uint8 and found.shape[1:] == (8, 8, 3)
    assert (found[..., :1] == found).all()
    return found[..., 0].astype(float)


def test_every_image_stands_once_with_its_digit():
    task = tasks.task("digits")
    rows = [row for split in SPLITS for row in task.rows(split)]
    assert sorted(row["source"] for row in rows) == list(range(len(IMAGES.target)))
    for row, image in zip(rows, bright(rows)):
        assert row["label"] == str(IMAGES.target[row["source"]])
        assert np.abs(image - IMAGES.images[row["source"]] * 255 / 16).max() <= 0.5


def shifted(**knobs):
    task = tasks.task("digits-shifted", **knobs)
    return task.rows("test"), bright(task.rows("clean")), bright(task.rows("test"))


@pytest.mark.parametrize("shift", ["rotation", "noise", "contrast", "labels"])
def test_severity_zero_changes_no_image(shift):
    rows, clean, test = shifted(shift=shift, severity=0)
    assert (clean == test).all() and {row["severity"] for row in rows} == {0}


def test_rotation_turns_counterclockwise_by_twelve_degrees_a_step():
    rows, clean, test = shifted(shift="rotation", severity=2.5)
    a = np.deg2rad(30)
    y, x = np.mgrid[0:8, 0:8] - 3.5
    # Where a pixel comes from: turned back. On a screen, whose y points down, counterclockwise takes (x, y) to
    # (x cos a + y sin a, y cos a - x sin a).
    source = np.stack([x * np.cos(a) - y * np.sin(a), x * np.sin(a) + y * np.cos(a)], -1)
    inside = (np.abs(source) <= 3.5).all(-1)
    grid = torch.tensor(source / 3.5).expand(len(rows), 8, 8, 2)
    expected = torch.nn.functional.grid_sample(torch.tensor(clean)[:, None], grid, "bilinear", align_corners=True)
    assert inside.sum() > 40 and np.abs(expected[:, 0].numpy() - test)[:, inside].max() <= 1


def test_contrast_shrinks_the_distance_to_the_mean():
    rows, _, test = shifted(shift="contrast", severity=4)
    grey = np.stack([IMAGES.images[row["source"]] for row in rows])
    mean = grey.mean((1, 2), keepdims=True)
    assert np.abs((mean + 0.28 * (grey - mean)) * 255 / 16 - test).max() <= 0.5 + 1e-9


def test_noise_has_its_standard_deviation():
    _, clean, test = shifted(shift="noise", severity=1)
    middle = (clean > 100) & (clean < 155)  # far from both ends, where nothing is cut off
    assert (test - clean)[middle].std() == pytest.approx(1.6 * 255 / 16, rel=0.05)
    assert (test - clean)[middle].mean() == pytest.approx(0, abs=1.5)


def test_a_rising_stream_rises_along_a_line():
    rows, _, test = shifted(shift="contrast", severity=4, stream="rising")
    assert [row["severity"] for row in rows] == pytest.approx(list(np.linspace(0, 4, len(rows))))
    spread = test.std((1, 2))
    assert spread[:50].mean() > 2 * spread[-50:].mean()


def test_label_shift_moves_through_the_digits_and_keeps_the_images():
    plain = tasks.task("digits-shifted", shift="labels", severity=0).rows("test")
    rows = tasks.task("digits-shifted", shift="labels", severity=5).rows("test")
    assert sorted(r["source"] for r in rows) == sorted(r["source"] for r in plain)

    def tendency(stream):  # mean of cos(2 pi (t - c / 10)) over the first half, before a class is used up
        half = [(i / len(stream), int(row["label"]) / 10) for i, row in enumerate(stream)][: len(stream) // 2]
        return np.mean([np.cos(2 * np.pi * (t - c)) for t, c in half])

    assert tendency(rows) > 0.5 > 0.15 > abs(tendency(plain))


@pytest.mark.parametrize("seed", [0, 4])
def test_tasks_on_digits_split_the_images_alike(seed):
    plain, steps = tasks.task("digits", seed=seed), [{"steps": 5, "step": i, "seed": seed} for i in range(1, 6)]
    clean = tasks.task("digits-shifted", seed=seed)
    steps = [tasks.task("digits-incremental", **knobs) for knobs in steps]
    for split in SPLITS:
        images = {row["source"] for row in plain.rows(split)}
        assert {row["source"] for row in clean.rows(split)} == images
        assert {row["source"] for step in steps for row in step.rows(split)} == images
    classes = [Counter(row["label"] for row in step.rows("train")) for step in steps]
    assert all(len(c) == 2 for c in classes) and len(set().union(*classes)) == 10
    assert {r["label"] for r in steps[2].rows("seen")} == {*classes[0], *classes[1], *classes[2]}


def test_without_scikit_learn_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "sklearn.datasets", None)
    module._data.cache_clear()
    with pytest.raises(GraftError, match=r"scikit-learn: pip install graft\[demo\]"):
        tasks.load("digits")
