"""The core: a delta is a function wrapped around another function.

y  = delta(inner, x)     what the adapted module computes; `inner` is what was there before
W' = delta.weight(W)     optional: the same, seen as a change of the host's matrix
"""

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from .errors import GraftError
from .host import Host, base_modules, base_parameters
from .kept import Kept, new_epoch

METHODS: dict[str, type["Delta"]] = {}
Fresh = dict[nn.Parameter, Tensor | None]  # parameters without a past; a mask tells which of their entries, None all


class Paper(NamedTuple):
    """Where a method comes from."""

    title: str
    authors: str
    year: int
    url: str


class _MethodType(type):
    """`LoRA(rank=8)` describes an adaptation (a Recipe); `LoRA(site, rank=8)` builds it at one site."""

    def __call__(cls, *args, **hyper) -> Any:
        if args:
            return super().__call__(*args, **hyper)
        from .recipe import Recipe

        return Recipe(cast(type[Delta], cls), hyper)


class Delta(nn.Module, metaclass=_MethodType):
    """One adaptation at one site. Subclass it once per method, in one file under `graft/methods/`.

    The keyword-only arguments of `__init__` are the method's hyperparameters (see `hyper.py`): command line, saved
    configuration and documentation are derived from them. Write `forward`, or `weight` (`forward` then follows), or
    both: `weight` makes the method mergeable, `forward` spares the full-size W'. The contract test compares the two.
    What a forward computes from weights alone belongs into `prepare` and the rest into `act`, which make a `forward`.
    Tensors are created in float32 on the CPU; the adapter moves them, and keeps float32 beside a half-precision base.
    """

    site: Any
    shared: Any
    name: str = ""
    papers: tuple[Paper, ...] = ()
    known: str = ""  # where it shines or fails, in one or two sentences that say who reports it
    version = 1  # raised when saved files of the method change their meaning
    hosts: tuple[str, ...] = ("linear", "conv", "embedding")  # kinds of sites on which the method is right
    on_codes = True  # whether it works at quantised layers, and at modules that hold some
    targets: Any = "all-linear"  # where it goes unless the user says otherwise
    needs: tuple[str, ...] = ()  # statistics it may be built from, see statistics.py and `asks`
    brings_rows = False  # it replaces rows which a base loaded anew draws at random: no part of the base's fingerprint
    starts_as_base = True  # whether the adapted model computes what the base computes before training
    place = "forward"  # which function of the host it wraps: its forward, or its attention "product"
    passes_x = False  # whether its forward calls inner once, on x itself
    stacks_itself = False  # whether it has `stack` and `act_stacked` to serve rows by deltas of their own
    by_factors = False  # whether rows of a batch are served by `factors`, which cost no more than `act`; it passes x
    small: dict = {}  # hyperparameters for a tiny host: used by tests and examples
    peft: Any = None  # how Hugging Face PEFT stores it, see peft.py, or why it is not exchanged
    ups: tuple[str, ...] = ()  # of its own tensors those that LoRA+ trains faster: the factors that lead to the output
    neutral: dict[str, float] = {}  # tensors in which W' and b' are linear together, at the values of W' = W, b' = b
    graft_owned = True  # tells model walks that this module belongs to an adapter, not to the base
    resting: bool = False  # whether its parameters get no gradient until `step` says otherwise
    _kept: Kept | None = None

    def __init_subclass__(cls, name: str = "", **kwargs):
        super().__init_subclass__(**kwargs)
        if cls.by_factors and not (cls.passes_x and cls.factors is not Delta.factors):
            raise GraftError(f"{cls.__name__}: by_factors = True also needs passes_x = True and factors of its own")
        if name:
            cls.name = name
            METHODS[name] = cls

    def __init__(self, site, shared: nn.Module | None = None):
        super().__init__()
        for key, value in {"site": site, "shared": shared}.items():
            object.__setattr__(self, key, value)  # plain references, never registered here

    def forward(self, inner, x):
        return self.act(inner, x, *self.prepared(inner, x.dtype))

    def prepare(self, inner) -> tuple[Any, ...]:
        """The tensors (or None) with which `act` computes and which weights alone decide; pure. By default W', b'."""
        return self.weight(inner.weight), self.bias(inner.bias)

    def act(self, inner, x, *prepared):
        """y from x and what `prepare` gave; of the delta itself it reads settings only, no tensors."""
        return self.site.apply(x, *prepared)

    def joins(self, inner, x: Tensor) -> bool:
        """Whether a forward may make its change from W for the call, as a W' or as factors, instead of from x.

        Where `inner` is the host alone, its own forward and a plain matrix, in single precision or more, so that no
        change is lost in W', and where tokens are many enough to be worth the passes over W.
        """
        site = self.site
        return (
            isinstance(inner, Host)
            and site.module.host_forward is None
            and site.kind == "linear"
            and site.plain_in(x)
            and self._many(x)
        )

    def _many(self, x: Tensor) -> bool:
        site = self.site
        return 4 * x.numel() * (site.d_in + site.d_out) > site.d_in**2 * site.d_out

    def formed(self, inner, x: Tensor, form: Callable, *tensors: Tensor, pull: Callable) -> Tensor | None:
        """y by `site.apply_formed`, for a change with form(W, *tensors) = W + form(0, *tensors); None for few tokens.

        Many meet W' where the delta `joins`. Beside half precision, in which W' would lose what is small beside W,
        they meet the change alone, and y is added to what `inner` gives.
        """
        if self.joins(inner, x):
            return self.site.apply_formed(x, form, inner.weight, inner.bias, *tensors, pull=pull)
        if x.dtype.itemsize != 2 or not self._many(x):
            return None
        zeros = x.new_zeros(1).expand(self.site.d_out, self.site.d_in)
        return inner(x) + self.site.apply_formed(x, form, zeros, None, *tensors, pull=pull)

    def prepared(self, inner, dtype: torch.dtype) -> tuple[Any, ...]:
        """`prepare(inner)` for x of `dtype`; in inference, while all it is made from is frozen, made once and kept.

        Made anew as soon as a tensor, a setting or a delta inside differs, and kept only where it is smaller than the
        host's own tensors. A change that goes past the counters of torch (`p.data.add_(...)`) is not seen, which is
        why nothing is kept while a parameter may be trained.
        """
        if torch.compiler.is_compiling():
            return self.prepare(inner)
        kept = self._kept
        if torch.is_grad_enabled():
            if kept is not None:
                object.__setattr__(self, "_kept", None)
            return self.prepare(inner)
        if kept is None or not kept.holds(self, inner, dtype):
            kept = self._make(inner, dtype)
        return kept.made

    def _make(self, inner, dtype: torch.dtype) -> Kept:
        host = self.site.module
        with torch.autocast(self.site.where().device.type, enabled=False):
            kept = Kept(self, inner, dtype)
        kept.made = tuple(t if t is None or not self._casts(t, dtype) else t.to(dtype) for t in kept.made)
        size = sum(p.nbytes for p in base_parameters(base_modules(host)).values())
        object.__setattr__(self, "_kept", kept if kept.smaller_than(size) else None)
        return kept

    def _casts(self, t: Tensor, dtype: torch.dtype) -> bool:
        """Whether t is kept in dtype. Not what sites share: each would have a copy. Not on CPUs, see small_product."""
        if (
            self.site.kind == "norm"
            or t.device.type == "cpu"
            or not (t.is_floating_point() and dtype.is_floating_point)
        ):
            return False
        shared = [] if self.shared is None else [*self.shared.parameters(), *self.shared.buffers()]
        return t.untyped_storage().data_ptr() not in {s.untyped_storage().data_ptr() for s in shared}

    def sources(self) -> list[nn.Module]:
        """The modules whose tensors and settings `prepare` reads, besides inner: its own and what sites share."""
        return [*self.modules()] + ([] if self.shared is None else [*self.shared.modules()])

    def __setattr__(self, name, value):
        super().__setattr__(name, value)
        new_epoch()

    def __getstate__(self):
        return {k: v for k, v in self.__dict__.items() if k != "_kept"}

    def entries(self) -> tuple[Tensor, Tensor] | None:
        """Flat positions [k] in W, each once, and values [k] added there, for a method that does no more; or None."""

    def factors(self) -> tuple[Tensor, Tensor] | None:
        """A [k, in] and B [out, k] with W' = W + B A, for a method that is such a sum; None for any other."""

    def weight(self, w: Tensor) -> Tensor:
        """W' for the matrix w [out, in]; pure. Not for deltas of activations."""
        raise GraftError(
            f"{self.name} at {self.site.path or 'the model'} changes no weight: it cannot be merged, and a method that "
            f"computes with the weight runs inside of it only, so attach that one first"
        )

    def bias(self, b: Tensor | None) -> Tensor | None:
        """b' for the bias b [out], or None where there is none; pure."""
        return b

    def tensors(self, inner) -> dict[str, Tensor]:
        """The host's own parameters by name, in its layout, with this delta merged in."""
        return self.site.layout(self.weight(inner.weight), self.bias(inner.bias))

    @classmethod
    def mergeable(cls) -> bool:
        return cls.weight is not Delta.weight

    @classmethod
    def asks(cls, hyper: dict[str, Any]) -> tuple[str, ...]:
        """The statistics that must be collected before a delta with these hyperparameters can be built."""
        return cls.needs

    @classmethod
    def plan(cls, sites: list, hypers: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        """The hyperparameters by path, once all sites of a new adapter are known; a site left out gets no delta."""
        return hypers

    def absorbed(self) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
        """Hyperparameters and tensors of the same delta in its plain form, which other formats know; None if it is."""

    @classmethod
    def places(cls, model: nn.Module, path: str, module: nn.Module) -> list[tuple[str, nn.Module]]:
        """The modules at which deltas go when `module` at `path` is the target: that one, unless the method differs."""
        return [(path, module)]

    @classmethod
    def refuses(cls, site) -> str | None:
        """Why the method cannot work at `site` although its kind fits, or None. Presets leave such sites out."""

    @classmethod
    def share(cls, sites: list, **hyper) -> nn.Module | None:
        """Build the module which the deltas of all `sites` use together, if the method has one."""

    @classmethod
    def step(cls, deltas: list, progress: float) -> Fresh | None:
        """Follow a schedule (rank, mask, temperature): after backward, before the optimiser's step.

        `progress` runs from 0 to 1. What changes here must be a buffer, so that compiled graphs stay valid. What it
        gives are parameters which begin anew: those given whole without the gradient of this step, and as if the
        optimiser had never seen them.
        """

    @classmethod
    def aside(cls, deltas: list, count: int) -> int:
        """How many of `count` training examples a run keeps from training, for `review`."""
        return 0

    @classmethod
    def review(cls, deltas: list, progress: float, trial: Any) -> Fresh | None:
        """Compare losses, for methods with examples `aside`: at each step, after clipping and before `step`.

            trial.loss()                         the mean loss over the examples aside, in evaluation mode
            trial.gradients(parameters, aside)   of the mean loss over this step's data, or over a batch of those aside
            trial.learning_rate                  of the step

        What is computed twice in a step meets the same dropout. Gradients may be set and values changed; what is given
        is as in `step`.
        """

    def packed(self) -> dict[str, Tensor]:
        """The tensors by name as our own files hold them, where less than `state_dict` will do."""
        return self.state_dict()

    @classmethod
    def unpacked(cls, tensors: dict[str, Tensor], site: Any, hyper: dict[str, Any]) -> dict[str, Tensor]:
        """The tensors of `state_dict` from those of `packed`."""
        return tensors

    def loaded(self) -> None:
        """Called when tensors were set from a file or a checkpoint: for settings that follow from them."""

    @classmethod
    def penalty(cls, deltas: list) -> Tensor | None:
        """A scalar to add to the loss, if the method has one."""


class Edit(Delta):
    """A delta of activations: h' = edit(h, x, *prepared), h the host's (first) output and x its first input."""

    hosts = ("linear", "module")
    passes_x = True

    def edit(self, h: Tensor, x: Tensor, *seen_and_prepared: Any) -> Tensor:
        """h' from the output h; what `look` saw and `prepare` gave follow. A row's h' depends on that row only."""
        raise NotImplementedError

    def look(self, args: tuple, kwargs: dict[str, Any]) -> tuple[Tensor | None, ...]:
        """What `edit` must know of the host's arguments beside x, before the host has run: tensors [batch, ...]."""
        return ()

    def forward(self, inner, *args, **kwargs):
        seen = self.look(args, kwargs)
        out = inner(*args, **kwargs)
        h = out[0] if isinstance(out, tuple) else out
        h = self.edit(h, first_input(args, kwargs), *seen, *self.prepared(inner, h.dtype))
        return (h, *out[1:]) if isinstance(out, tuple) else h


def first_input(args: tuple, kwargs: dict[str, Any]) -> Any:
    """The input of a host, which some models pass by name."""
    return args[0] if args else kwargs.get("hidden_states", next(iter(kwargs.values())))


def is_finite(tensors: Iterable[Tensor]) -> bool:
    """Whether no value is NaN or infinite. Either shows in the sum, which may also overflow without them."""
    return all(math.isfinite(t.sum().item()) or bool(torch.isfinite(t).all()) for t in tensors if t.is_floating_point())
