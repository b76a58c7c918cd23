"""How good drawn digits are: what `quality` says of images that a model made for given labels."""

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np

from ..core.errors import GraftError
from . import Rows, load


def quality(images: Any, labels: Sequence[int], *, split: str = "test", seed: int = 0) -> dict[str, float]:
    """How good images [n, 8, 8] or [n, 1, 8, 8] from -1 to 1 are, which were made for the digits `labels` [n].

    class_accuracy  share of the images in which a judge sees the digit that they were made for: a support vector
                    machine with a Gaussian kernel on the pixels of the train images of the task `digits` with that seed
    frechet         Fréchet distance of their pixels to those of the real images of `split` of the same digits; a small
                    number of images adds to it, so compare equal numbers only
    """
    given, asked = _flat(images), np.asarray(labels)
    if len(given) != len(asked):
        raise GraftError(f"{len(given)} images for {len(asked)} labels: give one image a label, in their order")
    real, digits = pixels(load("digits", split=split, seed=seed))
    right = float((judge(seed).predict(given) == asked).mean())
    return {"class_accuracy": right, "frechet": frechet(given, real[np.isin(digits, asked)])}


def frechet(a: Any, b: Any) -> float:
    """|m_a - m_b|^2 + trace(C_a + C_b - 2 (C_a C_b)^(1/2)), with means m and covariances C of the rows of a and of b.

    The distance of two normal distributions. GANs Trained by a Two Time-Scale Update Rule Converge to a Local Nash
    Equilibrium. Heusel et al., 2017. https://arxiv.org/abs/1706.08500
    """
    a, b = np.asarray(a, dtype=float), np.asarray(b, dtype=float)
    first, second = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    values, vectors = np.linalg.eigh(first)
    root = vectors * np.sqrt(values.clip(0)) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ second @ root).clip(0)).sum()
    return float(np.square(a.mean(0) - b.mean(0)).sum() + np.trace(first) + np.trace(second) - 2 * cross)


def pixels(rows: Rows) -> tuple[np.ndarray, np.ndarray]:
    """The images of rows of a task on digits as [n, 64] from -1 to 1, and their digits [n]."""
    return _flat([row["image"][..., 0] / 127.5 - 1 for row in rows]), np.array([int(row["label"]) for row in rows])


@cache
def judge(seed: int = 0) -> Any:
    """The classifier of `quality`; `judge().score(*pixels(rows))` is its accuracy on real images."""
    from sklearn.svm import SVC

    return SVC(C=10.0).fit(*pixels(load("digits", seed=seed)))


def _flat(images: Any) -> np.ndarray:
    return np.asarray(images).reshape(len(images), -1)
