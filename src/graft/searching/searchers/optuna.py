"""Optuna's samplers, one searcher each."""

from typing import Any, ClassVar

from ...core.errors import GraftError
from ..outcome import Outcome
from ..space import Choice, Domain, Point, key
from . import Searcher


class _Optuna(Searcher):
    """A sampler of Optuna, asked and told. A point beyond a limit is told with its constraints."""

    sampler: ClassVar[str]

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        try:
            import optuna
        except ImportError:
            raise GraftError(f"the searcher {self.name} needs Optuna: pip install 'graft[search]'") from None
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.optuna, self.trials = optuna, dict[str, list[Any]]()
        options = {"constraints_func": _constraints} if self.limits else {}
        sampler = getattr(optuna.samplers, self.sampler)(seed=self.seed, **options)
        directions: list[Any] = ["minimize"] * self.objectives
        self.study = optuna.create_study(directions=directions, sampler=sampler)

    def ask(self) -> Point | None:
        trial = self.study.ask()
        point = self.space.draw(lambda name, domain: _suggested(trial, name, domain))
        self.trials.setdefault(key(point), []).append(trial)
        return point

    def tell(self, point: Point, outcome: Outcome) -> None:
        asked = self.trials.get(key(point))
        if not asked:
            return  # not its own
        trial = asked.pop()
        trial.set_user_attr("over", [outcome.over.get(name, 0.0) for name in self.limits])
        state = self.optuna.trial.TrialState
        if outcome.losses is None:
            self.study.tell(trial, state=state.FAIL)
        else:
            self.study.tell(trial, list(outcome.losses), state=state.COMPLETE)


def _constraints(trial: Any) -> list[float]:
    return trial.user_attrs["over"]


def _suggested(trial: Any, name: str, domain: Domain) -> Any:
    if isinstance(domain, Choice) and domain.ordered:
        return domain.values[trial.suggest_int(name, 0, len(domain.values) - 1)]
    if isinstance(domain, Choice):
        return domain.values[trial.suggest_categorical(name, list(range(len(domain.values))))]
    if domain.whole:
        return trial.suggest_int(name, int(domain.low), int(domain.high), log=domain.log)
    return trial.suggest_float(name, domain.low, domain.high, log=domain.log)


class TPE(_Optuna):
    """A tree of Parzen estimators: points where good ones are dense and others are not.

    Algorithms for Hyper-Parameter Optimization. Bergstra et al., 2011.
    """

    name, sampler = "tpe", "TPESampler"


class NSGA2(_Optuna):
    """An evolutionary search for Pareto fronts, which needs many runs.

    A Fast and Elitist Multiobjective Genetic Algorithm: NSGA-II. Deb et al., 2002.
    """

    name, sampler = "nsga2", "NSGAIISampler"


class GP(_Optuna):
    """Optuna's own Gaussian processes, with the logarithm of the expected improvement, also of the hypervolume."""

    name, sampler = "gp", "GPSampler"
