"""How far scores on one validation set can be trusted after many were looked at."""

import math
import random


class Thresholdout:
    """The reusable holdout: the holdout is asked through a guard, which gives away little of it.

    For a mean of numbers from 0 to 1 over the rows, a on the train split and b on the holdout, the guard answers a
    where |a - b| < T + N(0, t), and b + N(0, t) otherwise, with T = 4 / sqrt(n) and t = 1 / sqrt(n) for n rows of the
    holdout. So it tells only what the train split says already, or that this is not so and roughly what is. With few
    rows the noise is large: 64 rows have t = 0.125. The formula and its constants are those of the code beside the
    paper; the limited number of answers of the paper's proof is not counted.

    Preserving Statistical Validity in Adaptive Data Analysis. Dwork, Feldman, Hardt, Pitassi, Reingold, Roth, 2014.
    https://arxiv.org/abs/1411.2664. The reusable holdout: Preserving validity in adaptive data analysis. The same,
    2015. https://doi.org/10.1126/science.aaa9375
    """

    def __init__(self, rows: int, seed: int = 0):
        self.tolerance = 1 / math.sqrt(rows)
        self.threshold = 4 * self.tolerance
        self.random = random.Random(seed)

    def __call__(self, train: float, holdout: float) -> float:
        """The answer to one question: what was measured on the train split and on the holdout goes in."""
        if abs(train - holdout) < self.threshold + self.random.gauss(0, self.tolerance):
            return train
        return holdout + self.random.gauss(0, self.tolerance)
