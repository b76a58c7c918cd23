"""What is known of a run before it starts, so that what cannot fit is never started."""

from collections.abc import Mapping
from functools import cached_property

from ..core.adapter import Adapter
from ..core.errors import GraftError
from ..core.site import site_for
from ..core.targets import resolve
from ..models import Base
from ..runs.configuration import Configuration
from ..runs.limits import misfit
from ..runs.single import load, recipes
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
            count = self.parameters(configuration)
        except GraftError as error:
            return Outcome(None, {}, reason=str(error))
        limit = self.limits.get("parameters")
        if limit is not None and count is not None and count > limit:
            return Outcome(None, {"parameters": over(count, limit)}, reason=f"it trains {count:,} parameters")
        most = self.limits.get("memory")
        if most is None or not (reason := misfit(configuration, memory=int(most))):
            return None
        return Outcome(None, {}, reason=reason)

    def parameters(self, configuration: Configuration) -> int | None:
        """How many numbers a run would train; None where the method looks at the data first."""
        chain, targets, total = recipes(configuration), configuration.targets, 0
        for i, recipe in enumerate(chain):
            cls = recipe.method
            where = targets.get(cls.name) if isinstance(targets, Mapping) else targets
            hosts = resolve(self.base.model, where or cls.targets, cls.hosts)
            if any(cls.asks(recipe.at(site_for(path, host, cls.hosts))) for path, host in hosts):
                return None
            heads = self.base.heads if i == len(chain) - 1 else ()
            adapter = Adapter(self.base.model, recipe, where, "counted", heads=heads)
            total += sum(p.numel() for p in adapter.parameters())
        return total
