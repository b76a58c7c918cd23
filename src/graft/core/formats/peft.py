"""Hugging Face PEFT's format, both ways, for the methods which PEFT has too.

A method says in a table how PEFT stores it; the table is an attribute of its class:

    peft = Peft("LORA", {"A": As("lora_A.weight"), ...}, config={"r": "rank", "lora_alpha": "alpha"}, ...)

or a sentence, why there is no exchange although PEFT has a method of that name.

PEFT names a tensor "base_model.model.<path of the module>.<name>", what modules share "base_model.<name>", and heads
(its `modules_to_save`) like the module's own parameters. What a PEFT folder holds and
we have not is refused, never left out.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..delta import METHODS, Delta
from ..errors import GraftError
from ..folder import json_bytes, tensor_bytes
from ..host import base_modules
from ..hyper import hyperparameters
from ..recipe import ByPath, Recipe
from ..site import site_for
from ..sites.linear import Conv1DSite
from ..targets import resolve
from . import CONFIG, OWN, TENSORS, As, Format, Saved

if TYPE_CHECKING:
    from ..adapter import Adapter

PREFIX = "base_model.model."
UNREAD = "this adapter in PEFT's format cannot be read"
PROMPT = "prompt_embeddings"
HEAD = "copy."  # where the delta of a head keeps its module

# Fields of PEFT's configuration that do not change what a trained adapter computes: where it goes is read off its
# tensors, how it started is past.
NEUTRAL = {
    "peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save", "fan_in_fan_out",
    "runtime_config",
}  # fmt: skip


@dataclass(frozen=True)
class Peft:
    """How PEFT stores a method. A subclass, in the method's file, overrides what a table cannot say."""

    kind: str  # peft_type
    tensors: dict[str, As] = field(default_factory=dict)  # our tensor at a site -> PEFT's
    config: dict[str, str] = field(default_factory=dict)  # PEFT's field -> our hyperparameter
    embedding: dict[str, As] | None = None  # the tensors at embeddings, where they differ
    shared: dict[str, As] = field(default_factory=dict)  # our shared tensor -> PEFT's
    patterns: dict[str, str] = field(default_factory=dict)  # PEFT's table by module -> its field with the common value
    defaults: dict[str, Any] = field(default_factory=dict)  # of fields which older versions of PEFT do not write
    fixed: dict[str, Any] = field(default_factory=dict)  # fields which have this one value in our method
    neutral: frozenset[str] = frozenset()  # further fields that do not change what a trained adapter computes
    own: frozenset[str] = frozenset()  # hyperparameters that a subclass translates, or that only tell how it started
    refuses: Callable[[dict], str | None] = lambda config: None  # why a configuration of PEFT cannot be read, or None
    hosts: tuple[str, ...] = ("Linear", "Conv1D", "Conv1d", "Conv2d", "Conv3d", "Embedding")  # classes, as PEFT has it

    heads: bool = True  # whether PEFT saves heads beside it

    # Writing

    def write(self, adapter: "Adapter") -> tuple[dict[str, Any], dict[str, Tensor]]:
        """PEFT's configuration and tensors for an adapter."""
        method, model = adapter.recipe.method, adapter.model
        heads = [path for path, _ in adapter.heads]
        if heads and not self.heads:
            raise GraftError(f"PEFT's {self.kind} stores no heads: {OWN}")
        own = self.chosen(adapter)
        for delta in own.values():
            self.check_host(delta.site)
        settings = self.write_config(method, own, {path: adapter.recipe.at(d.site) for path, d in own.items()})
        tensors = {}
        for path, delta in own.items():
            for name, value in self.site_out(delta).items():
                tensors[f"{PREFIX}{path}.{name}"] = value
        for path in heads:
            for name, value in adapter.deltas[path].state_dict().items():
                tensors[f"{PREFIX}{path}.{name.removeprefix(HEAD)}"] = value
        for name, form in self.shared.items():
            tensors[f"base_model.{form.name}"] = getattr(adapter.shared, name)
        modules = base_modules(model)
        config = {
            **self.common(adapter, modules),
            "target_modules": self.targets(modules, list(own)),
            **({"modules_to_save": heads} if heads else {}),
            **settings,
        }
        if any(isinstance(d.site, Conv1DSite) for d in own.values()):
            config["fan_in_fan_out"] = True
        if extra := [p for p in modules if _saved_whole(p, heads) and p not in heads]:
            raise GraftError(f"PEFT would take {extra[0]} for a head too, as its path ends like {heads[0]}'s: {OWN}")
        return config, tensors

    def common(self, adapter: "Adapter", modules: dict[str, nn.Module]) -> dict[str, Any]:
        """The fields that every type of PEFT's has."""
        return {
            "peft_type": self.kind,
            "task_type": task_type(adapter.model, modules, [path for path, _ in adapter.heads]),
            "base_model_name_or_path": getattr(getattr(adapter.model, "config", None), "_name_or_path", None),
            "inference_mode": True,
        }

    def chosen(self, adapter: "Adapter") -> dict[str, Any]:
        """The deltas which PEFT stores, by path."""
        return {path: d for path, d in adapter.deltas.items() if path not in dict(adapter.heads)}

    def targets(self, modules: dict[str, nn.Module], paths: list[str]) -> list[str] | str:
        """What makes PEFT choose exactly `paths`."""
        return target_modules(modules, paths)

    def check_host(self, site: Any) -> None:
        """Refuse a module on which PEFT lacks the method, or computes something else."""
        cls = getattr(site.module, "host_class", type(site.module))
        if self.hosts and not any(c.__name__ in self.hosts for c in cls.__mro__):
            raise GraftError(f"PEFT's {self.kind} cannot adapt {site.path}, a {cls.__name__}: {OWN}")

    def at(self, site: Any) -> dict[str, As]:
        """The tensors at one site."""
        return self.embedding if site.kind == "embedding" and self.embedding is not None else self.tensors

    def site_out(self, delta: Any) -> dict[str, Tensor]:
        """PEFT's tensors at the site of a delta, by name."""
        table = self.at(delta.site)
        return {table[name].name: table[name].write(delta.site, v) for name, v in delta.state_dict().items()}

    def write_config(
        self, method: type[Delta], deltas: dict[str, Any], hyper: dict[str, dict[str, Any]]
    ) -> dict[str, Any]:
        """PEFT's fields for the hyperparameters {path: {name: value}} of the deltas."""
        config = dict(self.fixed)
        tables = {common: table for table, common in self.patterns.items()}
        for name, known in hyperparameters(method).items():
            translated = name in self.own or name in self.config.values()
            if not translated and any(h[name] != known.default for h in hyper.values()):
                raise GraftError(f"PEFT's {self.kind} has no counterpart of {method.name}'s {name}: {OWN}")
        for field_name, name in self.config.items():
            values = {path: h[name] for path, h in hyper.items()}
            common = Counter(values.values()).most_common(1)[0][0]
            config[field_name] = int(common) if isinstance(common, float) and common.is_integer() else common
            others = {path: value for path, value in values.items() if value != common}
            if field_name in tables:
                config[tables[field_name]] = {self.key(path): value for path, value in others.items()}
            elif others:
                raise GraftError(
                    f"PEFT's {self.kind} has one {field_name} for all modules, this adapter several: {OWN}"
                )
        return config

    def key(self, path: str) -> str:
        """The entry of a table by module that fits `path` alone."""
        return f"^{re.escape(path)}"

    # Reading

    def read(
        self, method: type[Delta], model: nn.Module, config: dict[str, Any], tensors: dict[str, Tensor]
    ) -> tuple[Recipe, list[str], list[str], dict[str, Tensor]]:
        """Recipe, paths of targets and heads, and tensors under our names."""
        modules = base_modules(model)
        wanted = config.get("modules_to_save") or []
        if not isinstance(wanted, list) or not all(isinstance(name, str) for name in wanted):
            raise GraftError(f"{UNREAD}: modules_to_save must be a list of names, not {wanted!r}")
        heads = [p for p in modules if _saved_whole(p, wanted)]
        names = {a.name for a in (*self.tensors.values(), *(self.embedding or {}).values())}
        shared = {f"base_model.{a.name}": name for name, a in self.shared.items()}
        found: dict[str, dict[str, Tensor]] = {}
        state, used_heads = {}, set()
        for key, value in tensors.items():
            rest = key.removeprefix(PREFIX)
            path, name = next(((rest[: -len(n) - 1], n) for n in names if rest.endswith(f".{n}")), (None, ""))
            head = next((h for h in heads if rest.startswith(f"{h}.")), None)
            if key in shared:
                state[f"*:{shared[key]}"] = value
            elif rest == key:
                raise GraftError(f"{UNREAD}: its tensor {key} does not start with {PREFIX}")
            elif path is not None:
                found.setdefault(path, {})[name] = value
            elif head is not None:
                used_heads.add(head)
                state[f"{head}:{HEAD}{rest.removeprefix(head + '.')}"] = value
            elif not _is_copy_of_base(model, rest, value):
                raise GraftError(f"{UNREAD}: {method.name} has no counterpart of its tensor {key}")
        if missing := [path for path in found if path not in modules]:
            raise GraftError(f"{UNREAD}: the model has no module {missing[0]}, is this the right base?")
        if not found:
            raise GraftError(f"{UNREAD}: it holds no tensor of {method.name}")
        sites = {path: site_for(path, m, method.hosts) for path, m in modules.items() if path in found}
        hyper = self.read_config(method, config, sites, found)
        for path, site in sites.items():
            for name, value in self.site_in(site, found[path], config).items():
                state[f"{path}:{name}"] = value
        state |= self.shared_in(config, sites, state)
        return Recipe(method, hyper), list(sites), [h for h in heads if h in used_heads], state

    def site_in(self, site: Any, found: dict[str, Tensor], config: dict[str, Any]) -> dict[str, Tensor]:
        """Our tensors at a site for PEFT's."""
        where = f"{site.path}, a {type(site.module).__name__}"
        left, state = dict(found), {}
        for ours, form in self.at(site).items():
            if form.name in left:
                state[ours] = form.read(site, left.pop(form.name))
            elif not form.optional:
                raise GraftError(f"{UNREAD}: it lacks {form.name} of {where}")
        if left:
            raise GraftError(f"{UNREAD}: {next(iter(left))} has no place at {where}")
        return state

    def shared_in(self, config: dict[str, Any], sites: dict[str, Any], state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Our tensors that sites share, where PEFT's files need not hold them."""
        return {}

    def read_config(
        self,
        method: type[Delta],
        config: dict[str, Any],
        sites: dict[str, Any],
        found: dict[str, dict[str, Tensor]],
    ) -> dict[str, Any]:
        """Our hyperparameters for PEFT's fields; `found` are PEFT's tensors at the sites."""
        if reason := self.refuses(config):
            raise GraftError(f"{UNREAD}: {reason}")
        known = NEUTRAL | self.neutral | {*self.config, *self.patterns, *self.fixed}
        for name, value in config.items():
            if (name not in known and value) or (name in self.fixed and value != self.fixed[name]):
                raise GraftError(f"{UNREAD}: {method.name} has no counterpart of {name}={value!r}")
        hyper = {}
        for field_name, name in self.config.items():
            if field_name not in config and field_name not in self.defaults:
                raise GraftError(f"{UNREAD}: its configuration lacks {field_name}")
            hyper[name] = config.get(field_name, self.defaults.get(field_name))
        for table, common in self.patterns.items():
            if patterns := config.get(table):
                name = self.config[common]
                hyper[name] = ByPath({path: _fitting(table, patterns, path, hyper[name]) for path in sites})
        return hyper


class DottedPeft(Peft):
    """A type for which PEFT looks for the entries of tables behind a dot of the path."""

    def key(self, path):
        first, dot, rest = path.partition(".")
        if not dot:
            raise GraftError(
                f"PEFT's {self.kind} cannot name {path} in a table: use one value for all modules, or {OWN}"
            )
        return rf"(?<=^{re.escape(first)}\.){re.escape(rest)}"


class PromptPeft(Peft):
    """How PEFT stores prompts: all vectors in one tensor, without a module's path."""

    def write(self, adapter):
        if adapter.heads:
            raise GraftError(f"PEFT's {self.kind} stores no heads: {OWN}")
        common = self.common(adapter, base_modules(adapter.model))
        if common["task_type"] is None:
            raise GraftError(f"PEFT has prompts for language models only, not {type(adapter.model).__name__}: {OWN}")
        value = self.embeddings(adapter).contiguous()
        hyper = {path: adapter.recipe.at(d.site) for path, d in adapter.deltas.items()}
        config = common | self.write_config(adapter.recipe.method, adapter.deltas, hyper)
        return config, {PROMPT: value}

    def read(self, method, model, config, tensors):
        if tensors.keys() != {PROMPT}:
            raise GraftError(
                f"{UNREAD}: a {self.kind} adapter holds the tensor {PROMPT} alone, not {', '.join(tensors)}"
            )
        picked = resolve(model, method.targets, method.hosts)
        places = dict(place for path, module in picked for place in method.places(model, path, module))
        sites = {path: site_for(path, module, method.hosts) for path, module in places.items()}
        sites = {path: site for path, site in sites.items() if not method.refuses(site)}
        hyper = self.read_config(method, config, sites, {})
        return Recipe(method, hyper), list(sites), [], self.from_embeddings(model, sites, tensors[PROMPT], config)

    def embeddings(self, adapter: "Adapter") -> Tensor:
        """PEFT's tensor for the adapter."""
        raise NotImplementedError

    def from_embeddings(
        self, model: nn.Module, sites: dict[str, Any], value: Tensor, config: dict[str, Any]
    ) -> dict[str, Tensor]:
        """Our tensors for PEFT's."""
        raise NotImplementedError


def _fitting(table: str, patterns: Any, path: str, common: Any) -> Any:
    """The value which PEFT takes for a module: that of the first pattern that fits the end of its path."""
    if not isinstance(patterns, dict):
        raise GraftError(f"{UNREAD}: {table} must be a table, not {patterns!r}")
    try:
        return next((v for k, v in patterns.items() if re.match(rf"(.*\.)?({k})$", path)), common)
    except re.error as error:
        raise GraftError(f"{UNREAD}: {table} holds no regular expression: {error}") from None


# Writing


class PeftFormat(Format, name="peft"):
    """Hugging Face PEFT's folder."""

    title, table = "PEFT", "peft"
    library = "peft"
    sign = '"peft_type"'
    loading = "Hugging Face PEFT loads it too: `PeftModel.from_pretrained(model, {title!r})`."

    @classmethod
    def recognises(cls, config):
        return config is not None and "peft_type" in config

    def write(self, adapter, base):
        config, tensors = self.check(adapter.recipe.method).write(adapter)
        return {TENSORS: tensor_bytes(tensors), CONFIG: json_bytes(config | {"base_model_name_or_path": base})}

    def read(self, model, parts):
        config = parts[CONFIG]
        try:
            cls = _method(config)
            found = cls.peft.read(cls, model, config, parts[TENSORS])
        except GraftError:
            raise
        except Exception as error:  # values and shapes which PEFT never writes
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise GraftError(f"{UNREAD}: {reason}") from error
        return Saved(*found, targets=config.get("target_modules"))

    @classmethod
    def facts(cls, config, keys):
        return {
            "method": str(config["peft_type"]).lower(),
            "base": config.get("base_model_name_or_path"),
            "heads": config.get("modules_to_save") or [],
        }


def target_modules(modules: dict[str, nn.Module], paths: list[str]) -> list[str] | str:
    """What makes PEFT choose exactly `paths`: the ends of paths where that is enough, whole paths, or an expression."""

    def chosen(ends):
        return [p for p in modules if p in ends or any(p.endswith(f".{end}") for end in ends)]

    for ends in (sorted({path.rpartition(".")[2] for path in paths}), sorted(paths)):
        if set(chosen(ends)) == set(paths):
            return ends
    return "|".join(re.escape(path) for path in paths)


def _saved_whole(path: str, names: Iterable[str]) -> bool:
    """Whether PEFT takes a module for a head: by the letters at the end of its path, dots or not."""
    return any(path.endswith(name) for name in names)


def task_type(model: nn.Module, modules: dict[str, nn.Module], heads: list[str]) -> str | None:
    """PEFT's task type. For classification it always saves `classifier` or `score`: only named where they are heads."""
    name = type(model).__name__
    if name.endswith(("ForCausalLM", "LMHeadModel")):
        return "CAUSAL_LM"
    if name.endswith("ForConditionalGeneration") and getattr(
        getattr(model, "config", None), "is_encoder_decoder", False
    ):
        return "SEQ_2_SEQ_LM"
    for end, task in (("ForSequenceClassification", "SEQ_CLS"), ("ForTokenClassification", "TOKEN_CLS")):
        if name.endswith(end) and all(p in heads for p in modules if _saved_whole(p, ("classifier", "score"))):
            return task
    return None


# Reading


def _method(config: dict[str, Any]) -> type[Delta]:
    """The method for a configuration; several of ours may be one type of PEFT's, told apart by what they refuse."""
    from ... import methods

    methods.load()
    kind = config["peft_type"]
    known = [cls for cls in METHODS.values() if isinstance(cls.peft, Peft)]
    fitting = [cls for cls in known if cls.peft.kind == kind]
    if not fitting:
        kinds = ", ".join(sorted({cls.peft.kind for cls in known}))
        raise GraftError(f"{UNREAD}: no method here is PEFT's {kind!r}; there are {kinds}")

    def strange(cls):
        wrong = sum(config.get(name, value) != value for name, value in cls.peft.fixed.items())
        return wrong + (cls.peft.refuses(config) is not None)

    return min(fitting, key=strange)


def _is_copy_of_base(model: nn.Module, key: str, value: Tensor) -> bool:
    """Whether a tensor is the base's own, which PEFT saves along when embeddings are targets."""
    own = dict(model.named_parameters(remove_duplicate=False)).get(key.replace(".base_layer.", "."))
    return (
        own is not None and own.shape == value.shape and torch.equal(own.detach().to(value.device, value.dtype), value)
    )


# Layouts which several methods share


def to_input_kernel(site: Any, value: Tensor) -> Tensor:
    """A matrix [k, in] which reads the host's input: at a convolution, PEFT's has the host's kernel."""
    return value.reshape(len(value), *_kernel(site)) if site.kind == "conv" else value


def to_point_kernel(site: Any, value: Tensor) -> Tensor:
    """A matrix [out, k] on k features: at a convolution, PEFT's has kernels of size 1."""
    return value.reshape(*value.shape, *[1] * (len(_kernel(site)) - 1)) if site.kind == "conv" else value


def to_matrix(site: Any, value: Tensor) -> Tensor:
    """The matrix of a convolution's kernel."""
    return value.flatten(1) if site.kind == "conv" and _kernel(site) else value


def zero_padded(site: Any, value: Tensor) -> Tensor:
    """The value itself: PEFT's own convolution pads with zeros, whatever the host does."""
    if site.kind == "conv" and site.module.padding_mode != "zeros":
        raise GraftError(f"PEFT computes something else at {site.path}, a convolution with a padding mode: {OWN}")
    return value


def _kernel(site: Any) -> tuple[int, ...]:
    """[channels, size, ...] of a convolution which PEFT's update follows: it leaves out dilation and the padding's
    mode, and treats groups another way."""
    host: Any = site.module
    if host.groups > 1 or any(d > 1 for d in host.dilation) or host.padding_mode != "zeros":
        raise GraftError(
            f"PEFT computes something else at {site.path}, a convolution with groups, dilation or a padding mode: {OWN}"
        )
    return host.weight.shape[1:]
