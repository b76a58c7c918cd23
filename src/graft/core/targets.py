"""Targets: which modules of a model a method goes to."""

import difflib
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from .errors import GraftError
from .structure import Node, Tree

PRESETS = {
    "all-linear": "every matrix but embeddings and the output head",
    "attention": "the matrices of the attention; the attention modules; or the modules which end its sub-blocks",
    "mlp": "the matrices of the MLPs, or the modules which end their sub-blocks",
    "qv": "the query and value projections (a fused projection as a whole)",
    "qkv": "the query, key and value projections",
    "blocks": "the modules of the repeated stacks",
    "norms": "the normalisation layers outside the head",
    "embeddings": "the input token embeddings",
    "tokens": "the input token embeddings, and the output head where it is tied to them",
    "head": "the output head or classifier",
    "model": "the model itself",
}

_PRESET = re.compile(rf"(?P<name>{'|'.join(PRESETS)})(?:\[(?P<first>-?\d*):(?P<last>-?\d*)\])?")
_AT_DEPTH = re.compile(r"(?P<pick>.+) in (?P<where>blocks\[-?\d*:-?\d*\])")


class TargetTypeError(GraftError, TypeError):
    """A target is of a kind on which the method cannot work."""


def resolve(model: nn.Module, targets: Any, kinds: Iterable[str] = ("linear",)) -> list[tuple[str, nn.Module]]:
    """The modules of `model` that `targets` picks for a method that works on `kinds`: [(path, module)], in model order.

    targets  a preset, see below
             a regular expression which fits the whole module path or the end of it after a dot ("q_proj",
             r"layers\\.[0-7]\\.mlp\\..*"); modules of other kinds which it also fits are left out
             a list, tuple or set of these: the union
             a function (path, module) -> bool
             "" or "model": the model itself, path ""
    kinds    linear, conv, embedding, norm, module (any module from hidden states to hidden states), attention (the
             owner of the query and value projections), model

    Presets (a preset wins over a module of that name; write "(mlp)" for the module):
        all-linear  every matrix but embeddings and the output head. The head is what lies outside the base model, or
                    the output embeddings; in a model which is not of transformers, what follows the last block
        attention   the matrices inside the attention, the fused or separate projections of queries, keys and values
                    and the output. For kind attention, the modules which own the projections. For kind module alone,
                    the modules after which the output of the attention can be edited before the residual is added:
                    the attention module if its output is the sub-block's (Llama `self_attn`), else the last matrix
                    (BERT `attention.output.dense`, since `attention` adds the residual itself)
        mlp         the same for the MLPs: all other matrices of the blocks that are not part of another token mixer
                    (Mamba). For kind module alone, Llama `mlp`, BERT `output.dense`, OPT `fc2`
        qv, qkv     the projections of queries and values, or of all three; a fused one (`c_attn`, `Wqkv`) as a whole
        blocks      the modules of the repeated stack, one stack each for encoder and decoder; a stage which only holds
                    a stack (Swin) is looked through
        norms       the normalisation layers outside the head
        embeddings  the token embeddings that the inputs run through
        tokens      these, and the output head where its matrix is tied to theirs
        head        the matrices and norms of the output head, or its outermost modules for kind module alone
        model       the model itself
    A part of a preset is written like a slice: "blocks[-3:]" are the last three blocks. Presets and regular expressions
    are held to a depth by such a part of the blocks: "attention in blocks[8:]", r".*\\.down_proj in blocks[:4]".

    A module reachable by several paths is returned once, under its first path; any of its paths may pick it. Modules
    of adapters are not seen. Matrices that cannot be adapted (several experts' in one 3-d parameter; weights which
    their parent reads past the module's forward, as nn.MultiheadAttention does) are left out of presets with a
    warning; picked otherwise, they are refused.

    Raises GraftError (a ValueError) if nothing fits or a pattern is invalid, TargetTypeError (also a TypeError) if what
    fits is of the wrong kind.
    """
    tree, wanted, chosen = Tree(model), set(kinds), set()
    if (
        not isinstance(targets, str)
        and not callable(targets)
        and not isinstance(targets, (list, tuple, set, frozenset))
    ):
        raise TargetTypeError(f"targets are names, regular expressions, a list of them or a function, not {targets!r}")
    for pick in [targets] if isinstance(targets, str) or callable(targets) else targets:
        chosen.update(_picked(tree, pick, wanted))
    if not chosen:
        raise GraftError(f"no targets are given: name a preset ({', '.join(PRESETS)}) or modules of {tree.title}")
    return [(n.path, n.module) for n in tree.nodes if n in chosen]


def is_preset(pick: Any) -> bool:
    """Whether a target is a preset, or a part of one."""
    deep = _AT_DEPTH.fullmatch(pick) if isinstance(pick, str) else None
    return isinstance(pick, str) and _PRESET.fullmatch(deep["pick"] if deep else pick) is not None


def _picked(tree: Tree, pick: Any, kinds: set[str]) -> list[Node]:
    if isinstance(pick, str) and (deep := _AT_DEPTH.fullmatch(pick)):
        blocks = _picked(tree, deep["where"], {"module"})
        found = [n for n in _picked(tree, deep["pick"], kinds) if any(n in block for block in blocks)]
        if not found:
            raise GraftError(f"{_shown(deep['pick'])} picks nothing in {deep['where']} of {tree.title}")
        return found
    if not isinstance(pick, str) or not (preset := _PRESET.fullmatch(pick or "model")):
        return _matching(tree, pick, kinds)
    first, last = (int(n) if n else None for n in (preset["first"], preset["last"]))
    every = _preset(tree, preset["name"], kinds)
    if not every[first:last]:
        raise GraftError(f"{pick!r} is empty: {tree.title} has {len(every)} there")
    return every[first:last]


