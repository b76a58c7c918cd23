"""Make the corpus of the language models: `python bases/corpus.py FOLDER`.

Text that any machine holds that has Python and the packages of constraints.txt, under licences that allow it:

    prose      docstrings of installed packages, their README texts, and the language reference that `help()` shows
    code       functions and classes of the same packages without docstrings, and of the standard library's tests,
               tools and user interfaces
    generated  short exercises (generated.py)

The tasks of the proving ground are made of the standard library's documented modules. No file of these modules is in
the corpus, and neither is a text that shares more than a tenth of its long lines with one of them (copies and
backports). What others write about them stays: the language reference describes the built-in types in other words than
their docstrings, and the tests of the standard library call its functions. A text that stands twice is kept once.

Every hundredth file of a package goes to validation.jsonl, every other hundredth to test.jsonl, all others to
train.jsonl: one {"kind", "source", "text"} a line. manifest.json lists what each source gave, its version and its
licence, and the SHA-256 of the three files.
"""

import ast
import hashlib
import importlib.metadata
import json
import re
import sys
import sysconfig
import textwrap
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import generated
from graft.tasks import chapters

PACKAGES = [
    "accelerate",
    "anyio",
    "click",
    "datasets",
    "filelock",
    "fonttools",
    "fsspec",
    "Jinja2",
    "joblib",
    "lycoris_lora",
    "Markdown",
    "markdown-it-py",
    "matplotlib",
    "mpmath",
    "networkx",
    "numpy",
    "packaging",
    "pandas",
    "peft",
    "pillow",
    "pluggy",
    "psutil",
    "pydantic",
    "Pygments",
    "pyparsing",
    "pytest",
    "python-dateutil",
    "pytorch_optimizer",
    "regex",
    "rich",
    "safetensors",
    "scikit-learn",
    "scipy",
    "sortedcontainers",
    "sympy",
    "tensorboard",
    "tokenizers",
    "torch",
    "transformers",
    "typer",
    "huggingface_hub",
    "httpx2",
    "narwhals",
    "Werkzeug",
]

# The standard library beside what the tasks read: tests, tools, user interfaces.
LIBRARY = [
    "test",
    "idlelib",
    "tkinter",
    "lib2to3",
    "turtledemo",
    "turtle.py",
    "pydoc_data/topics.py",
    "distutils",
    "ctypes/test",
    "unittest/test",
]

FREE = ("Python", "PSF", "BSD", "MIT", "Apache", "HPND", "ISC", "3-Clause")
COPIES = re.compile(r"(^|/)(_?vendor(ed)?|externals?|_distutils|_backport\w*|extern|site-packages/test)(/|$)")
SPLITS = ("train", "validation", "test")
SHORTEST, LONGEST = 60, 6000  # characters of a text
SHARE = {"prose": 30e6, "code": 16e6, "generated": 4e6}  # characters of train, at most


class Text(NamedTuple):
    kind: str  # prose, code or generated
    source: str  # the package
    file: str
    text: str


def package_files(name: str) -> Iterator[tuple[str, Path]]:
    """(path below site-packages, file) of the package's Python files, without the copies of others in it."""
    for file in sorted(importlib.metadata.files(name) or [], key=str):
        path = Path(str(file.locate()))
        if path.suffix == ".py" and not COPIES.search(str(file)) and path.is_file():
            yield str(file), path


def library_files() -> Iterator[tuple[str, Path]]:
    root = Path(sysconfig.get_path("stdlib"))
    for top in LIBRARY:
        found = [root / top] if top.endswith(".py") else sorted((root / top).rglob("*.py"))
        for path in found:
            if path.is_file():
                yield path.relative_to(root).as_posix(), path


def texts_of(kind_of_source: str, file: str, source: str) -> Iterator[Text]:
    """Docstrings as prose, functions and classes without them as code."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            said = ast.get_docstring(node)
            if said:
                yield Text("prose", kind_of_source, file, said)
    lines = re.split("\r?\n", source)
    for node in tree.body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            members = [n for n in node.body if isinstance(n, ast.FunctionDef)] if isinstance(node, ast.ClassDef) else []
            for part in members or [node]:
                yield Text("code", kind_of_source, file, without_docstrings(part, lines))


def without_docstrings(node: ast.AST, lines: list[str]) -> str:
    """The source of a function or class without the docstrings in it."""
    first = min([node.lineno, *(d.lineno for d in node.decorator_list)])  # type: ignore[attr-defined]
    kept = dict(enumerate(lines[first - 1 : node.end_lineno], first))  # type: ignore[attr-defined]
    for inner in ast.walk(node):
        if isinstance(inner, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and ast.get_docstring(inner):
            said = inner.body[0]
            if said.lineno > inner.lineno and len(inner.body) > 1 and inner.body[1].lineno > (said.end_lineno or 0):
                for line in range(said.lineno, (said.end_lineno or 0) + 1):
                    kept.pop(line, None)
    return textwrap.dedent("\n".join(kept.values())) + "\n"


def readme(name: str) -> str:
    """The long description of a package, without badges, links' targets and markup."""
    text = importlib.metadata.metadata(name).get_payload() or importlib.metadata.metadata(name)["Description"] or ""
    text = re.sub(r"<[^<>]*>|!\[[^\]]*\]\([^)]*\)|^\.\. .*$|^\s*:\w+:.*$", "", text, flags=re.M)
    return re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", text)


