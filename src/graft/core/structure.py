"""The structure of a model: its repeated blocks, attentions, MLPs, head and embeddings, told without a table of models.

Only the projections of an attention, and the word itself, are known by name.
"""

import dis
import functools
import inspect
import re
from collections import defaultdict
from itertools import accumulate
from typing import Any

from torch import backends, nn

from .site import is_quantised, kind_of, site_for

_ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)
_ROLES = {"query": "q", "queries": "q", "key": "k", "keys": "k", "value": "v", "values": "v"}
_SHAPELY = {"dtype", "device", "shape", "size", "dim", "ndim", "numel", "requires_grad", "is_floating_point"}


class Node:
    """A module in the tree; `end` is the index after its last descendant."""

    block: "Node | None" = None  # the block that holds it
    attention = mixer = False  # whether it is part of an attention, or of another token mixer

    def __init__(self, module: nn.Module, path: str, parent: "Node | None", index: int):
        self.module: Any = module
        self.paths, self.name, self.parent = [path], path.rpartition(".")[2], parent
        self.index, self.end = index, index + 1
        self.cls = getattr(type(module), "host_class", type(module))  # without the deltas it may carry
        self.children: list[Node] = []
        self.kind = kind_of(module) if module._parameters or module._buffers or is_quantised(module) else "module"

    def __contains__(self, node: "Node") -> bool:
        return self.index <= node.index < self.end

    path = property(lambda self: self.paths[0])
    runs = property(lambda self: self.cls.forward is not nn.Module.forward)  # a ModuleList does not

    @property
    def bypassed(self) -> bool:
        """Whether the parent uses the weight without calling the module, so that a delta would have no effect."""
        parent = self.parent
        if parent is None or self.kind not in ("linear", "conv", "norm") or not _reads_weight(parent.cls, self.name):
            return False
        if isinstance(parent.module, nn.TransformerEncoderLayer):  # only on its fast path
            return parent.module.self_attn.batch_first and backends.mha.get_fastpath_enabled()
        return True

    @property
    def trouble(self) -> str:
        if self.kind == "fused":
            return (
                f"{self.path} ({self.cls.__name__}) keeps several matrices, such as those of experts, in one 3-d "
                f"parameter, which no delta of a matrix can adapt: choose the other matrices, or the MLP as a module"
            )
        parent = self.parent.cls.__name__ if self.parent else ""
        off = "torch.backends.mha.set_fastpath_enabled(False), " if parent == "TransformerEncoderLayer" else ""
        return (
            f"the weight of {self.path} is read directly by its {parent}, past forward, so a delta there would be "
            f"bypassed: choose {off}other matrices, or the {parent} as a module"
        )

    def roles(self) -> frozenset[str]:
        """Which of q, k and v the projection computes, by its name."""
        if self.name == "in_proj" and self.parent:
            return frozenset("qkv" if _ATTENTION.search(f"{self.parent.name} {self.parent.cls.__name__}") else "")
        return _roles(self.name)

    @functools.cached_property
    def owner(self) -> bool:
        """Whether this is the module that computes an attention: it owns the query and value projections."""
        return {"q", "v"} <= {r for n in self.children if n.kind in ("linear", "conv") for r in n.roles()}

    def fits(self, kinds: set[str]) -> bool:
        """Whether the module is of one of the `kinds`."""
        if ("attention" in kinds and self.owner) or ("model" in kinds and self.parent is None):
            return True
        if "module" in kinds and self.kind != "fused":
            return self.runs
        return self.kind in kinds

    def refused(self, kinds: set[str]) -> bool:
        """Whether it looks right and would go wrong; `trouble` tells why."""
        return (self.kind == "fused" and "linear" in kinds) or (self.bypassed and self.fits(kinds))


