"""What holds for every base that ships."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import safetensors.torch
import torch

from graft import bases
from graft.bases.card import check, markdown

ROOT = Path(__file__).parents[2]
PACKAGES = ROOT / "src" / "graft" / "bases"


@pytest.fixture(params=bases.names())
def base(request):
    return bases.find(request.param)


@pytest.fixture
def installed(base):
    if base.card.get("package") and base.missing():
        pytest.skip(base.missing())
    return base


def test_the_card_is_complete(base):
    check(base.card)
    assert base.summary.endswith(".") and base.doc


def test_the_checkpoint_holds_the_files_of_the_card_and_no_others(base):
    if base.card.get("package"):
        return
    place = base.place / "checkpoint"
    assert {f.relative_to(place).as_posix() for f in place.rglob("*") if f.is_file()} == base.card["files"].keys()
    assert markdown(base.card) in (place / "README.md").read_text(encoding="utf-8")
    tensors = safetensors.torch.load_file(place / "model.safetensors")
    assert {t.dtype for t in tensors.values()} == {torch.bfloat16}
    assert all(t.isfinite().all() for t in tensors.values())


def test_it_loads_whole_with_as_many_parameters_as_the_card_says(installed):
    loaded = bases.load(installed.name)
    assert loaded.name == loaded.model.config._name_or_path == f"graft:{installed.name}"
    assert loaded.heads == [] and loaded.processor is not None
    assert sum(p.numel() for p in loaded.model.parameters()) == installed.card["parameters"]


def test_plain_transformers_opens_it(installed):
    import transformers

    loaded = bases.load(installed.name).model
    if type(loaded).__name__ in installed.models():
        pytest.skip("transformers has no such model")
    same, info = type(loaded).from_pretrained(installed.path(), dtype="auto", output_loading_info=True)
    assert not info["missing_keys"] and same.dtype == loaded.dtype
    whole = same.state_dict()
    assert all(torch.equal(value, whole[key]) for key, value in loaded.state_dict().items())
    auto = transformers.AutoModelForCausalLM if installed.card["kind"] == "causal-lm" else transformers.AutoModel
    part, info = auto.from_pretrained(installed.path(), dtype="auto", output_loading_info=True)
    prefix = "" if type(part) is type(loaded) else f"{loaded.base_model_prefix}."
    read = {f"{prefix}{key}": value for key, value in part.state_dict().items() if key not in info["missing_keys"]}
    assert read and all(torch.equal(value, whole[key]) for key, value in read.items())


def test_all_checkpoints_together_are_small():
    assert sum(f.stat().st_size for f in PACKAGES.glob("*/checkpoint/**/*")) < 40e6


def test_a_wheel_holds_every_card_and_checkpoint(tmp_path):
    pytest.importorskip("setuptools")
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "src", tmp_path / "src", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    program = "from setuptools import build_meta; build_meta.build_wheel('.')"
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    inside = set(zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist())
    files = [*PACKAGES.glob("*/card.json"), *(f for f in PACKAGES.glob("*/checkpoint/**/*") if f.is_file())]
    assert files and {f"graft/bases/{f.relative_to(PACKAGES).as_posix()}" for f in files} <= inside
