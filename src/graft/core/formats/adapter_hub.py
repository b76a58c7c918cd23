"""The folders of the library `adapters` (AdapterHub), both ways, for the methods which it has too.

A method says in a table how the library stores it; the table is an attribute of its class:

    adapter_hub = AdapterHub("loras", {"A": As("lora_A"), "B": As("lora_B")}, spots=LINEAR, fixed={...}, ...)

or a sentence, why there is no exchange although the library has a method of that name.

A tensor is called "<module of the library>.<kind>.<name of the adapter>.<tensor>"; where the library puts its modules
differs from model to model (MODELS). A head is a file of its own, with the names of the model.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..card import class_name
from ..delta import METHODS, Delta
from ..errors import GraftError
from ..folder import CONFIG, json_bytes, tensor_bytes
from ..host import base_modules
from ..hyper import hyperparameters
from ..recipe import ByPath, Recipe
from ..site import site_for
from ..targets import resolve
from . import OWN, As, Format, Saved

if TYPE_CHECKING:
    from ..adapter import Adapter

UNREAD = "this adapter in the format of `adapters` cannot be read"
ADAPTER, HEAD, HEAD_CONFIG = "adapter.safetensors", "model_head.safetensors", "head_config.json"
VERSION = "adapters.1.3.0"  # the release whose files these are
COPY = "copy."  # where the delta of a head keeps its module

# Where the library puts what, from the block, by model type. Llama's intermediate matrix is down_proj there.
_BERT = {
    "q": "attention.self.query",
    "k": "attention.self.key",
    "v": "attention.self.value",
    "intermediate_lora": "intermediate.dense",
    "output_lora": "output.dense",
    "mh_adapter": "attention.output",
    "output_adapter": "output",
}
_HOOKED = {"mh_adapter": "attention_adapters", "output_adapter": "output_adapters"}
MODELS: dict[str, dict[str, str]] = {
    "bert": _BERT,
    "roberta": _BERT,
    "distilbert": _HOOKED
    | {
        "q": "attention.q_lin",
        "k": "attention.k_lin",
        "v": "attention.v_lin",
        "intermediate_lora": "ffn.lin1",
        "output_lora": "ffn.lin2",
    },
    "gpt2": _HOOKED | {"intermediate_lora": "mlp.c_fc", "output_lora": "mlp.c_proj"},
    "llama": _HOOKED
    | {
        "q": "self_attn.q_proj",
        "k": "self_attn.k_proj",
        "v": "self_attn.v_proj",
        "intermediate_lora": "mlp.down_proj",
        "output_lora": "mlp.up_proj",
    },
    "vit": {
        "q": "attention.attention.query",
        "k": "attention.attention.key",
        "v": "attention.attention.value",
        "intermediate_lora": "intermediate.dense",
        "output_lora": "output.dense",
        "mh_adapter": "attention_adapters",
        "output_adapter": "output.output_adapters",
    },
}
ATTENTION = ("q", "k", "v")
LINEAR = (*ATTENTION, "intermediate_lora", "output_lora")


@dataclass(frozen=True)
class AdapterHub:
    """How `adapters` stores a method. A subclass, in the method's file, overrides what a table cannot say."""

    kind: str  # the collection in the library's modules: adapters, loras, refts
    tensors: dict[str, As] = field(default_factory=dict)  # our tensor at a site -> the library's
    spots: tuple[str, ...] = ()  # where it goes, as in MODELS
    config: dict[str, str] = field(default_factory=dict)  # the library's field -> our hyperparameter
    fixed: dict[str, Any] = field(default_factory=dict)  # fields which have this one value in our method
    neutral: frozenset[str] = frozenset()  # further fields that do not change what a trained adapter computes
    own: frozenset[str] = frozenset()  # hyperparameters that a subclass translates, or that only tell how it started
    models: tuple[str, ...] = tuple(MODELS)  # types on which the library computes the same

    def homes(self, method: type[Delta], model: nn.Module) -> dict[str, tuple[int, str, str]]:
        """(number of the block, spot, module of the library) by our path."""
        places = MODELS[model_type(model)]
        return {
            f"{block}.{places[spot]}": (i, spot, f"{block}.{places[spot]}")
            for i, block in enumerate(blocks(model))
            for spot in self.spots
            if spot in places
        }

    def check(self, site: Any) -> None:
        """Refuse a site at which the library computes something else."""

    def write(self, adapter: "Adapter") -> tuple[dict[str, Any], dict[str, Tensor]]:
        """The library's configuration and tensors for an adapter."""
        method = adapter.recipe.method
        homes = self.homes(method, adapter.model)
        own = {path: d for path, d in adapter.deltas.items() if path not in dict(adapter.heads)}
        tensors = {}
        for path, delta in own.items():
            if path not in homes:
                raise GraftError(f"`adapters` has no {method.name} at {path}: {OWN}")
            self.check(delta.site)
            for name, value in self.site_out(delta).items():
                tensors[f"{homes[path][2]}.{self.kind}.{adapter.name}.{name}"] = value
        hyper = {path: adapter.recipe.at(d.site) for path, d in own.items()}
        config = self.fixed | self.layers({p: homes[p] for p in own}, len(blocks(adapter.model)))
        for name, known in hyperparameters(method).items():
            translated = name in self.own or name in self.config.values()
            if not translated and any(h[name] != known.default for h in hyper.values()):
                raise GraftError(f"`adapters` has no counterpart of {method.name}'s {name}: {OWN}")
        for field_name, name in self.config.items():
            if len({h[name] for h in hyper.values()}) > 1:
                raise GraftError(f"`adapters` has one {field_name} for all modules, this adapter several: {OWN}")
            config[field_name] = next(iter(hyper.values()))[name]
        return config | self.write_config(own, homes), tensors

    def layers(self, homes: dict[str, tuple[int, str, str]], count: int) -> dict[str, Any]:
        """The fields that make the library choose these places, in every block that is not left out."""
        used: dict[int, set[str]] = {}
        for block, spot, _ in homes.values():
            used.setdefault(block, set()).add(spot)
        spots = next(iter(used.values()))
        if any(other != spots for other in used.values()):
            raise GraftError(f"`adapters` adapts the same modules in all blocks, this adapter different ones: {OWN}")
        return {"leave_out": [i for i in range(count) if i not in used]} | self.chosen(spots)

    def chosen(self, spots: set[str]) -> dict[str, Any]:
        """The fields for the spots of a block."""
        return {spot: spot in spots for spot in self.spots}

    def site_out(self, delta: Any) -> dict[str, Tensor]:
        """The library's tensors at the site of a delta, by name."""
        if strange := [key for key in delta.state_dict() if key not in self.tensors]:
            raise GraftError(f"`adapters` has no counterpart of {strange[0]} of {delta.name}: {OWN}")
        return {self.tensors[k].name: self.tensors[k].write(delta.site, v) for k, v in delta.state_dict().items()}

    def write_config(self, deltas: dict[str, Any], homes: dict[str, tuple[int, str, str]]) -> dict[str, Any]:
        """Further fields for the deltas by path."""
        return {}

    def read(
        self,
        method: type[Delta],
        model: nn.Module,
        config: dict[str, Any],
        tensors: dict[tuple[str, str, str], Tensor],
    ) -> tuple[dict[str, Any], dict[str, dict[str, Tensor]]]:
        """Our hyperparameters, and our tensors by path, for the library's by module, collection and name."""
        known = self.config.keys() | self.fixed.keys() | self.neutral | NEUTRAL
        for name, value in config.items():
            if value != self.fixed[name] if name in self.fixed else value and name not in known:
                raise GraftError(f"{UNREAD}: {method.name} has no counterpart of {name}={value!r}")
        if lacking := [name for name in self.config if name not in config]:
            raise GraftError(f"{UNREAD}: its configuration lacks {lacking[0]}")
        found: dict[str, dict[str, Tensor]] = {}
        for (home, kind, name), value in tensors.items():
            if kind != self.kind:
                raise GraftError(f"{UNREAD}: {method.name} has no counterpart of {kind} at {home} ({name})")
            found.setdefault(home, {})[name] = value
        if not found:
            raise GraftError(f"{UNREAD}: it holds no tensor")
        places = {home: path for path, (_, _, home) in self.homes(method, model).items()}
        if lost := [home for home in found if home not in places]:
            raise GraftError(f"{UNREAD}: the model has no place for {lost[0]}, is this the right base?")
        modules, state = base_modules(model), {}
        for home, own in found.items():
            site = site_for(places[home], modules[places[home]], method.hosts)
            self.check(site)
            state[site.path] = self.site_in(site, own, config)
        hyper = {name: config[field_name] for field_name, name in self.config.items()}
        return hyper | self.read_config(config, state), state

    def site_in(self, site: Any, found: dict[str, Tensor], config: dict[str, Any]) -> dict[str, Tensor]:
        """Our tensors at a site for the library's."""
        names = {form.name for form in self.tensors.values()}
        if found.keys() != names:
            odd = sorted(found.keys() ^ names)[0]
            raise GraftError(f"{UNREAD}: {odd} of {site.path} {'has no place here' if odd in found else 'is missing'}")
        return {ours: form.read(site, found[form.name]) for ours, form in self.tensors.items()}

    def read_config(self, config: dict[str, Any], state: dict[str, dict[str, Tensor]]) -> dict[str, Any]:
        """Further hyperparameters; `state` are our tensors by path."""
        return {}