class Tree:
    """All modules of a model but those of adapters, each once, parents before children."""

    def __init__(self, model: nn.Module):
        self.nodes: list[Node] = []
        self.of: dict[int, Node] = {}
        self.title = getattr(model, "host_class", type(model)).__name__
        self._add(model, "", None, set())

    def _add(self, module: nn.Module, path: str, parent: Node | None, above: set[int]) -> None:
        if getattr(type(module), "graft_owned", False) or "graft_owned" in module.__dict__ or id(module) in above:
            return
        node = self.of.get(id(module))
        if node is None:
            node = self.of[id(module)] = Node(module, path, parent, len(self.nodes))
            self.nodes.append(node)
            if parent:
                parent.children.append(node)
        else:
            node.paths.append(path)
        for name, child in module._modules.items():
            if child is not None:
                self._add(child, f"{path}.{name}" if path else name, node, above | {id(module)})
        if node.path == path:
            node.end = len(self.nodes)

    @functools.cached_property
    def blocks(self) -> list[Node]:
        """The modules of the innermost stacks with attention inside; without any, those with two matrices or more."""
        matrices = [0, *accumulate(n.kind in ("linear", "conv", "fused") for n in self.nodes)]
        attends = [0, *accumulate(n.owner or isinstance(n.module, nn.MultiheadAttention) for n in self.nodes)]

        def most(counts, stack):  # strictly inside one of its blocks
            return max(counts[n.end] - counts[n.index + 1] for n in stack.children)

        def repeats(stack):
            classes = [n.cls for n in stack.children]
            alike = 0 < len(set(classes)) < max(len(classes), 2)  # some class twice, as in hybrid models, or one module
            usable = all(n.runs and n.kind == "module" and matrices[n.end] > matrices[n.index] for n in stack.children)
            return alike and usable

        stacks = [n for n in self.nodes if isinstance(n.module, (nn.ModuleList, nn.Sequential)) and repeats(n)]
        chosen = [s for s in stacks if most(attends, s)] or [s for s in stacks if most(matrices, s) > 1] or stacks
        outer = {s for s in chosen for t in chosen if s.index < t.index < s.end}
        return [n for s in chosen if s not in outer for n in s.children]

    @functools.cached_property
    def head(self) -> list[Node]:
        """What turns hidden states into the model's answer: outside the base model, or after the last block."""
        model = self.nodes[0].module
        base, output = self.of.get(id(getattr(model, "base_model", None))), self._asked("get_output_embeddings")
        head = [n for n in self.nodes if n is output or (base and base.index and n.index and n not in base)]
        whole = base and not re.search("For[A-Z]", self.title)  # a base model of transformers, which has no head
        if head or whole or not self.blocks:
            return head
        behind = self.nodes[max(n.end for n in self.blocks) :]
        return behind[next((i for i, n in enumerate(behind) if n.kind in ("linear", "conv")), len(behind)) :]

    @functools.cached_property
    def embeddings(self) -> list[Node]:
        """The token embeddings that run: of tied ones those inside encoder and decoder, not the one above (T5)."""
        tables = [n for n in self.nodes if n.kind == "embedding"]
        asked = self._asked("get_input_embeddings")
        if asked not in tables:
            return [n for n in tables if not re.search(r"pos|type|segment|wpe|relative", n.name)]
        tied = [n for n in tables if n.module.weight is asked.module.weight]
        homes = [n.parent for n in tied if n.parent]
        return [n for n in tied if not any(n.parent and n.parent is not home and home in n.parent for home in homes)]

    def _asked(self, question: str) -> Node | None:
        try:
            return self.of.get(id(getattr(self.nodes[0].module, question)()))
        except (AttributeError, NotImplementedError):
            return None

    @functools.cached_property
    def matrices(self) -> list[Node]:
        """All matrices outside the head, fused ones included, marked with the part of the block they belong to."""
        blocks, head = set(self.blocks or self.nodes[:1]), set(self.head)
        for n in self.nodes:  # parents first
            if n in blocks:
                n.block, n.attention = n, n.owner
            elif n.parent:
                n.block = n.parent.block
                n.attention = n.parent.attention or n.owner or bool(_ATTENTION.search(n.name))
                n.mixer = n.parent.mixer or _mixes(n)
        return [n for n in self.nodes if n.kind in ("linear", "conv", "fused") and n not in head]

    def ends(self, part: list[Node]) -> list[Node]:
        """The modules whose outputs are those of the sub-blocks that the matrices `part` make up."""
        groups: dict[tuple, list[Node]] = defaultdict(list)
        for n in part:
            top = step = n
            while step.parent and step is not n.block and step.parent is not n.block:
                step = step.parent
                top = step if step.runs else top
            groups[n.block, top].append(n)
        for (block, top), group in list(groups.items()):
            if len(group) == 1 and group[0].kind != "fused":  # BERT's `intermediate` and `output`
                groups[block, None] += groups.pop((block, top))
        return [self._end(top, group) for (_, top), group in groups.items()]

    def _end(self, top: Node | None, group: list[Node]) -> Node:
        last = ([n for n in group if not (n.attention and n.roles())] or group)[-1]
        if top is None:
            return last
        home = group[0]
        while home is not top and (home in group or not home.runs or not all(n in home for n in group)):
            home = home.parent or top
        if home in group or last.kind == "fused":
            return home
        width = site_for(last.path, last.module, (last.kind,)).d_out
        inside = self.nodes[home.index : home.end]
        normed = any(n.kind == "norm" and len(n.module.weight) == width for n in inside)  # after adding the residual
        takes_residual = {"residual", "input_tensor"} & {*inspect.signature(home.cls.forward).parameters}
        return last if normed or takes_residual else home


@functools.cache
def _roles(name: str) -> frozenset[str]:
    name = name.lower()
    if name == "c_attn":
        return frozenset("qkv")
    parts = (re.fullmatch(r"w?([qkv]+)z?", _ROLES.get(part, part)) for part in name.split("_"))
    return frozenset(role for part in parts if part for role in part[1])


def _mixes(node: Node) -> bool:
    """Whether a module mixes tokens by other means than attention: by own parameters or a depthwise convolution."""
    convs = [n.module for n in node.children if n.kind == "conv"]
    depthwise = any(1 < c.groups == c.in_channels for c in convs)
    own = {k for k, p in node.module._parameters.items() if p is not None} - {"weight", "bias"}
    return bool(own or depthwise) and any(n.kind == "linear" for n in node.children)


@functools.cache
def _reads_weight(cls: type, child: str) -> bool:
    """Whether a method of `cls` uses the weight of its `child` as a tensor, seen in the bytecode."""
    methods = {name: f for c in reversed(cls.__mro__) if c is not nn.Module for name, f in vars(c).items()}
    for name, method in methods.items():
        code = inspect.unwrap(method).__code__ if inspect.isfunction(method) else None
        if code is None or not {child, "weight"} <= {*code.co_names} or re.search("init|reset|tie", name):
            continue
        if "pretraining_tp" in code.co_names:  # a branch that only imitates the rounding of a split weight
            continue
        steps = [i.argval for i in dis.get_instructions(code)]
        for before, *read, use in zip(steps, steps[1:], steps[2:], steps[3:], steps[4:]):
            if read == ["self", child, "weight"] and before != "isinstance" and use not in _SHAPELY:
                return True
    return False
