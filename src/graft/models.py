"""Base models by name: a local folder, a model id of the Hugging Face hub, or a base that ships (`graft.bases`)."""

import contextlib
import copy
import re
import shutil
import socket
import urllib.parse
import urllib.request
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from . import bases
from .core import quantise as quantising
from .core.errors import GraftError
from .core.merge import merge
from .core.names import SHIPPED
from .core.registry import registry
from .training import objectives
from .training.data import Examples
from .training.evaluation import processor_of

_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


@dataclass
class Base:
    """A base model, ready for one objective.

    name       what it was asked for
    model      in evaluation mode
    processor  its tokenizer or image processor
    objective  what it was loaded for, such as "classification"; None: what its checkpoint says
    heads      modules which the checkpoint does not hold, such as a new classifier: train them beside the adapter
    max_length tokens of one example, if an adapter was trained with another limit than the model's
    """

    name: str
    model: Any
    processor: Any
    objective: str | None = None
    heads: list[str] = field(default_factory=list)
    max_length: int | None = None

    def arguments(self) -> dict[str, Any]:
        """What `evaluate` and `predict` have to know to treat data as in training."""
        objective = self.objective or "auto"
        return {"objective": objective, "processor": self.processor, "max_length": self.max_length}


def load_base(
    name: str | Path,
    *,
    objective: str | None = None,
    examples: Examples | None = None,
    labels: Sequence[str] | None = None,
    config: Mapping[str, Any] | None = None,
    dtype: str = "auto",
    device: str | None = None,
    quantise: str | None = None,
    revision: str | None = None,
    seed: int = 0,
) -> Base:
    """Load a base model with its tokenizer or image processor.

    name       a local folder, the id of a model on the Hugging Face hub, or graft:NAME, a base that ships
    objective  the one it is for; without it the model is of the class that its checkpoint names
    examples   the data, which tell how many outputs the model needs; labels: names of the classes, if not from the data
    config     entries of the configuration instead of both, as an adapter's `task` holds them
    dtype      of the weights: auto (as stored, or what `quantise` computes in), float32, bfloat16, float16
    device     auto by default: the accelerator, if there is one; meta: the model without its weights
    quantise   the linear layers but those of heads: int8, or int8-weights and nf4 with the extra `quantised`; see
               `graft.quantise`. The whole base is in memory first, as it is stored
    revision   of the model on the hub
    seed       of modules which the checkpoint does not hold

    A bare NAME is a base that ships too where no folder is called so. Only a name that is neither is looked for on the
    hub. Weights are read from safetensors only, and code that comes with a model is not run.
    """
    kinds = ("auto", "float32", "bfloat16", "float16")
    if dtype not in kinds:
        raise GraftError(f"dtype is one of {', '.join(kinds)}, not {dtype!r}")
    place = _device(device)
    if quantise is not None:
        own = quantising.find(quantise).dtype
        quantising.check_device(quantise, place)
        dtype = str(own).removeprefix("torch.") if own and dtype == "auto" else dtype
    source = _locate(str(name), revision)
    task = None if objective is None else objectives.find(objective)
    with _reading(source.name, task), torch.random.fork_rng(devices=[]):
        settings = _settings(source)
        changes = dict(config or {})
        if task and config is None:
            changes = task.outputs(settings, examples, labels)
        for key, value in changes.items():
            setattr(settings, key, {int(k): v for k, v in value.items()} if key == "id2label" else value)
        torch.manual_seed(seed)
        model, info = _model_class(source, settings, task).from_pretrained(
            source.place, config=settings, dtype=dtype, use_safetensors=True, output_loading_info=True,
            ignore_mismatched_sizes=bool(changes), device_map="meta" if place.type == "meta" else None,
            **source.options,
        )  # fmt: skip
    if task is not None and task.auto == "AutoModelForCausalLM" and place.type != "meta":
        _check_causal(source.name, model)
    processor = processor_of(model, source.place)
    if source.name.startswith(SHIPPED):
        model.name_or_path = model.config._name_or_path = source.name
    new = {*info["missing_keys"], *(m if isinstance(m, str) else m[0] for m in info["mismatched_keys"])}
    heads = whole(model, new)
    if quantise is not None:
        quantising.quantise(model.eval(), quantise, leave=heads)
    return Base(source.name, model.to(place).eval(), processor, objective, heads)


def skeleton(name: str | Path, revision: str | None = None) -> nn.Module:
    """The model of a checkpoint without its weights (on the meta device): its modules, to look at."""
    source = _locate(str(name), revision)
    with _reading(source.name), torch.device("meta"):
        config = _settings(source)
        cls = _model_class(source, config, None)
        return (getattr(cls, "from_config", None) or cls._from_config)(config)


