"""A tiny base of another distribution, published as those of the library are and announced as anyone's are."""

import sys

from models import tokenizer
from publish import publish

CARD = {
    "summary": "A tiny base with random weights.",
    "kind": "causal-lm",
    "licence": "CC0-1.0",
    "data": [{"what": "noise", "licence": "CC0-1.0", "bytes": 1234}],
    "training": {"recipe": "none", "steps": 2, "seconds": 0.5},
    "measured": {"bits per byte": {"this": 3.25, "5-gram": 2.5}},
    "curve": [[0, 4.0, 4.25], [1, 3.0, None], [2, 2.0, 3.5]],
}


def announce(monkeypatch, site, name, model, processor=None, *, code="", **card):
    """Put the package of a base into the folder `site`, from where Python imports, and return its folder."""
    package = publish(name, model, processor or tokenizer(), CARD | card, site)
    (package / "__init__.py").write_text(f'"""A base for tests."""\n{code}', encoding="utf-8")
    info = site / f"{package.name}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package.name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[graft.bases]\n{name} = {package.name}\n")
    sys.modules.pop(package.name, None)
    monkeypatch.syspath_prepend(site)
    return package