# Where it goes is read off the names of its tensors, how it started is past.
NEUTRAL = {
    "leave_out", "layers", "init_weights", "init_weights_seed", "dtype", "mh_adapter", "output_adapter",
    "selfattn_lora", "intermediate_lora", "output_lora", "attn_matrices", "output_reft",
}  # fmt: skip
_BOTTLENECK = {
    "architecture": None,
    "phm_layer": False,
    "ln_before": False,
    "ln_after": False,
    "use_gating": False,
    "inv_adapter": None,
    "cross_adapter": False,
    "original_ln_after": True,
    "residual_before_ln": True,
    "adapter_residual_before_ln": False,
    "stochastic_depth": 0.0,
}
_ACTIVATIONS = {"relu": "relu", "gelu": "gelu", "swish": "silu", "silu": "silu", "tanh": "tanh"}


@dataclass(frozen=True)
class BottleneckHub(AdapterHub):
    """A bottleneck of `size` features, which the library names by how much smaller it is than the model."""

    def homes(self, method, model):
        places, starts = MODELS[model_type(model)], blocks(model)
        found = {}
        picked = resolve(model, method.targets, method.hosts)
        hosts = dict(place for path, module in picked for place in method.places(model, path, module))
        for i, block in enumerate(starts):
            inside = [path for path in hosts if path == block or path.startswith(f"{block}.")]
            for spot, path in zip(self.spots, inside):
                found[path] = (i, spot, f"{block}.{places[spot]}")
        return found

    def chosen(self, spots):
        if spots != set(self.spots):
            raise GraftError(f"`adapters` has it at {' and '.join(self.spots)} of a block, not at one alone: {OWN}")
        return {spot: spot in spots for spot in ("mh_adapter", "output_adapter")}

    def write_config(self, deltas, homes):
        sizes = {str(homes[path][0]): d.down.weight.shape for path, d in deltas.items()}
        # The library takes the whole part of width / factor: a half more keeps it clear of rounding.
        factors = {block: width / size if width % size == 0 else width / (size + 0.5)
                   for block, (size, width) in sizes.items()}  # fmt: skip
        by_block = factors | {"default": next(iter(factors.values()))}
        same = len({*factors.values()}) == 1
        return {
            "reduction_factor": by_block["default"] if same else by_block,
            "non_linearity": next(iter(_hyper(deltas, "activation"))),
            "dropout": 0.0,
        }

    def read_config(self, config, state):
        word = config.get("non_linearity")
        if word not in _ACTIVATIONS:
            raise GraftError(f"{UNREAD}: non_linearity is {', '.join(_ACTIVATIONS)} here, not {word!r}")
        sizes = {path: tensors["down.weight"].shape[0] for path, tensors in state.items()}
        size = next(iter(sizes.values())) if len({*sizes.values()}) == 1 else ByPath(sizes)
        return {"size": size, "activation": _ACTIVATIONS[word]}


