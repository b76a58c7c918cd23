"""Learning rate schedules: pure functions of progress in [0, 1] to a factor of the peak learning rate in [0, 1].

All of them warm up linearly from 0 over the first `warmup` of the run, a fraction in [0, 1).
"""

import math
from collections.abc import Callable

from ..core.errors import GraftError
from .messages import nearest

DECAY = 0.1  # share of a warmup-stable-decay run that decays, as in the paper
FLOOR = 0.1  # what the exponential decay reaches at the end of the run; the paper leaves the half-life free


def linear(progress: float, warmup: float = 0.0) -> float:
    """Down to 0 along a straight line: (1 - p) / (1 - w)."""
    return progress / warmup if progress < warmup else (1 - progress) / (1 - warmup)


def cosine(progress: float, warmup: float = 0.0) -> float:
    """Down to 0 along half a cosine: (1 + cos(pi (p - w) / (1 - w))) / 2.

    SGDR: Stochastic Gradient Descent with Warm Restarts. Loshchilov, Hutter, 2017. https://arxiv.org/abs/1608.03983
    """
    return progress / warmup if progress < warmup else (1 + math.cos(math.pi * (progress - warmup) / (1 - warmup))) / 2


def wsd(progress: float, warmup: float = 0.0) -> float:
    """Warmup, stable, decay: constant until 1 - DECAY, then halved every h: 0.5 ^ ((p - (1 - DECAY)) / h).

    The half-life h lets the run end at FLOOR. MiniCPM: Unveiling the Potential of Small Language Models with Scalable
    Training Strategies. Hu et al., 2024, section 4. https://arxiv.org/abs/2404.06395
    """
    if progress < warmup:
        return progress / warmup
    half_life = DECAY / math.log2(1 / FLOOR)
    return 0.5 ** (max(0.0, progress - (1 - DECAY)) / half_life)


def constant(progress: float, warmup: float = 0.0) -> float:
    """The peak learning rate after the warmup."""
    return progress / warmup if progress < warmup else 1.0


SCHEDULES: dict[str, Callable[[float, float], float]] = {f.__name__: f for f in (linear, cosine, wsd, constant)}


def schedule(name: str) -> Callable[[float, float], float]:
    """The schedule called `name`."""
    if name not in SCHEDULES:
        raise GraftError(f"no schedule is called {name!r}: {nearest(name, SCHEDULES)}")
    return SCHEDULES[name]