def architecture(name: str | Path, revision: str | None = None) -> str:
    """The class of models that a checkpoint is of, such as LlamaForCausalLM, or "" if it does not say."""
    source = _locate(str(name), revision)
    with _reading(source.name):
        return _named(_entries(source))


def whole(model: nn.Module, names: set[str]) -> list[str]:
    """The outermost modules all of whose parameters are among `names`."""
    found: list[str] = []
    for path, module in model.named_modules():
        own = {f"{path}.{n}" if path else n for n, _ in module.named_parameters()}
        if own and own <= names and not any(path.startswith(f"{f}.") for f in found):
            found.append(path)
    return found


def save_merged(model: Any, folder: str | Path, processor: Any = None) -> dict[str, float]:
    """Write the plain checkpoint which computes what the adapted model computes, as a folder for `from_pretrained`.

    The model is as before afterwards. Matrices which were tied to others and no longer equal them are stored on their
    own. Returns, by module, which share of its change rounding to the base's dtype lost (`graft.merge` warns about it).
    The folder is written beside its place and renamed.
    """
    folder = Path(folder).expanduser()
    if folder.exists():
        raise GraftError(f"{folder} exists already: choose another folder")
    if registry(model) is None:
        raise GraftError(f"{type(model).__name__} carries no adapter: there is nothing to merge")
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside, config = folder.parent / f".{folder.name}.{uuid.uuid4().hex[:8]}", model.config
    merged = merge(model)
    try:
        owned = tuple(f"{p}." for p, m in model.named_modules() if getattr(m, "graft_owned", False))
        state = {k: v for k, v in model.state_dict().items() if not k.startswith(owned)}
        model.config = copy.deepcopy(config)
        if getattr(config, "tie_word_embeddings", False) and not _tied(model):
            model.config.tie_word_embeddings = False
        with _quiet():
            model.save_pretrained(aside, state_dict=dict(state))
        if processor is not None:
            processor.save_pretrained(aside)
        _check(aside, model, state)
        aside.rename(folder)
    finally:
        model.config = config
        merged.undo()
        shutil.rmtree(aside, ignore_errors=True)
    return merged.lost


def _tied(model: Any) -> bool:
    inputs, outputs = model.get_input_embeddings(), model.get_output_embeddings()
    return inputs is None or outputs is None or inputs.weight is outputs.weight


def _check(folder: Path, model: Any, state: dict[str, torch.Tensor]) -> None:
    """Refuse a checkpoint that would not come back as it is, tensor by tensor: names that are tied while loading."""
    with _quiet():
        again = model.host_class if hasattr(model, "host_class") else type(model)
        back = again.from_pretrained(folder, dtype="auto", local_files_only=True).state_dict()
    for key, value in state.items():
        if key not in back or not torch.equal(back[key].to(value.device), value):
            raise GraftError(
                f"a plain checkpoint of {again.__name__} cannot hold the merged {key} (it is tied to another tensor "
                f"when it is loaded): keep the adapter, or leave that module out of its targets"
            )


# Finding and reading


@dataclass
class _Source:
    """Where a checkpoint lies: a folder or a hub id.

    name  the one spelling of what was asked for
    base  the base that it is, or was merged from, if that ships
    """

    name: str
    place: str
    options: dict[str, Any]
    base: bases.Shipped | None = None


def _locate(name: str, revision: str | None) -> _Source:
    """Nothing but a hub id may use the network."""
    if base := bases.named(name):
        return _Source(base.id, str(base.path()), {"local_files_only": True}, base)
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise GraftError(f"the folder {name} holds no model: it has no config.json")
        return _Source(name, str(path), {"local_files_only": True})
    if path.exists():
        raise GraftError(f"{name} is a file; a model is a folder with config.json and safetensors")
    if not _HUB_ID.fullmatch(name) or (path.parent.is_dir() and path.parent != Path()):
        raise GraftError(
            f"there is no folder {name}: a model is a local folder, the id of a model on the Hugging Face hub, "
            f"or a base that ships ({_ships()})"
        )
    options: dict[str, Any] = {"revision": revision} if revision else {}
    return _Source(name, name, options if _reachable() else {**options, "local_files_only": True})


def _ships() -> str:
    return ", ".join(f"{SHIPPED}{name}" for name in bases.names())