def bottleneck(*spots: str, models: Iterable[str] = MODELS, config: Any = (), **fixed: Any) -> BottleneckHub:
    """The table of a bottleneck adapter at `spots`; `fixed` tells the variant."""
    names = {"down": "adapter_down.0", "up": "adapter_up"}
    return BottleneckHub(
        "adapters",
        {f"{a}.{t}": As(f"{b}.{t}") for a, b in names.items() for t in ("weight", "bias")},
        spots,
        dict(config),
        _BOTTLENECK | fixed,
        frozenset(
            {"reduction_factor", "non_linearity", "dropout", "inv_adapter_reduction_factor", "phm_dim", "phm_bias",
             "phm_c_init", "phm_init_range", "phm_rank", "factorized_phm_W", "factorized_phm_rule", "shared_W_phm",
             "shared_phm_rule", "learn_phm", "hypercomplex_nonlinearity"}
        ),
        frozenset({"size", "activation", "std", "dropout"}),
        tuple(models),
    )  # fmt: skip


def _hyper(deltas: dict[str, Any], name: str) -> set[Any]:
    found = {d.activation.__name__ if name == "activation" else getattr(d, name) for d in deltas.values()}
    if len(found) > 1:
        raise GraftError(f"`adapters` has one {name} for all modules, this adapter {', '.join(map(str, found))}: {OWN}")
    return found


