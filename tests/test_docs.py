"""The documentation stays true: generated pages are current, links between pages lead somewhere."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NAMES = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "bases/README.md")
PAGES = [*(ROOT / name for name in NAMES), *sorted((ROOT / "docs").glob("*.md"))]


def test_generated_pages_are_current():
    done = subprocess.run([sys.executable, ROOT / "docs/generate.py", "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_catalogue_gives_measured_costs_their_class():
    page = (ROOT / "docs/catalogue.md").read_text(encoding="utf-8")
    shown = {m[1]: m[2].split(" | ")[-3:] for m in re.finditer(r"^\| \[(\w+)\]\(#\1\) \| (.*) \|$", page, re.MULTILINE)}
    rows = {row["method"]: row for row in json.loads((ROOT / "benchmarks/catalogue.json").read_text())}
    assert rows.keys() <= shown.keys() and len(shown) > 70
    for name, (time, memory, trained) in shown.items():
        if name not in rows:
            assert {time, memory, trained} == {"not measured"}
            continue
        row, one = rows[name], rows[name]["fp32"]
        assert trained == f"{row['trained']:,}"
        for cell, ratio in {time: one["graft"]["step"], memory: one["graft"]["peak"] / one["lora"]["peak"]}.items():
            named = ["less", "as LoRA", "more", "much more"][sum(ratio > bound for bound in (0.9, 1.1, 1.5))]
            assert cell == f"{named} ({ratio:.2f})"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_between_pages_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        if "://" not in link:
            assert (page.parent / link).exists(), f"{page.name} links to {link}"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_python_in_the_pages_is_python(page):
    for block in re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
        compile(block, page.name, "exec")
