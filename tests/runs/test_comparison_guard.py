"""The reusable holdout, as in the experiment of the paper: features are chosen by the answers of the holdout."""

import numpy as np
import pytest

from graft.comparison.guard import Thresholdout

ROWS, FEATURES, CHOSEN = 400, 400, 80


def chosen_by(answers, train, holdout, fresh, ask):
    """Accuracy that a holdout says, and that on fresh data, of the sum of the features that it speaks for most."""
    (x, y), (xh, yh) = train, holdout
    first = x.T @ y / ROWS
    found = np.array([answers(a, b) for a, b in zip(first, xh.T @ yh / ROWS)])
    agree = np.where(np.sign(first) == np.sign(found), first, 0) * (np.abs(found) > 1 / np.sqrt(ROWS))
    signs = np.zeros(FEATURES)
    best = np.argsort(-np.abs(agree))[:CHOSEN]
    signs[best] = np.sign(agree[best])
    right = [np.mean(np.sign(a @ signs) == b) for a, b in (train, holdout, fresh)]
    return ask(right[0], right[1]), right[2]


@pytest.mark.parametrize("signal", [0, 20])
def test_on_noise_the_guard_stays_near_the_truth_where_the_plain_holdout_does_not(signal):
    said, plain = [], []
    for seed in range(20):
        draw, guard = np.random.default_rng(seed), Thresholdout(ROWS, seed)

        def data(draw=draw):
            x, y = draw.normal(size=(ROWS, FEATURES)), draw.choice([-1.0, 1.0], ROWS)
            x[:, :signal] += y[:, None] * 6 / np.sqrt(ROWS)
            return x, y

        parts = data(), data(), data()
        plain.append(chosen_by(lambda a, b: b, *parts, lambda a, b: b))
        said.append(chosen_by(guard, *parts, guard))
    (plain_said, plain_true), (guard_said, guard_true) = (np.mean(rows, 0) for rows in (plain, said))
    if not signal:
        assert plain_said - plain_true > 0.06 and abs(plain_true - 0.5) < 0.02
        assert abs(guard_said - guard_true) < 0.5 * (plain_said - plain_true)
    else:
        assert guard_true > 0.7 and guard_said > 0.7  # chance is 0.5


def test_an_answer_is_that_of_the_train_split_or_near_the_holdout():
    guard = Thresholdout(10_000)
    assert all(guard(0.5 + d, 0.5) == 0.5 + d for d in np.linspace(-0.005, 0.005, 50))
    far = [guard(0.9, 0.5) for _ in range(500)]
    assert 0.9 not in far and np.mean(far) == pytest.approx(0.5, abs=0.003)
    assert np.std(far) == pytest.approx(0.01, rel=0.15)
