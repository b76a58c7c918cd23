"""The quality of drawn digits, against closed forms and scipy."""

import numpy as np
import pytest

from graft import tasks
from graft.core.errors import GraftError
from graft.tasks.samples import frechet, judge, pixels, quality

pytest.importorskip("sklearn")


def test_the_frechet_distance_is_that_of_scipy():
    linalg = pytest.importorskip("scipy.linalg")
    draw = np.random.default_rng(0)
    a, b = draw.normal(size=(40, 7)) @ draw.normal(size=(7, 7)), draw.normal(size=(30, 7)) + draw.normal(size=7)
    first, second = np.cov(a.T), np.cov(b.T)
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(first + second - 2 * linalg.sqrtm(first @ second).real)
    assert frechet(a, b) == pytest.approx(expected, rel=1e-6)
    assert frechet(a, b) == pytest.approx(frechet(b, a), rel=1e-6)


def test_the_frechet_distance_of_what_is_moved_and_stretched():
    a = np.random.default_rng(0).normal(size=(50, 5))
    spread = a.var(0, ddof=1)
    moved = np.array([1.0, 0, 2, 0, 0])
    assert frechet(a, a) == pytest.approx(0, abs=1e-9)
    assert frechet(a, a + moved) == pytest.approx(5, rel=1e-9)
    assert frechet(a, 3 * a) == pytest.approx(4 * (a.mean(0) ** 2).sum() + 4 * spread.sum(), rel=1e-9)
    assert frechet(a[:3], a[:3] + moved) == pytest.approx(5, rel=1e-6)  # of less than full rank


def test_real_images_are_good_and_others_are_not():
    images, digits = pixels(tasks.load("digits", split="validation"))
    assert judge().score(*pixels(tasks.load("digits", split="test"))) > 0.97
    real, black = quality(images, digits), quality(-np.ones_like(images), digits)
    assert real["class_accuracy"] > 0.97 and black["class_accuracy"] < 0.3
    swapped = quality(images, (digits + 1) % 10)
    assert swapped["class_accuracy"] < 0.03 and swapped["frechet"] == real["frechet"] < 0.05 * black["frechet"]
    assert quality(images.reshape(-1, 1, 8, 8), digits) == real
    with pytest.raises(GraftError, match="240 images for 1 labels"):
        quality(images, [0])
