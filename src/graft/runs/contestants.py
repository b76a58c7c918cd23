"""What is compared: methods with options, and controls; and the learning rates that each of them is tried with."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..catalogue import plain
from ..core.errors import GraftError
from ..core.hyper import hyperparameters
from ..core.recipe import Recipe, method
from ..training.messages import nearest
from .single import CONTROLS, UNTRAINED

RATES = (1e-3, 3e-3, 1e-2)
# Where the default grid would miss the best rate: few numbers that scale or shift activations want larger steps, all
# parameters at once smaller ones.
OTHER_RATES: dict[str, tuple[float, ...]] = {
    "full-fine-tuning": (1e-4, 3e-4, 1e-3, 3e-3),
    "linear-probe": (1e-2, 3e-2, 1e-1),
    "ia3": (1e-2, 3e-2, 1e-1),
    "bitfit": (3e-3, 1e-2, 3e-2),
    "ln_tuning": (3e-3, 1e-2, 3e-2),
    "prompt_tuning": (3e-2, 1e-1, 3e-1),
}
METHODS = ("full-fine-tuning", "lora", "dora", "ia3", "houlsby", "prompt_tuning", "bitfit", "ln_tuning")


@dataclass(frozen=True)
class Contestant:
    """A method with all its options, or a control."""

    method: str
    options: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, text: str) -> "Contestant":
        """From `lora`, `lora(rank=16,alpha=32)` or the name of a control."""
        form = re.fullmatch(r"\s*([\w-]+)\s*(?:\((.*)\))?\s*", text)
        if not form:
            raise GraftError(f"{text!r} names no method: write lora, or lora(rank=16)")
        name, settings = form[1], [part for part in (form[2] or "").split(",") if part.strip()]
        if name in CONTROLS:
            if settings:
                raise GraftError(f"{name} has no options: write {name} without {form[2]}")
            return cls(name)
        try:
            known = hyperparameters(method(name))
        except GraftError as error:
            near = nearest(name, CONTROLS)
            if "did you mean" in near:
                raise GraftError(f"no method or control is called {name!r}: {near}") from None
            raise GraftError(str(error)) from None
        given = {}
        for setting in settings:
            option, equals, value = (part.strip() for part in setting.partition("="))
            if not equals:
                raise GraftError(f"{text}: {setting.strip()!r} is no option with a value, such as rank=16")
            given[option] = _value(value, known.get(option))
        return cls(name, plain(Recipe.of(name, **given).hyper))

    @property
    def rates(self) -> tuple[float, ...]:
        """The learning rates that it is tried with."""
        return OTHER_RATES.get(self.method, RATES)

    @property
    def trains(self) -> bool:
        return self.method not in UNTRAINED


def title(name: str, options: Mapping[str, Any]) -> str:
    """A method, or a chain of them, with those of its options that are not the default."""
    if name in CONTROLS:
        return name
    if "+" in name:
        return "+".join(title(part, options.get(part, {})) for part in name.split("+"))
    known = hyperparameters(method(name))
    other = [f"{k}={_short(v)}" for k, v in options.items() if k not in known or plain(known[k].default) != v]
    return f"{name}({', '.join(other)})" if other else name


def default(classifies: bool) -> Sequence[str]:
    """The reference set: with a linear probe where there are classes, otherwise with the base as it is."""
    return ("linear-probe" if classifies else "zero-shot", *METHODS)


def _short(value: Any) -> Any:
    """Of a table by path its values."""
    return "|".join(map(str, dict.fromkeys(value.values()))) if isinstance(value, Mapping) else value


def _value(text: str, knob: Any) -> Any:
    try:
        return text if knob and knob.accepts(text) else json.loads(text)
    except ValueError:
        return text
