"""The single .safetensors files of LyCORIS and of kohya's sd-scripts, both ways.

A method says in a table how LyCORIS stores it; the table is an attribute of its class:

    lycoris = LowRank({"A": As("lora_down.weight"), "B": As("lora_up.weight")}, rank="A")

or a sentence, why there is no exchange although LyCORIS has a method of that name.

A tensor is called "<prefix>_<path of the module, its dots as underscores>.<name>". The prefix says which model of a
pipeline the path is in: "lycoris" the one at hand, "lora_unet" the denoiser, "lora_te", "lora_te1", ... the text
encoders. `alpha` is the numerator of the scaling alpha / rank; without it the scaling is 1. There is no configuration:
method, ranks and scalings are read off names and shapes.
"""

import math
from collections import defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from ..delta import METHODS, Delta
from ..errors import GraftError
from ..folder import tensor_bytes
from ..host import base_modules
from ..recipe import ByPath, Recipe
from ..site import Site, kind_of, site_for
from ..sites.conv import tucker_form
from . import OWN, As, Format, Saved

if TYPE_CHECKING:
    from ..adapter import Adapter

UNREAD = "this file in LyCORIS's format cannot be read"
ALPHA = "alpha"
# The names that pipelines of diffusers give the models which a prefix of sd-scripts stands for.
PARTS = {
    "lora_unet": ("unet", "transformer"),
    "lora_te1": ("text_encoder",),
    "lora_te2": ("text_encoder_2",),
    "lora_te3": ("text_encoder_3",),
    "lora_te": ("text_encoder",),
}
LYCORIS = "lycoris"
NOT_OURS = {
    "oft_blocks": "Diag-OFT and BOFT turn the outputs of a module, the OFT here turns its inputs",
    "dora_scale": "magnitudes have a counterpart beside a LoRA alone (DoRA)",
    "a1.weight": "there is no GLoRA here",
    "lambda_layer": "there is no T-LoRA here",
}