def _reachable() -> bool:
    """Whether the hub's name resolves: asked here, since its client tries for half a minute before it gives up."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    if urllib.request.getproxies():
        return True
    try:
        return bool(socket.getaddrinfo(urllib.parse.urlsplit(constants.ENDPOINT).hostname, None))
    except OSError:
        return False


def _settings(source: _Source) -> Any:
    """The configuration of a checkpoint, which finds the base that defines its class where transformers does not."""
    import transformers

    entries = _entries(source)
    named = _named(entries)
    if source.base is None and named and not hasattr(transformers, named):
        source.base = bases.defining(named)
    own = {cls.config_class.model_type: cls.config_class for cls in _own(source).values()}
    known = own.get(entries.get("model_type"), transformers.AutoConfig)
    return known.from_pretrained(source.place, **source.options)


def _entries(source: _Source) -> dict[str, Any]:
    """What config.json holds."""
    from transformers import PretrainedConfig

    return PretrainedConfig.get_config_dict(source.place, **source.options)[0]


def _named(entries: Mapping[str, Any]) -> str:
    return (entries.get("architectures") or [""])[0]


def _own(source: _Source) -> dict[str, Any]:
    return source.base.models() if source.base else {}


def _model_class(source: _Source, config: Any, task: type[objectives.Objective] | None) -> Any:
    """The class that loads a checkpoint: one for the objective, or the one that the checkpoint names."""
    import transformers

    named = (getattr(config, "architectures", None) or [""])[0]
    if task is None and hasattr(transformers, named):
        return getattr(transformers, named)
    ending = named if task is None else task.auto.removeprefix("AutoModel")
    fitting = [cls for name, cls in _own(source).items() if name.endswith(ending)] if ending else []
    cls = fitting[0] if fitting else getattr(transformers, task.auto if task else "AutoModel", None)
    if cls is None:
        raise GraftError(_no_model(source.name, task))
    return cls


@torch.no_grad()
def _check_causal(name: str, model: Any) -> None:
    """Refuse an encoder in the place of a decoder, which transformers loads without a word: it would see the answer."""
    rows = torch.tensor([[0, 1, 2, 3], [0, 1, 2, 4]], device=model.device)
    first = model.eval()(input_ids=rows).logits[:, 0].float()
    if (first[0] - first[1]).abs().max() > 1e-3 * first.std():
        raise GraftError(
            f"{name} is no decoder: {type(model).__name__} sees the tokens after the one that it should predict; "
            f"choose another model or another objective"
        )


def _device(name: str | None) -> torch.device:
    if name is None:
        from accelerate import PartialState

        return torch.device(str(PartialState().device))
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:  # no such kind of device, or none of it here
        raise GraftError(f"device {name!r} cannot be used: {_first_line(error)}") from None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the remarks and bars of transformers: what matters of them is reported in other ways."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


@contextlib.contextmanager
def _reading(name: str, task: type[objectives.Objective] | None = None) -> Iterator[None]:
    """Turn what reading a checkpoint may raise into one sentence."""
    with _quiet():
        try:
            yield
        except GraftError:
            raise
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            said = _reason(name, task, error)
            if said is None:
                raise
            raise GraftError(said) from error


def _reason(name: str, task: type[objectives.Objective] | None, error: Exception) -> str | None:
    """What went wrong with the checkpoint `name`, or None if it is a bug."""
    chain, link = [], error
    while link is not None and len(chain) < 10:
        chain.append(link)
        link = link.__cause__ or link.__context__
    kinds = {cls.__name__ for e in chain for cls in type(e).__mro__}
    text = " ".join(str(e) for e in chain)
    page = f"https://huggingface.co/{name}"
    if "GatedRepoError" in kinds or "gated repo" in text:
        return f"the model {name} is gated: accept its terms at {page} and log in with `hf auth login`"
    if "RevisionNotFoundError" in kinds:
        return f"the model {name} has no such revision: see {page}"
    if kinds & {"RepositoryNotFoundError", "HFValidationError"}:
        return (
            f"there is no folder and no model on the Hugging Face hub called {name}: check the spelling, "
            f"or log in with `hf auth login` if it is private"
        )
    unreachable = {"OfflineModeIsEnabled", "LocalEntryNotFoundError", "ConnectionError", "ConnectError", "Timeout"}
    if kinds & unreachable or "offline mode" in text:
        return (
            f"{name} is neither a folder nor on this machine, and the Hugging Face hub cannot be reached: "
            f"go online, or name a folder or a base that ships ({_ships()})"
        )
    if "trust_remote_code" in text:
        return f"{name} needs code of its own, which is not run: use a model that transformers knows by itself"
    if task and "Unrecognized configuration class" in text:
        return _no_model(name, task)
    if "SafetensorError" in kinds or "JSONDecodeError" in kinds or "not a valid JSON file" in text:
        return f"{name} is damaged: {_first_line(error)}"
    if "safetensors" in text and isinstance(error, OSError):
        return f"{name} has no weights in safetensors: convert it first (pickled weights are not read)"
    if isinstance(error, (OSError, ValueError, KeyError, ImportError)):
        return f"{name} cannot be loaded: {_first_line(error)}"
    return None


def _no_model(name: str, task: Any) -> str:
    return f"{name} has no model for {task.name}: choose another objective or another model"


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0] or type(error).__name__
