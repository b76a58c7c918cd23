"""What is known of a run before it starts, so that what cannot fit is never started."""

from collections.abc import Mapping
from functools import cached_property

from ..core.errors import GraftError
from ..models import Base
from ..runs.configuration import Configuration
from ..runs.limits import misfit
from ..runs.single import load, recipes
from ..tuning import trained
from .outcome import Outcome, over


class Fits:
    """Asked for every run before it starts. `common` is a configuration of the same base and data.

    Trained parameters are counted on the base itself, for methods that need no look at the data first. Memory is that
    of the tensors alone, which a dry run foretells: the process, whose peak is limited, takes more.
    """

    def __init__(self, common: Configuration, limits: Mapping[str, float]):
        self.common, self.limits = common, limits

    @cached_property
    def base(self) -> Base:
        return load(self.common)

    def refused(self, configuration: Configuration) -> Outcome | None:
        """What makes a run useless: it cannot be made, or is beyond a limit. None where nothing is known against it."""
        try:
            count = trained(self.base, recipes(configuration), configuration.targets)
        except GraftError as error:
            return Outcome(None, {}, reason=str(error))
        limit = self.limits.get("parameters")
        if limit is not None and count is not None and count > limit:
            return Outcome(None, {"parameters": over(count, limit)}, reason=f"it trains {count:,} parameters")
        most = self.limits.get("memory")
        if most is None or not (reason := misfit(configuration, memory=int(most))):
            return None
        return Outcome(None, {}, reason=reason)