@dataclass(frozen=True)
class Lycoris:
    """How LyCORIS stores a method. A subclass, in the method's file, overrides what a table cannot say."""

    tensors: dict[str, As] = field(default_factory=dict)  # our tensor at a site -> LyCORIS's
    also: frozenset[str] = frozenset()  # further tensors that `read` takes, such as the cores of Tucker forms
    hosts: tuple[str, ...] = ("Linear", "Conv1d", "Conv2d", "Conv3d")  # classes on which LyCORIS has it

    def fits(self, names: set[str]) -> bool:
        """Whether the names of a module's tensors are those of the method."""
        required = {a.name for a in self.tensors.values() if not a.optional}
        return required <= names <= {a.name for a in self.tensors.values()} | self.also

    def check(self, delta: Any) -> None:
        """Refuse to write what LyCORIS computes otherwise."""
        module = delta.site.module
        cls = getattr(module, "host_class", type(module))
        if not any(c.__name__ in self.hosts for c in cls.__mro__):
            raise GraftError(f"LyCORIS's {delta.name} cannot adapt {delta.site.path}, a {cls.__name__}: {OWN}")
        if getattr(module, "padding_mode", "zeros") != "zeros":
            raise GraftError(f"LyCORIS pads {delta.site.path} with zeros, the host does not: {OWN}")

    def write(self, delta: Any) -> dict[str, Tensor]:
        """LyCORIS's tensors for the delta at a site, by name."""
        if strange := [key for key in delta.state_dict() if key not in self.tensors]:
            raise GraftError(f"LyCORIS has no counterpart of {strange[0]} of {delta.name} at {delta.site.path}: {OWN}")
        return {self.tensors[k].name: self.tensors[k].write(delta.site, v) for k, v in delta.state_dict().items()}

    def read(self, site: Any, found: dict[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Hyperparameters and our tensors at a site for LyCORIS's, which `fits` has seen."""
        return {}, {k: a.read(site, found[a.name]) for k, a in self.tensors.items() if a.name in found}


@dataclass(frozen=True)
class LowRank(Lycoris):
    """A method with a scaling alpha / rank: `rank` names the tensor [rank, ...] that tells the rank."""

    rank: str = ""

    def fits(self, names):
        return super().fits(names - {ALPHA})

    def write(self, delta):
        home, _, name = self.rank.rpartition(".")
        part = delta.get_submodule(home)
        tensor = getattr(part, name)
        return super().write(delta) | {ALPHA: tensor.new_tensor(part.scaling * len(tensor))}

    def read(self, site, found):
        found = dict(found)
        rank = found[self.tensors[self.rank].name].shape[0]
        alpha = found.pop(ALPHA, None)
        found = self.plain(site, found)
        hyper = {"rank": rank, "alpha": float(rank if alpha is None else alpha.item())}
        return hyper, super().read(site, found)[1]

    def plain(self, site: Site, found: dict[str, Tensor]) -> dict[str, Tensor]:
        """The tensors without the core of a Tucker form."""
        return found


def check_size(site: Any, *sizes: int) -> None:
    """Refuse a product far larger than the host's matrix: a file may claim any sizes."""
    if math.prod(sizes) > 16 * site.weight.numel():
        raise GraftError(f"{UNREAD}: a product of size {sizes} is far larger than the matrix of {site.path}")


def tucker(site: Any, core: Tensor, down: Tensor) -> Tensor:
    """[rank, in * kernel] of the core [rank, rank, kernel ...] of a Tucker form after `down` [rank, in]."""
    check_size(site, len(core), down.shape[1], *core.shape[2:])
    return tucker_form(core, down.flatten(1))


def kernel(site: Site, value: Tensor) -> Tensor:
    """A matrix [k, in * kernel] which reads the host's input, with the kernel of a convolution."""
    return value.reshape(len(value), -1, *site.module.kernel_size) if site.kind == "conv" else value


def filters(site: Site, value: Tensor) -> Tensor:
    """`kernel`, or `point` for the features [k, in] of a Tucker form."""
    return (kernel if value.shape[1] == site.d_in else point)(site, value)


def point(site: Site, value: Tensor) -> Tensor:
    """A matrix [out, k] on features, at a convolution with kernels of size 1."""
    return value.reshape(*value.shape, *[1] * (site.module.weight.dim() - 2)) if site.kind == "conv" else value


def matrix(site: Site, value: Tensor) -> Tensor:
    return value.flatten(1)


class LycorisFormat(Format, name="lycoris"):
    """A file of LyCORIS for one model of any kind."""

    title, table = "LyCORIS", "lycoris"
    single = True

    @classmethod
    def recognises(cls, config):
        return config is None

    def prefixed(self, adapter: "Adapter", path: str) -> tuple[str, str]:
        """Prefix and path of a module for the file."""
        return LYCORIS, path

    def write(self, adapter, base):
        table = self.check(adapter.recipe.method)
        if adapter.heads:
            raise GraftError(f"LyCORIS stores no heads, such as {adapter.heads[0][0]}: {OWN}")
        names = _by_name(adapter.model)
        tensors = {}
        for path, delta in adapter.deltas.items():
            table.check(delta)
            if len(names[path.replace(".", "_")]) > 1:
                raise GraftError(f"LyCORIS cannot tell {' and '.join(names[path.replace('.', '_')])} apart: {OWN}")
            prefix, rest = self.prefixed(adapter, path)
            for name, value in table.write(delta).items():
                tensors[f"{prefix}_{rest.replace('.', '_')}.{name}"] = value
        return {"": tensor_bytes(tensors)}

    def read(self, model, parts):
        try:
            return _read(model, parts[""])
        except GraftError:
            raise
        except Exception as error:  # values and shapes which LyCORIS never writes
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise GraftError(f"{UNREAD}: {reason}") from error

    @classmethod
    def facts(cls, config, keys):
        modules = _modules(keys)
        found = {cls.name for names in modules.values() if (cls := _method(set(names)))}
        prefixes = {_split(module)[0] for module in modules}
        own = "lycoris" if prefixes == {LYCORIS} else "kohya"
        return {"format": own, "method": ", ".join(sorted(found)) or None, "sites": len(modules)}


class KohyaFormat(LycorisFormat, name="kohya"):
    """The same with the prefixes of kohya's sd-scripts, which image generators know.

    The adapted model is a container with the models of a pipeline under diffusers' names (`unet` or `transformer`,
    `text_encoder`, `text_encoder_2`, ...), or the denoiser alone.
    """

    @classmethod
    def recognises(cls, config):
        return False  # one reader for both

    def prefixed(self, adapter, path):
        children = dict(adapter.model.named_children())
        of = {part: prefix for prefix, parts in PARTS.items() for part in parts}
        if not children.keys() & of.keys():
            return "lora_unet", path
        if not {"text_encoder_2", "text_encoder_3"} & children.keys():
            of["text_encoder"] = "lora_te"
        else:
            of["text_encoder"] = "lora_te1"
        part, _, rest = path.partition(".")
        if part not in of:
            raise GraftError(f"sd-scripts know no part {part!r} of a pipeline, only {', '.join(of)}: {OWN}")
        return of[part], rest


def _read(model: nn.Module, tensors: dict[str, Tensor]) -> Saved:
    modules = _modules(tensors)
    if not modules:
        raise GraftError(f"{UNREAD}: it holds no tensor")
    paths = _resolved(model, modules)
    methods: dict[type[Delta], str] = {}
    for module, names in modules.items():
        cls = _method(set(names))
        if cls is None:
            raise GraftError(f"{UNREAD}: {_reason(module, names)}")
        methods.setdefault(cls, module)
    if len(methods) > 1:
        several = " and ".join(
            f"{cls.name} at {module}" for cls, module in sorted(methods.items(), key=lambda m: m[0].name)
        )
        raise GraftError(f"{UNREAD}: an adapter is of one method, and it holds {several}")
    (cls,) = methods
    every = base_modules(model)
    hyper: dict[str, dict[str, Any]] = defaultdict(dict)
    state = {}
    for module, names in modules.items():
        path = paths[module]
        site = site_for(path, every[path], cls.hosts)
        if site.kind not in cls.hosts:
            raise GraftError(f"{UNREAD}: {cls.name} does not adapt {path}, a {type(site.module).__name__}")
        values, own = LycorisFormat.stored(cls).read(site, {name: tensors[f"{module}.{name}"] for name in names})
        for key, value in values.items():
            hyper[key][path] = value
        state |= {f"{path}:{name}": value for name, value in own.items()}
    recipe = Recipe(
        cls, {k: next(iter(v.values())) if len({*v.values()}) == 1 else ByPath(v) for k, v in hyper.items()}
    )
    found = list(paths.values())
    return Saved(recipe, found, [], state, targets=found)


def _modules(keys: Any) -> dict[str, list[str]]:
    """The names of tensors by module, both as the file has them."""
    found: dict[str, list[str]] = defaultdict(list)
    for key in keys:
        module, _, name = key.partition(".")
        if not name:
            raise GraftError(f"{UNREAD}: the name of its tensor {key} has no dot")
        found[module].append(name)
    return found


def _split(module: str) -> tuple[str, str]:
    """Prefix and underscored path."""
    for prefix in (LYCORIS, *PARTS):
        if module.startswith(f"{prefix}_"):
            return prefix, module.removeprefix(f"{prefix}_")
    known = ", ".join((LYCORIS, *PARTS))
    raise GraftError(f"{UNREAD}: {module} starts with none of the prefixes {known}")


def _by_name(model: nn.Module) -> dict[str, list[str]]:
    """The paths of modules by their underscored form."""
    found: dict[str, list[str]] = defaultdict(list)
    for path in base_modules(model):
        found[path.replace(".", "_")].append(path)
    return found


def _resolved(model: nn.Module, modules: Any) -> dict[str, str]:
    """The path in the model of each module of the file, none twice."""
    every, names, children = base_modules(model), _by_name(model), dict(model.named_children())
    split = {module: _split(module) for module in modules}
    prefixes = sorted({prefix for prefix, _ in split.values()}, key=[LYCORIS, *PARTS].index)
    homes = {prefix: next((p for p in PARTS.get(prefix, ()) if p in children), "") for prefix in prefixes}
    if len(prefixes) > 1 and not all(homes.values()):
        inside = ", ".join(f"{PARTS[prefix][0]!r}: ..." for prefix in prefixes if prefix in PARTS)
        raise GraftError(
            f"{UNREAD}: it is for several models ({', '.join(prefixes)}): load it on torch.nn.ModuleDict({{{inside}}})"
        )
    paths: dict[str, str] = {}
    for module, (prefix, rest) in split.items():
        found = names.get(f"{homes[prefix]}_{rest}" if homes[prefix] else rest, [])
        hosts = [path for path in found if kind_of(every[path]) != "module"] or found
        if not hosts:
            raise GraftError(f"{UNREAD}: the model has no module for {module}, is this the right base?")
        if len(hosts) > 1:
            raise GraftError(f"{UNREAD}: {module} may be {' or '.join(hosts)}, whose names differ by dots alone")
        if hosts[0] in paths.values():
            raise GraftError(f"{UNREAD}: it holds {hosts[0]} twice")
        paths[module] = hosts[0]
    return paths


def _method(names: set[str]) -> type[Delta] | None:
    from ... import methods

    methods.load()
    tables = {cls: LycorisFormat.stored(cls) for cls in METHODS.values()}
    return next((cls for cls, table in tables.items() if isinstance(table, Lycoris) and table.fits(names)), None)


def _reason(module: str, names: list[str]) -> str:
    """Why the tensors of a module are those of no method."""
    known = next((reason for name, reason in NOT_OURS.items() if name in names), "")
    return f"no method here has the tensors {', '.join(sorted(names))} of {module}{f': {known}' if known else ''}"
