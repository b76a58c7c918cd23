"""Targets: placeholder until the structural presets land."""

from .errors import GraftError
from .recipe import matches
from .site import kind_of

PRESETS = {"all-linear": lambda path, m: kind_of(m) == "linear" and path != "lm_head"}


def resolve(model, targets, kinds=("linear",)):
    if targets in ("", "model"):
        return [("", model)]
    picks = [targets] if isinstance(targets, str) else targets
    found = []
    for path, module in model.named_modules():
        if getattr(module, "graft_owned", False) or not path:
            continue
        if callable(targets):
            ok = targets(path, module)
        else:
            ok = any(PRESETS[t](path, module) if t in PRESETS else matches(t, path) for t in picks)
        if ok:
            found.append((path, module))
    if not found:
        raise GraftError(f"no module matches {targets!r}")
    return found
