"""What an adapter folder or a model holds, as plain data, without loading weights."""

from collections import Counter
from pathlib import Path
from typing import Any

from .core import files, targets
from .core.errors import GraftError
from .core.recipe import method as called
from .core.site import kind_of
from .models import skeleton


def adapter_facts(folder: str | Path, revision: str | None = None) -> list[dict[str, Any]]:
    """What the adapters in a folder, or the one in a file, are, in whatever format, innermost first."""
    return [_facts(part) for part in files.parts(folder, revision)]


def _facts(part: files.Part) -> dict[str, Any]:
    """The configuration of an adapter and the sizes of its tensors."""
    import safetensors

    config, file = part.config(), part.file()
    try:
        with safetensors.safe_open(file, framework="pt") as opened:
            slices = {key: opened.get_slice(key) for key in opened.keys()}  # noqa: SIM118
            shapes = {key: list(s.get_shape()) for key, s in slices.items()}
            kinds = Counter(s.get_dtype() for s in slices.values())
    except Exception as error:  # the library's own
        raise GraftError(f"{file} is no sound safetensors file: {error}") from error
    form = part.form()
    return {
        "format": form.name,
        "name": part.name or config.get("name"),
        **({"active": part.active} if part.name else {}),
        **dict(method=None, base=None, base_fingerprint=None, sites=None, heads=[]),
        **form.facts(config, list(shapes)),
        "parameters": sum(_count(shape) for shape in shapes.values()),
        "bytes": file.stat().st_size,
        "dtypes": dict(kinds),
        "tensors": shapes,
        "config": config,
    }


def _count(shape: list[int]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


def model_facts(
    name: str | Path, picked: Any = None, method: str = "lora", revision: str | None = None
) -> dict[str, Any]:
    """The modules of a model that the presets of targets pick for a method, and those that `picked` does."""
    model = skeleton(name, revision)
    kinds = called(method).hosts
    modules = dict(model.named_modules())
    presets = {}
    for preset in targets.PRESETS:
        try:
            presets[preset] = [path for path, _ in targets.resolve(model, preset, kinds)]
        except GraftError:  # nothing of that kind here, or not for this method
            presets[preset] = []
    chosen = [] if picked is None else [path for path, _ in targets.resolve(model, picked, kinds)]
    return {
        "model": str(name),
        "class": type(model).__name__,
        "parameters": sum(p.numel() for p in model.parameters()),
        "method": method,
        "presets": presets,
        "targets": [_module(path, modules[path]) for path in chosen],
    }


def _module(path: str, module: Any) -> dict[str, Any]:
    weight = getattr(module, "weight", None)
    return {
        "path": path,
        "class": type(module).__name__,
        "kind": kind_of(module),
        "shape": None if weight is None else list(weight.shape),
    }