@dataclass(frozen=True)
class LoraHub(AdapterHub):
    """What the library puts beside or onto single matrices."""

    spots: tuple[str, ...] = LINEAR

    def chosen(self, spots):
        matrices = [key for key in ATTENTION if key in spots]
        return {
            "selfattn_lora": bool(matrices),
            "attn_matrices": matrices or list(ATTENTION),
            "intermediate_lora": "intermediate_lora" in spots,
            "output_lora": "output_lora" in spots,
        }


class AdapterHubFormat(Format, name="adapters"):
    """The folder of the library `adapters`, as it saves it with use_safetensors=True."""

    title, table = "`adapters`", "adapter_hub"
    files = (CONFIG, ADAPTER)
    optional = (HEAD_CONFIG, HEAD)
    library = "adapters"
    sign = '"config" and "model_type"'
    loading = "The library `adapters` loads it too: `model.load_adapter({title!r}, use_safetensors=True)`."

    @classmethod
    def recognises(cls, config):
        return config is not None and isinstance(config.get("config"), dict) and "model_type" in config

    def write(self, adapter, base):
        cls, model = adapter.recipe.method, adapter.model
        table = self.check(cls)
        _check_model(cls, model, OWN)
        config, tensors = table.write(adapter)
        base_config: Any = model.config
        about = {
            "hidden_size": base_config.hidden_size,
            "model_class": class_name(model),
            "model_name": base or "",
            "model_type": model_type(model),
            "version": VERSION,
        }
        files = {
            CONFIG: json_bytes(about | {"config": config, "name": adapter.name}),
            ADAPTER: tensor_bytes(tensors),
        }
        if adapter.heads:
            paths = [path for path, _ in adapter.heads]
            prefix = getattr(model, "base_model_prefix", "")
            if inside := [path for path in paths if path == prefix or path.startswith(f"{prefix}.")]:
                raise GraftError(f"`adapters` takes heads outside of {prefix} only, not {inside[0]}: {OWN}")
            heads = {f"{path}.{name.removeprefix(COPY)}": value
                     for path in paths for name, value in adapter.deltas[path].state_dict().items()}  # fmt: skip
            labels = getattr(base_config, "label2id", None)
            head = {"config": None, "name": None, "num_labels": len(labels or ()), "label2id": labels}
            files |= {HEAD: tensor_bytes(heads), HEAD_CONFIG: json_bytes(about | head)}
        return files

    def read(self, model, parts):
        try:
            return _read(model, parts)
        except GraftError:
            raise
        except Exception as error:  # values and shapes which the library never writes
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise GraftError(f"{UNREAD}: {reason}") from error

    @classmethod
    def facts(cls, config, keys):
        found = _method(config["config"])
        return {
            "method": found.name if _misfits(found, config["config"]) == 0 else None,
            "base": config.get("model_name") or None,
            "sites": len({_split(key, config["name"])[0] for key in keys}),
        }


