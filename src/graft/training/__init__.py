"""Training: one loop, objectives, data, schedules, optimizers and checkpoints."""

from .data import read
from .evaluation import evaluate, predict
from .loop import Result, fit

__all__ = ["Result", "evaluate", "fit", "predict", "read"]
