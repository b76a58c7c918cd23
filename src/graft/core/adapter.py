"""An adapter: the deltas of one method on one model, under one name."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from .delta import Delta, Fresh
from .errors import GraftError
from .host import base_modules, is_owned
from .rebuild import Rebuilding
from .recipe import ByPath, Recipe
from .registry import check_name, open_registry, registry, unwrapped
from .site import Site, is_quantised, site_for
from .targets import is_preset, resolve

_SHARDED = ("DataParallel", "DistributedDataParallel", "FullyShardedDataParallel", "FSDPModule", "DeepSpeedEngine")


def attach(
    model: nn.Module,
    method: Any,
    targets: Any = None,
    *,
    name: str = "default",
    heads: Any = (),
    seed: int = 0,
    stats: dict[str, dict] | None = None,
    dtype: torch.dtype | None = None,
    **hyper: Any,
) -> "Adapter":
    """Put a new adapter on `model` and freeze the base.

    method   graft.LoRA(rank=8), or a name with its hyperparameters as keywords: attach(model, "lora", rank=8)
    targets  a preset ("all-linear", "attention", "mlp", "qv", "blocks", ...), a regular expression over module paths,
             a list of them, or a function (path, module) -> bool; the method's own default if left out
    heads    modules that are trained whole beside the method and saved with the adapter (a new classifier)
    seed     of the random initial values; it is saved
    stats    what `graft.collect` measured, for methods that need it
    dtype    of the adapter's tensors: float32, or float64 on a float64 base, unless given
    """
    adapter = Adapter(
        model, Recipe.of(method, **hyper), targets, name, heads=heads, seed=seed, stats=stats, dtype=dtype
    )
    adapter.attach()
    return adapter


class Adapter:
    """The deltas of one method on one model. Made by `attach`; then save, switch off, freeze, step, detach.

    `saved` are the tensors of a file, as `state_dict` gives them, when an adapter is built to take them; targets and
    heads are then the very paths.
    """

    shared: nn.Module | None  # what the deltas use together

    def __init__(
        self, model, recipe: Recipe, targets, name="default", *, heads=(), seed=0, stats=None, dtype=None, saved=None
    ):
        check_name(name)
        if isinstance(model, torch.jit.ScriptModule):
            raise GraftError("a scripted model cannot be adapted: attach to the model before torch.jit.script")
        cls, model = recipe.method, unwrapped(model)
        if wrapper := next((c.__name__ for c in type(model).__mro__ if c.__name__ in _SHARDED), None):
            raise GraftError(f"the model is wrapped by {wrapper} already: attach or load adapters before wrapping it")
        self.model, self.name, self.seed = model, name, seed
        self.task: dict[str, Any] = {}  # what it was trained for, as JSON; saved with it
        self.targets = cls.targets if targets is None else targets
        self.heads = self._picked(heads, HEADS, saved) if heads else []
        sites = self._sites(recipe, self.targets, stats, saved)
        resolved = {s.path: recipe.at(s) for s in sites}
        if saved is None:
            with _seeded(seed):
                resolved = cls.plan(sites, resolved)
            sites = _numbered([s for s in sites if s.path in resolved])

        def build() -> dict[str, Delta]:
            shared = cls.share(sites, **resolved[sites[0].path])
            self.shared = None if shared is None else self._place(shared, sites[0], dtype)
            given = {} if self.shared is None else {"shared": self.shared}
            return {s.path: cls(s, **given, **resolved[s.path]) for s in sites}

        made: dict[str, Delta] = {}
        if saved is not None:
            with _seeded(seed), Rebuilding(saved, model, spare=True) as mode:
                made = build()
            whole = [*made.items(), *([] if self.shared is None else [("*", self.shared)])]
            names = (f"{path}:{n}" for path, m in whole for n, _ in (*m.named_parameters(), *m.named_buffers()))
            if mode.spared and not all(name in saved for name in names):
                made = {}  # some of its tensors are drawn from the seed
        if not made:
            limits = nullcontext() if saved is None else Rebuilding(saved, model, spare=False)
            with _seeded(seed), limits:
                made = build()
        self.deltas = {s.path: self._place(made[s.path], s, dtype) for s in sites}
        for path, module in self.heads:
            own = None if saved is None else tensors_by_path(saved).get(path, {})
            site = site_for(path, module, HEADS, saved=own, head=True)
            _check_codes(_full(), site)
            self.deltas[path] = self._place(_full()(site), site, dtype)
            sites.append(site)
        for site in sites:
            site.stats, site.saved = {}, None  # used up; they can be large
        for part in (m for d in self.deltas.values() for m in d.modules() if isinstance(m, Delta)):
            part.site.stats, part.site.saved = {}, None
        # What a function of the site, a pattern or a plan gave is kept by path: a function cannot be saved.
        self.recipe = Recipe(
            cls,
            {
                k: v if all(h[k] is v for h in resolved.values()) else ByPath({p: h[k] for p, h in resolved.items()})
                for k, v in recipe.hyper.items()
            },
        )

    def _sites(self, recipe: Recipe, targets, stats, saved) -> list[Site]:
        cls = recipe.method
        picked = self._picked(targets, cls.hosts, saved)
        if saved is None:
            places = (place for path, module in picked for place in cls.places(self.model, path, module))
            picked = list(dict(places).items())
        own = None if saved is None else tensors_by_path(saved)
        sites = [
            site_for(
                path,
                module,
                cls.hosts,
                index=i,
                count=len(picked),
                stats=(stats or {}).get(path),
                saved=None if own is None else own.get(path, {}),
            )
            for i, (path, module) in enumerate(picked)
        ]
        for site in sites:
            if site.kind not in cls.hosts:
                raise GraftError(
                    f"{cls.name} works on {', '.join(cls.hosts)}; {site.path or 'the model'} is a {site.kind} "
                    f"({type(site.module).__name__})"
                )
            _check_codes(cls, site)
            missing = [need for need in cls.asks(recipe.at(site)) if need not in site.stats]
            if missing and site.saved is None:
                raise GraftError(
                    f"{recipe} needs the statistic {missing[0]} at {site.path or 'the model'}: "
                    f"pass stats=graft.collect(model, data, needs={missing!r}, targets=...)"
                )
        inside = {
            id(m): f"it belongs to the head {path}, which is trained whole"
            for path, head in self.heads
            for m in head.modules()
        }
        reasons = {s.path: inside.get(id(s.module)) or cls.refuses(s) for s in sites}
        refused = {path: reason for path, reason in reasons.items() if reason}
        if refused and (len(refused) == len(sites) or not all_presets(targets)):
            path, reason = next(iter(refused.items()))
            raise GraftError(f"{cls.name} cannot work at {path or 'the model'}: {reason}")
        return _numbered([s for s in sites if s.path not in refused])

    def _picked(self, targets, hosts, saved) -> list[tuple[str, nn.Module]]:
        if saved is None:
            return resolve(self.model, targets, hosts)
        modules = base_modules(self.model)
        return [(path, modules[path]) for path in targets]

    @staticmethod
    def _place(module: Any, site: Site, dtype: torch.dtype | None) -> Any:
        where = site.where()
        wide = dtype or (torch.float64 if where.dtype == torch.float64 else torch.float32)
        if not is_owned(module):
            module.graft_owned = True
        if not site.module.training:
            module.train(False)
        tensors = (t for m in module.modules() for own in (m._parameters, m._buffers) for t in own.values())
        placed = all(
            t is None or (t.device == where.device and (t.dtype == wide or not t.is_floating_point())) for t in tensors
        )
        return module if placed else module.to(where.device, wide)

    # Life on the model

    @property
    def attached(self) -> bool:
        found = registry(self.model)
        return found is not None and found.adapters.get(self.name) is self

    def attach(self) -> None:
        """Put the deltas on the model, outside those already there, and freeze the base."""
        model, found = self.model, registry(self.model)
        if found and self.name in found.adapters:
            raise GraftError(f"the model has an adapter called {self.name!r} already: detach it or choose another name")
        found = open_registry(model)
        found.check_unmerged()
        done = []
        try:
            for delta in self.deltas.values():
                found.mount(self.name, delta)
                done.append(delta)
            found.adapters[self.name] = self
            found.activate((*found.active, self.name))
        except Exception:
            found.adapters[self.name] = self
            found.active = tuple(n for n in found.active if n != self.name)
            self._leave(done)
            raise
        if self.shared is not None:
            self._keeper()[f"*{self.name}"] = self.shared

    def detach(self) -> None:
        """Take the deltas off; the last adapter to leave restores the base with all its attributes and flags.

        Refused while a merge is in place: undo it, or keep it, which takes the adapters off.
        """
        if not self.attached:
            raise GraftError(f"adapter {self.name!r} is not on the model")
        found = registry(self.model)
        assert found
        found.check_idle(self.name)
        found.activate(n for n in found.active if n != self.name)
        if self.shared is not None:
            del self._keeper()[f"*{self.name}"]
        self._leave(self.deltas.values())

    def _keeper(self) -> Any:
        """Where the shared module is registered: beside the first delta, for the model may be a container."""
        return next(iter(self.deltas.values())).site.module.deltas

    def _leave(self, deltas: Iterable[Delta]) -> None:
        found = registry(self.model)
        assert found
        for delta in deltas:
            found.unmount(self.name, delta)
        del found.adapters[self.name]
        found.close_if_empty()

    @property
    def active(self) -> bool:
        found = registry(self.model)
        return found is not None and self.name in found.active

    def enable(self) -> None:
        """Run with the model again, at its place in the chain: where it was attached, or `activate` put it."""
        found = registry(self.model)
        if found is None or not self.attached:
            raise GraftError(f"adapter {self.name!r} is not on the model")
        found.activate(n for n in found.adapters if n in (*found.active, self.name))

    def disable(self) -> None:
        """Stay on the model without effect."""
        found = registry(self.model)
        if found:
            found.activate(n for n in found.active if n != self.name)

    @contextmanager
    def disabled(self) -> Iterator[nn.Module]:
        """The model without this adapter, for the duration of the context."""
        before = self.active
        self.disable()
        try:
            yield self.model
        finally:
            if before:
                self.enable()

    # Tensors

    def modules(self) -> dict[str, nn.Module]:
        """The parts that own tensors: the deltas by path, and "*" for what they share."""
        return {**self.deltas} if self.shared is None else {**self.deltas, "*": self.shared}

    def parameters(self) -> list[nn.Parameter]:
        """All parameters, trained or frozen, each once."""
        return list({id(p): p for m in self.modules().values() for p in m.parameters()}.values())

    def ups(self) -> list[nn.Parameter]:
        """The trained factors that lead to outputs (B of B A), which LoRA+ trains faster than the others."""
        inside = dict.fromkeys(m for own in self.modules().values() for m in own.modules())
        return [p for m in inside for name in getattr(m, "ups", ()) if (p := m._parameters.get(name)) is not None]

    @property
    def dtype(self) -> torch.dtype:
        """Of the tensors of the method itself, without those of heads."""
        own = [m for path, m in self.modules().items() if path not in dict(self.heads)]
        return next((t.dtype for m in own for t in m.state_dict().values() if t.is_floating_point()), torch.float32)

    def requires_grad_(self, flag: bool = True) -> "Adapter":
        """Train (True) or freeze (False) this adapter."""
        for p in self.parameters():
            p.requires_grad_(flag)
        return self

    def state_dict(self) -> dict[str, Tensor]:
        """{"path:tensor": value}; "*:tensor" for what the sites share."""
        return {f"{path}:{k}": v for path, m in self.modules().items() for k, v in m.state_dict().items()}

    def packed(self) -> dict[str, Tensor]:
        """`state_dict` as our own files hold it."""
        own = {p: m.packed() if isinstance(m, Delta) else m.state_dict() for p, m in self.modules().items()}
        return {f"{path}:{k}": v for path, tensors in own.items() for k, v in tensors.items()}

    def load_state_dict(self, state: dict[str, Tensor], assign: bool = False) -> None:
        """Copy values in; names and shapes must be those of `state_dict`, otherwise nothing is changed.

        With `assign` tensors that have the right type and device already become the adapter's own, without a copy.
        """
        own = self.state_dict()
        if lacking := sorted(own.keys() - state.keys()):
            raise GraftError(f"{len(lacking)} tensors of the adapter are missing, among them {lacking[0]}")
        if extra := sorted(state.keys() - own.keys()):
            raise GraftError(f"{len(extra)} tensors do not belong to the adapter, among them {extra[0]}")
        for key, value in state.items():
            if value.shape != own[key].shape:
                raise GraftError(
                    f"{key} has shape {tuple(value.shape)}, the model needs {tuple(own[key].shape)}: another base?"
                )
            if value.is_floating_point() != own[key].is_floating_point():
                raise GraftError(f"{key} is of type {value.dtype}, the adapter's is of {own[key].dtype}")
        if assign:
            for path, values in tensors_by_path(
                {k: v.to(own[k].device, own[k].dtype) for k, v in state.items()}
            ).items():
                self.modules()[path].load_state_dict(values, assign=True)
        else:
            with torch.no_grad():
                for key, value in state.items():
                    own[key].copy_(value)
        for delta in self.deltas.values():
            delta.loaded()

    def step(self, progress: float) -> Fresh:
        """Follow the method's schedule: after backward, before the optimiser's step; progress in [0, 1].

        What comes back are parameters whose state in the optimiser is to be dropped before that step, each with a mask
        of the entries or None for all: `graft.training.optimizers.forget(optimizer, adapter.step(progress))`.
        """
        return self.recipe.method.step(self._own(), progress) or {}

    def aside(self, count: int) -> int:
        """How many of `count` training examples a run keeps from training, for `review`."""
        return self.recipe.method.aside(self._own(), count)

    def review(self, progress: float, trial: Any) -> Fresh:
        """Let the method compare losses before `step`, see `Delta.review`; what comes back is as there."""
        return self.recipe.method.review(self._own(), progress, trial) or {}

    def penalty(self) -> Tensor | None:
        """A scalar to add to the loss, if the method has one."""
        return self.recipe.method.penalty(self._own())

    def _own(self) -> list[Delta]:
        return [d for d in self.deltas.values() if type(d) is self.recipe.method]

    # Files

    def save(self, folder, **options) -> None:
        """Write the adapter as a folder; see files.save_adapter. `graft.save` writes several as one."""
        from .files import save_adapter

        save_adapter(self, folder, **options)

    def __repr__(self):
        count = sum(p.numel() for p in self.parameters())
        return f"Adapter({self.name!r}, {self.recipe}, {len(self.deltas)} sites, {count:,} parameters)"


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(seed)
        yield


def _numbered(sites: list[Site]) -> list[Site]:
    for i, site in enumerate(sites):
        site.index, site.count = i, len(sites)
    return sites


def tensors_by_path(state: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """{"path:tensor": value} as {path: {tensor: value}}."""
    found: dict[str, dict[str, Tensor]] = {}
    for key, value in state.items():
        path, _, tensor = key.rpartition(":")
        found.setdefault(path, {})[tensor] = value
    return found


def _check_codes(method: type[Delta], site: Site) -> None:
    """Refuse to train codes, also where a preset picked the site: without it the method would be another one."""
    if method.on_codes or not any(map(is_quantised, base_modules(site.module).values())):
        return
    weight = "its weight" if is_quantised(site.module) else "a weight in it"
    raise GraftError(f"{method.name} cannot work at {site.path or 'the model'}: {weight} is quantised")


HEADS = ("linear", "conv", "embedding", "norm", "module")


def all_presets(targets) -> bool:
    picks = [targets] if isinstance(targets, str) else targets
    return not callable(picks) and all(map(is_preset, picks))


def _full() -> type[Delta]:
    from .recipe import method

    return method("full")
