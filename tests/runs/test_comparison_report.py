"""The report stands alone, says what the rows say, and works in a browser."""

import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest

from graft.comparison import Comparison, outcome, report
from graft.comparison.charts import Point, Series, lines, scatter
from graft.runs.summary import summarise

VALUES = {"no-op": [0.1] * 3, "zero-shot": [0.1], "full-fine-tuning": [0.6, 0.62, 0.61], "lora": [0.59, 0.63, 0.6],
          "ia3": [0.3, 0.31, 0.29], "<b>&odd": [0.2, 0.25, 0.3]}  # fmt: skip


@pytest.fixture
def found(some, tmp_path, monkeypatch):
    """A comparison of made-up records, one of them of a method with an ugly name."""
    monkeypatch.setattr("graft.runs.summary.title", lambda name, options: name)
    monkeypatch.setattr("graft.comparison.report.title", lambda name, options: name)
    figures = {
        name: {"validation": [[5, i + 1.0, 2.0], [10, i + 2.0, 1.4 - of[0]]], "forgetting": 2 + of[0],
               "latency": {"unmerged": 0.01 + i / 1000, "merged": 0.01}}
        for i, (name, of) in enumerate(VALUES.items())
    }  # fmt: skip
    records = some(VALUES, figures)
    rows = outcome.rows(summarise(records), 0.8)
    settings = {"model": "tiny", "task": "rewrites", "steps": 10, "training": {"batch_size": 4}, "seeds": [0, 1, 2],
                "rows": 64, "also": {"forgetting": {"data": "task:code", "rows": 64}}, "budget": "20m"}  # fmt: skip
    return Comparison(
        settings=settings, rows=sorted(rows, key=lambda r: -r["quality"]), runs=records, target=0.8,
        predicts=outcome.predicts(summarise(records)), sizes={8: rows, 64: rows}, unfit={"bitfit": "it has no bias"},
        screened=[{"method": "lora", "loss": 1.25, "learning_rate": 1e-2, "tried": 2, "step": 0.5, "compared": True},
                  {"method": "vera", "loss": 1.5, "learning_rate": 0.1, "tried": 1, "step": 0.25, "compared": False}],
        folder=tmp_path,
    )  # fmt: skip


class Checked(HTMLParser):
    """Tags that close in their order, and all that could be fetched."""

    def __init__(self):
        super().__init__()
        self.open, self.fetched, self.text = [], [], []

    def handle_starttag(self, tag, attrs):
        self.fetched += [(k, v) for k, v in attrs if k in ("src", "href", "srcset", "action")]
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def test_the_page_is_whole_and_fetches_nothing(found):
    page, checked = report.html(found), Checked()
    checked.feed(page)
    assert not checked.open and not checked.fetched
    assert not re.search(r"https?://|@import|url\(|fetch\(|XMLHttp", page)
    text = " ".join(checked.text)
    assert "<b>&odd" in text and "it has no bias" in text and "Shown to beat full fine-tuning: none" in text
    assert page.count("<svg") >= 9 and page.count("<svg") == page.count("<desc>")


def test_the_files_hold_every_run(found):
    import json

    parquet = pytest.importorskip("pyarrow.parquet")
    report.write(found)
    content = json.loads((found.folder / "results.json").read_text())
    assert [r["id"] for r in content["runs"]] == [r.configuration.id for r in found.runs]
    assert [r["method"] for r in content["contestants"]] == [r["method"] for r in found.rows]
    table = parquet.read_table(found.folder / "results.parquet").to_pylist()
    assert [row["id"] for row in table] == [r.configuration.id for r in found.runs]
    assert [row["test_exact_match"] for row in table] == [
        r.metrics.get("test", {}).get("exact_match") for r in found.runs
    ]


def test_marks_stand_where_their_numbers_say():
    points = [Point("a", 10, 0.0), Point("b", 100, 0.5), Point("c", 1000, 1.0, 0.1)]
    drawn = scatter("title", "x", "y", points, log=True)
    places = [(float(x), float(y)) for x, y in re.findall(r'<circle cx="([\d.]+)" cy="([\d.]+)"', drawn)]
    (xc, yc), (xb, yb), (xa, ya) = sorted(places, reverse=True)
    assert xb - xa == pytest.approx(xc - xb, abs=0.2) and ya - yb == pytest.approx(yb - yc, abs=0.2)
    assert scatter("title", "x", "y", [Point("a", 0, 1.0)], log=True) == "" == lines("t", "x", "y", [Series("a", [])])


def test_it_sorts_and_is_quiet_in_a_browser(found):
    playwright = pytest.importorskip("playwright.sync_api")
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        pytest.skip("there is no browser")
    report.write(found)
    with playwright.sync_playwright() as p:
        chromium = p.chromium.launch(executable_path=browser, args=["--no-sandbox"])
        page, said = chromium.new_page(), []
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: said.append(request.url) if "report.html" not in request.url else None)
        page.goto(Path(found.folder / "report.html").as_uri())
        head = page.locator("th button", has_text="exact_match").first
        cells = page.locator("table").first.locator("tbody td:nth-child(2)")
        head.click()
        up = [float(cells.nth(i).get_attribute("data-value")) for i in range(cells.count())]
        head.click()
        down = [float(cells.nth(i).get_attribute("data-value")) for i in range(cells.count())]
        wide = page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
        chromium.close()
    assert up == sorted(up) and down == sorted(up, reverse=True) and len(up) == len(VALUES) and wide and not said