def long_lines(text: str) -> list[str]:
    return [line for line in (" ".join(line.split()) for line in text.split("\n")) if len(line) >= 30]


def copied(text: str, taken: set[str]) -> bool:
    """Whether more than a tenth of its long lines are among those that the tasks are made of."""
    lines = long_lines(text)
    return sum(line in taken for line in lines) > 0.1 * len(lines)


def licence(name: str) -> str:
    said = importlib.metadata.metadata(name)
    classifiers = [c.split(" :: ")[-1] for c in said.get_all("Classifier") or [] if c.startswith("License")]
    found = said["License-Expression"] or ", ".join(classifiers) or (said["License"] or "").split("\n")[0]
    if not any(free in found for free in FREE):
        raise SystemExit(f"{name}: the licence {found!r} is not among those that the corpus takes")
    return found


def everything() -> Iterator[Text]:
    """All texts, unfiltered."""
    for file, path in library_files():
        if file.startswith("pydoc_data/"):
            for topic in vars_of(path).values():
                yield from (Text("prose", "python", f"{file}", part) for part in pieces(topic))
        else:
            yield from texts_of("python", file, path.read_bytes().decode("utf-8", errors="replace"))
    for name in PACKAGES:
        yield from (Text("prose", name, f"{name}/README", part) for part in pieces(readme(name)))
        for file, path in package_files(name):
            yield from texts_of(name, file, path.read_bytes().decode("utf-8", errors="replace"))


def vars_of(path: Path) -> dict[str, str]:
    """The dictionary of texts that a file of literals assigns."""
    found = next(n for n in ast.parse(path.read_text("utf-8")).body if isinstance(n, ast.Assign))
    return ast.literal_eval(found.value)


def pieces(text: str) -> Iterator[str]:
    """A long text in parts of whole paragraphs."""
    part = ""
    for paragraph in text.split("\n\n"):
        if part and len(part) + len(paragraph) > LONGEST // 2:
            yield part
            part = ""
        part += paragraph.strip("\n") + "\n\n"
    yield part


def split_of(file: str) -> str:
    share = int(hashlib.sha256(file.encode()).hexdigest()[:8], 16) % 100
    return {0: "validation", 1: "test"}.get(share, "train")


def build(folder: Path) -> dict:
    """Write the corpus; the manifest."""
    taken = {line for _, source in chapters.sources() for line in long_lines(source.decode("utf-8", errors="replace"))}
    seen: set[str] = set()
    kept: dict[str, dict[str, list[Text]]] = {split: defaultdict(list) for split in SPLITS}
    for found in everything():
        text = found.text.strip()[:LONGEST] + "\n"
        words = hashlib.sha256(" ".join(text.split()).encode()).hexdigest()
        printable = sum(map(str.isascii, text)) > 0.95 * len(text)
        if len(text) < SHORTEST or words in seen or not printable or copied(text, taken):
            continue
        seen.add(words)
        kept[split_of(found.file)][found.kind].append(found._replace(text=text))
    for split in SPLITS:
        room = SHARE["generated"] * (1 if split == "train" else 0.01)
        kept[split]["generated"] = [Text("generated", "generated", "", t) for t in generated.texts(split, room)]
    sources: dict[str, dict] = {}
    folder.mkdir(parents=True, exist_ok=True)
    digests = {}
    for split in SPLITS:
        rows = []
        for kind, texts in sorted(kept[split].items()):
            order = sorted(texts, key=lambda t: hashlib.sha256(t.text.encode()).digest())
            room = SHARE[kind] if split == "train" else float("inf")
            for found in order:
                if (room := room - len(found.text)) < 0:
                    break
                rows.append(found)
                counts = sources.setdefault(found.source, {}).setdefault(split, {})
                counts[kind] = counts.get(kind, 0) + len(found.text)
        rows.sort(key=lambda t: hashlib.sha256((split + t.text).encode()).digest())
        data = "".join(json.dumps({"kind": t.kind, "source": t.source, "text": t.text}) + "\n" for t in rows).encode()
        (folder / f"{split}.jsonl").write_bytes(data)
        digests[split] = hashlib.sha256(data).hexdigest()
    for name, counts in sources.items():
        if name == "python":
            counts |= {"version": sys.version.split()[0], "licence": "PSF-2.0"}
        elif name == "generated":
            counts |= {"version": "1", "licence": "CC0-1.0"}
        else:
            counts |= {"version": importlib.metadata.version(name), "licence": licence(name)}
    manifest = {"sha256": digests, "sources": dict(sorted(sources.items(), key=lambda item: item[0].lower()))}
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
    return manifest


if __name__ == "__main__":
    made = build(Path(sys.argv[1]))
    for kind in SHARE:
        print(kind, {s: sum(c.get(s, {}).get(kind, 0) for c in made["sources"].values()) for s in SPLITS})
    print(made["sha256"])