def _preset(tree: Tree, preset: str, kinds: set[str]) -> list[Node]:
    found = _select(tree, preset, kinds)
    if refused := [n for n in found if n.refused(kinds)]:
        message = f"{preset!r} leaves out {_modules(len(refused))} of {tree.title}: {refused[0].trouble}"
        if len(refused) == len(found):
            raise TargetTypeError(message)
        warnings.warn(message, stacklevel=3)
    if not found:
        raise GraftError(
            f"{tree.title} has nothing for the preset {preset!r} ({PRESETS[preset]}): name modules by path"
        )
    fitting = [n for n in found if n not in refused and n.fits(kinds)]
    if not fitting:
        raise TargetTypeError(
            f"the preset {preset!r} gives {_what(found[0])}; the method works on {' and '.join(sorted(kinds))}"
        )
    return fitting


def _matching(tree: Tree, pick: Any, kinds: set[str]) -> list[Node]:
    if callable(pick):
        found = [n for n in tree.nodes[1:] if any(pick(path, n.module) for path in n.paths)]
    elif isinstance(pick, str):
        fits = matcher(pick)
        found = [n for n in tree.nodes[1:] if any(map(fits, n.paths))]
    else:
        raise TargetTypeError(f"a target is a name, a regular expression or a function, not {pick!r}")
    if not found:
        raise GraftError(f"no module of {tree.title} matches {_shown(pick)}; {_near(tree, pick, kinds)}")
    fitting = [n for n in found if n.fits(kinds)]
    for node in found:
        if node.refused(kinds):
            raise TargetTypeError(node.trouble)
    if not fitting:
        raise TargetTypeError(
            f"{_shown(pick)} picks {_what(found[0])}; the method works on {' and '.join(sorted(kinds))}"
        )
    return fitting


def matcher(pattern: str) -> Callable[[str], Any]:
    """A function that tells whether the regular expression fits a module path or the end of it after a dot."""
    try:
        re.compile(pattern)  # alone, for a pattern such as "a)|(b" becomes another one inside the next
        return re.compile(rf"(?:.*\.)?(?:{pattern})").fullmatch
    except re.error as error:
        raise GraftError(f"{pattern!r} is no regular expression: {error}") from None


def _select(tree: Tree, preset: str, kinds: set[str]) -> list[Node]:
    """What `preset` means for a method that works on `kinds`."""
    if preset == "model":
        return tree.nodes[:1]
    if preset == "blocks":
        return tree.blocks
    if preset == "embeddings":
        return tree.embeddings
    if preset == "tokens":
        tables = {id(n.module.weight) for n in tree.embeddings}
        tied = [n for n in tree.head if n.kind == "linear" and id(n.module.weight) in tables]
        return [*tree.embeddings, *tied]
    head = set(tree.head)
    if preset == "head":
        hosts = [n for n in tree.head if n.kind in ("linear", "conv", "norm", "fused")]
        outermost = (n for n in tree.head if n.parent not in head)
        return hosts if kinds - {"module"} else [n for n in outermost if any(host in n for host in hosts)]
    if preset == "norms":
        return [n for n in tree.nodes if n.kind == "norm" and n not in head]
    if preset == "all-linear":
        return tree.matrices
    if preset in ("qv", "qkv"):
        return [n for n in tree.matrices if n.parent and n.parent.owner and n.roles() & set(preset)]
    plain = kinds & {"linear", "conv"}
    if preset == "attention" and "attention" in kinds and not plain:
        return [n for n in tree.nodes if n.owner and n not in head]
    if preset == "attention":
        part = [n for n in tree.matrices if n.attention]
    else:
        part = [n for n in tree.matrices if n.block and n.kind != "conv" and not n.attention and not n.mixer]
    return tree.ends(part) if "module" in kinds and not plain else part


def _what(node: Node) -> str:
    return f"{node.path or 'the model itself'}, a {node.cls.__name__} (kind {node.kind})"


def _shown(pick: Any) -> str:
    return repr(pick) if isinstance(pick, str) else f"the function {getattr(pick, '__name__', pick)}"


def _near(tree: Tree, pick: Any, kinds: set[str]) -> str:
    """What may have been meant."""
    count = Counter(n.name for n in tree.nodes[1:])
    word = re.sub(r"[^\w-]", "", re.split(r"\\?\.", pick)[-1]) if isinstance(pick, str) else ""
    near = difflib.get_close_matches(word, [*count.keys() - PRESETS.keys(), *PRESETS], cutoff=0.7)
    if near:
        shown = [f"the preset {n!r}" if n in PRESETS else f"{n!r} ({_modules(count[n])})" for n in near]
        return f"did you mean {' or '.join(shown)}?"
    hosts = Counter(n.name for n in tree.nodes[1:] if n.kind in kinds and not n.bypassed)
    names = ", ".join(repr(name) for name, _ in hosts.most_common(8))
    return f"presets are {', '.join(PRESETS)}" + (f"; modules of a fitting kind are called {names}" if names else "")


def _modules(count: int) -> str:
    return f"{count} module{'s' * (count > 1)}"
