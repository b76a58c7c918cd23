"""Writes a trained model into the package as a base: `publish(name, model, processor, card)`."""

import copy
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from graft import GraftError
from graft.bases.card import check, markdown
from graft.core.folder import json_bytes

BASES = Path(__file__).resolve().parents[1] / "src" / "graft" / "bases"
USAGE = """```python
import graft

base = graft.load_base("graft:{name}")  # base.model, base.processor
```
"""


def publish(name: str, model: Any, processor: Any, card: Mapping[str, Any], folder: str | Path = BASES) -> Path:
    """Write checkpoint/ and card.json of a base, and return its folder.

    name       lower-case words joined by "-"; the folder is called the same with "_"
    model      a `PreTrainedModel`: its weights are written as bfloat16 safetensors, and it stays as it is
    processor  its tokenizer or image processor
    card       the facts, see `graft.bases.card.check`; name, version 1, parameters and files need not be among them
    folder     where the folders of the bases are

    What is written is written beside its place and renamed. GraftError, and nothing changed, if the card lacks
    something or a weight is not finite. An older checkpoint is replaced whole; the `__init__.py` of the base, which
    describes it and may hold classes of models, is written by hand.
    """
    facts = {"name": name, "version": 1} | dict(card) | {"parameters": sum(p.numel() for p in model.parameters())}
    check(facts | {"files": {"config.json": "0" * 64}})
    broken = [key for key, value in model.state_dict().items() if not value.isfinite().all()]
    if broken:
        raise GraftError(f"{name}: {broken[0]} holds NaN or infinity")
    place = Path(folder) / name.replace("-", "_")
    place.mkdir(parents=True, exist_ok=True)
    mark = secrets.token_hex(4)
    new, old, described = (place / f".{mark}.{end}" for end in ("new", "old", "json"))
    try:
        half = copy.deepcopy(model).to(torch.bfloat16).cpu()
        half.config._name_or_path = ""
        half.save_pretrained(new)
        processor.save_pretrained(new)
        _understood_by_transformers_4(new)
        front = f"---\nlicense: {facts['licence'].lower()}\nlibrary_name: transformers\n---\n"
        (new / "README.md").write_text(
            f"{front}\n# {name}\n\n{markdown(facts)}\n\n{USAGE.format(name=name)}", encoding="utf-8"
        )
        facts["files"] = {
            file.relative_to(new).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest()
            for file in sorted(new.rglob("*"))
            if file.is_file()
        }
        for file in facts["files"]:
            os.chmod(new / file, 0o644)
        described.write_bytes(json_bytes(facts))
        if (place / "checkpoint").exists():
            os.rename(place / "checkpoint", old)
        try:
            os.rename(new, place / "checkpoint")
        except OSError:
            if old.exists():
                os.rename(old, place / "checkpoint")
            raise
        os.replace(described, place / "card.json")
    finally:
        shutil.rmtree(new, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
        described.unlink(missing_ok=True)
    return place


def _understood_by_transformers_4(folder: Path) -> None:
    """Write what transformers 5 calls otherwise under the names that both know."""
    for name, change in (("config.json", _flat_rope), ("tokenizer_config.json", _plain_tokenizer)):
        if (file := folder / name).exists():
            file.write_bytes(json_bytes(change(json.loads(file.read_text(encoding="utf-8")))))


def _flat_rope(config: dict[str, Any]) -> dict[str, Any]:
    rope = config.get("rope_parameters") or {}
    if rope.get("rope_type", "default") != "default":
        raise GraftError(f"rotary positions of the type {rope['rope_type']!r} have other names in transformers 4")
    return config | ({"rope_theta": rope["rope_theta"]} if "rope_theta" in rope else {})


def _plain_tokenizer(config: dict[str, Any]) -> dict[str, Any]:
    known = {"TokenizersBackend": "PreTrainedTokenizerFast"}
    return config | {"tokenizer_class": known.get(config["tokenizer_class"], config["tokenizer_class"])}