def _read(model: nn.Module, parts: dict[str, dict[str, Any]]) -> Saved:
    whole = parts[CONFIG]
    config, name = whole["config"], whole.get("name")
    version = str(whole.get("version") or "")
    numbers = version.removeprefix("adapters.").split(".")
    if not version.startswith("adapters.") or tuple(map(int, numbers[:2])) < (1, 1):
        raise GraftError(
            f"{UNREAD}: version {version or 'unknown'} has other names and scalings; load and save it with `adapters` "
            f"1.1 or later"
        )
    if not isinstance(name, str) or not name:
        raise GraftError(f"{UNREAD}: its configuration names no adapter")
    cls = _method(config)
    _check_model(cls, model, UNREAD)
    table = _table(cls)
    hyper, own = table.read(cls, model, config, {_split(key, name): value for key, value in parts[ADAPTER].items()})
    heads, extra = _heads(model, parts.get(HEAD, {}))
    state = {f"{path}:{tensor}": value for path, tensors in own.items() for tensor, value in tensors.items()}
    return Saved(Recipe(cls, hyper), list(own), heads, state | extra, targets=list(own), name=name)


def _heads(model: nn.Module, tensors: dict[str, Tensor]) -> tuple[list[str], dict[str, Tensor]]:
    """The heads which are not the base's own, and their tensors under our names."""
    base = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    heads, state = [], {}
    for top in dict.fromkeys(key.partition(".")[0] for key in tensors):
        own = {key: value for key, value in tensors.items() if key.partition(".")[0] == top}
        if strange := [key for key in own if key not in base]:
            raise GraftError(
                f"{UNREAD}: the model has no {strange[0]}; save the adapter without its head (with_head=False), or "
                f"load it on a model with that head"
            )
        if not all(_same(base[key], value) for key, value in own.items()):
            heads.append(top)
            state |= {f"{top}:{COPY}{key.removeprefix(f'{top}.')}": value for key, value in own.items()}
    return heads, state


def _same(own: Tensor, value: Tensor) -> bool:
    return own.shape == value.shape and torch.equal(own.detach().to(value.device, value.dtype), value)


def _split(key: str, name: str) -> tuple[str, str, str]:
    """Module, collection and tensor of a name in the file."""
    before, found, tensor = key.partition(f".{name}.")
    home, _, kind = before.rpartition(".")
    if not found or not home:
        raise GraftError(f"{UNREAD}: its tensor {key} is not of the adapter {name!r}")
    return home, kind, tensor


_table = AdapterHubFormat.stored


def _misfits(cls: type[Delta], config: dict[str, Any]) -> int:
    return sum(config.get(name, value) != value for name, value in _table(cls).fixed.items())


def _method(config: dict[str, Any]) -> type[Delta]:
    """The method for a configuration: the one that most of it fits."""
    from ... import methods

    methods.load()
    known = [cls for cls in METHODS.values() if isinstance(_table(cls), AdapterHub)]
    kind = config.get("architecture")
    fitting = [cls for cls in known if _table(cls).fixed["architecture"] == kind]
    if not fitting:
        reasons = {cls.name: _table(cls) for cls in METHODS.values() if isinstance(_table(cls), str)}
        why = f" ({reasons[kind]})" if kind in reasons else ""
        raise GraftError(f"{UNREAD}: no method here is of its architecture {kind!r}{why}")
    return min(fitting, key=lambda cls: _misfits(cls, config))


def _check_model(cls: type[Delta], model: nn.Module, otherwise: str) -> None:
    models = _table(cls).models
    if model_type(model) not in models:
        raise GraftError(
            f"that `adapters` computes the same {cls.name} is known for {', '.join(models)}, not for "
            f"{model_type(model) or type(model).__name__}: {otherwise}"
        )


def model_type(model: nn.Module) -> str:
    return getattr(getattr(model, "config", None), "model_type", "")


def blocks(model: nn.Module) -> list[str]:
    """The paths of the transformer blocks, in order."""
    return [path for path, _ in resolve(model, "blocks", ("module",))]
