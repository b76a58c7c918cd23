"""What a comparison leaves: results.json, results.parquet and report.html, which needs nothing but itself."""

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from html import escape
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from ..catalogue import plain
from ..core import disk
from ..runs.contestants import title
from ..runs.store import Record
from ..version import __version__
from .budget import TRIAL
from .charts import Point, Series, lines, scatter
from .fitting import ROWS

if TYPE_CHECKING:
    from . import Comparison

FORMAT = 1
# Of a plot and of a column: the key of a row, its name, the unit in its numbers, and how a number is written.
FIGURES: tuple[tuple[str, str, float, str], ...] = (
    ("parameters", "trained parameters", 1, "{:,.0f}"),
    ("peak_memory", "peak memory (MiB)", 2**20, "{:,.0f}"),
    ("step", "time of a step (ms)", 1e-3, "{:,.1f}"),
    ("time_to_target", "time to target (s)", 1, "{:,.1f}"),
    ("adapter_bytes", "saved (KiB)", 2**10, "{:,.0f}"),
    ("latency", "latency (ms)", 1e-3, "{:,.1f}"),
    ("latency_merged", "latency, merged (ms)", 1e-3, "{:,.1f}"),
)
BEST = ' class="best"'
WIDE = 10  # times the smallest cost: beyond it the axis is logarithmic
BOLD = (
    "Mean ± standard deviation over the seeds, on the test split. <b>Bold</b> names: what cannot be told from the "
    "best mean, since the 95 % interval of Welch for the difference holds 0; bold costs: the Pareto front, where "
    "nothing is as good and cheaper. An arrow: the best rate lies at the end of its grid. <i>Italic</i>: controls. A "
    "click on a head sorts."
)
BARS = (
    "Bars: ± one standard deviation over the seeds. Filled and joined: the Pareto front. Squares: controls. A pointer "
    "on a mark shows its numbers."
)
FEWER = (
    "Each with the learning rate that was chosen on all rows, and with the same number of steps; smaller sets are "
    "parts of larger ones."
)
SCREENING = (
    f"The budget is too small for all runs of all methods. So each was trained for {TRIAL} steps with its highest "
    "rate, and, the best ones first, with its other rates as long as there was time; with one seed, and measured on at "
    f"most {ROWS} rows of the validation split. <b>Bold</b>: the best ones, which are compared above. What is left out "
    "is not shown to be worse."
)
GUARD = (
    "One validation set chose every rate, so its best score flatters. Thresholdout (Dwork et al., 2015) answers with "
    "the score of the train split where both are alike, and otherwise with the validation score and noise of standard "
    "deviation {tolerance:.3f}. The runs above were made with the plain choice; the test split saw no choice."
)


def write(found: "Comparison") -> None:
    """The files of a comparison, each of them whole."""
    leave(found, html(found), {
        "target": found.target,
        "predicts": found.predicts,
        "contestants": found.rows,
        "sizes": found.sizes,
        "unfit": found.unfit,
        "screened": found.screened,
    })  # fmt: skip
    _parquet(found)


def leave(found: Any, report: str, content: Mapping[str, Any]) -> None:
    """results.json, with the settings before the content and the runs after it, and report.html."""
    runs = [json.loads(r.json()) for r in found.runs]
    content = {"format": FORMAT, "graft": __version__, "settings": found.settings, **content, "runs": runs}
    disk.replace(found.folder / "results.json", f"{json.dumps(plain(content), indent=1)}\n".encode())
    disk.replace(found.folder / "report.html", report.encode())


def _parquet(found: "Comparison") -> None:
    """One row a run; what has a structure of its own is JSON."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        return
    rows, sink = [flat(r) for r in found.runs], pyarrow.BufferOutputStream()
    columns = dict.fromkeys(name for row in rows for name in row)
    parquet.write_table(pyarrow.table({name: [row.get(name) for row in rows] for name in columns}), sink)
    disk.replace(found.folder / "results.parquet", sink.getvalue().to_pybytes())


def flat(record: Record) -> dict[str, Any]:
    """A record as one row of plain values."""
    c = record.configuration
    row = {
        "id": c.id,
        "contestant": _titled(record),
        "method": c.method,
        "seed": c.seed,
        "learning_rate": c.training.get("learning_rate"),
        "steps": c.training.get("steps"),
        "train_rows": c.train_rows,
        "status": record.status,
        "reason": record.reason,
        "parameters": record.parameters,
        "adapter_bytes": record.adapter_bytes,
        "peak_memory": record.peak_memory,
    }
    for split in ("train", "validation", "test"):
        row |= {f"{split}_{k}": float(v) for k, v in record.metrics.get(split, {}).items()}
    row |= {f"seconds_{k}": v for k, v in record.seconds.items()}
    kept = ("configuration", "curve", "figures", "environment")
    whole = json.loads(record.json())
    return row | {k: json.dumps(whole.get(k, {})) for k in kept}


def html(found: "Comparison") -> str:
    """The report as one page."""
    parts = [_summary(found), _table(found.rows), _plots(found), _sizes(found), _guard(found.rows)]
    parts += [_screened(found.screened), _failures(found), _protocol(found)]
    return page("Methods compared", found.settings, parts)


def page(what: str, settings: Mapping[str, Any], parts: Sequence[str]) -> str:
    """A page that needs nothing but itself, with the model and the task in its heading."""
    model = f"{settings['model']} ({settings['quantise']})" if settings.get("quantise") else settings["model"]
    name, body = f"{model} on {settings['task']}", "\n".join(filter(None, parts))
    style, script = (
        files("graft.comparison").joinpath(f"page.{end}").read_text(encoding="utf-8") for end in ("css", "js")
    )
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(name)}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>\n{style}</style></head><body>\n<h1>{escape(what)}: {escape(name)}</h1>\n{body}\n"
        f"<script>\n{script}</script></body></html>\n"
    )


def _summary(found: "Comparison") -> str:
    rows = [r for r in found.rows if r["quality"] is not None]
    if not rows:
        return '<p class="warn">No run ended well: see the reasons below.</p>'
    metric, first = rows[0]["deciding"], rows[0]["method"]
    alike = [r["method"] for r in rows if r["tie"] and r["method"] != first]
    methods = [r for r in rows if not r["control"]]
    below = [r["method"] for r in methods if {*r["not_above"]} - {"full-fine-tuning"}]
    above = [r["method"] for r in methods if "full-fine-tuning" not in r["not_above"]]
    value = _spread(rows[0]["test"][metric])
    said = [f"The best mean {metric} on the test split is that of <b>{escape(first)}</b>, {value}."]
    if alike:
        said.append(f"It cannot be told apart from {_list(alike)}.")
    if below:
        kind = "a control that trains nothing of the base"
        said.append(f'<span class="warn">Not shown to beat {kind}: {_list(below)}.</span>')
    said.append(f"Shown to beat full fine-tuning: {_list(above) or 'none'}.")
    if left := sum(not r["compared"] for r in found.screened):
        said.append(f"Of {len(found.screened)} methods {left} were left out after a few steps: see the screening.")
    if p := found.predicts:
        rank = f"Spearman's correlation {p['rank_correlation']:.2f}"
        said.append(f"Over {p['runs']} runs the validation loss ranks the {p['metric']} with {rank}.")
    if min(len(r["seeds"]) for r in rows if r["learning_rate"] is not None or len(rows) == 1) < 2:
        said.append('<span class="warn">One seed gives no interval, so nothing that is trained is told apart.</span>')
    return f"<p>{' '.join(said)}</p>"


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    if not rows:
        return ""
    metrics = list(next((r["test"] for r in rows if r["test"]), {}))
    shown = [
        f for f in FIGURES if any(r[f[0]] is not None or (f[0] == "time_to_target" and r["reached"]) for r in rows)
    ]
    forgets = any(r["forgetting"] is not None for r in rows)
    heads = ["contestant", *metrics, "seeds", "learning rate", *(name for _, name, _, _ in shown)]
    heads += ["forgetting"] * forgets
    body = []
    for r in rows:
        cells = [_cell(r["method"], best=r["tie"])]
        for m in metrics:
            value = r["test"].get(m)
            mean, best = (value["mean"], r["tie"] and m == r["deciding"]) if value else (None, False)
            cells.append(_cell(_spread(value) if value else "", mean, best=best))
        rate, end = r["learning_rate"], ""
        if r["at_end_of_grid"]:
            end = " ↑" if rate == max(r["learning_rates"]) else " ↓"
        cells += [_cell(len(r["seeds"])), _cell("" if rate is None else f"{rate:g}{end}", rate)]
        for key, _, unit, form in shown:
            value = r[key]
            text = "" if value is None else form.format(value / unit)
            if key == "time_to_target" and value is None and r["reached"]:
                text = f"{r['reached']} of {len(r['seeds'])} seeds"
            cells.append(_cell(text, value, best=key in r["pareto"]))
        if forgets:
            text = "" if r["forgetting"] is None else f"{r['forgetting']:+.3f}"
            cells.append(_cell(text, r["forgetting"], best="forgetting" in r["pareto"]))
        missed = "" if r["control"] else ", ".join(r["not_above"])
        cells.append(f'<td class="words warn">{escape(missed)}</td>')
        body.append(f'<tr class="{"control" if r["control"] else "method"}">{"".join(cells)}</tr>')
    first = "".join(f'<th scope="col"><button type="button">{escape(h)}</button></th>' for h in heads)
    last = '<th scope="col" class="words"><button type="button">not shown to beat</button></th>'
    return f"<h2>Table</h2>\n<p>{BOLD}</p>{_grid(first + last, body)}"


def _cell(text: Any, value: float | None = None, best: bool = False) -> str:
    """A cell of the table, with the number that it is sorted by."""
    number = "" if value is None else f' data-value="{value}"'
    return f"<td{BEST if best else ''}{number}>{escape(str(text))}</td>"


def _grid(head: str, body: Sequence[str]) -> str:
    rows = "\n".join(body)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>\n{rows}\n</tbody></table></div>'


def _plots(found: "Comparison") -> str:
    rows = [r for r in found.rows if r["quality"] is not None and math.isfinite(r["quality"])]
    if not rows:
        return ""
    metric, drawn = rows[0]["deciding"], []
    down = metric == "loss"
    forgetting = ("forgetting", "forgetting (loss on other data, after minus before)", 1, "")
    for key, name, unit, _ in (*FIGURES, forgetting):
        points = [
            Point(
                r["method"], r[key] / unit, r["test"][metric]["mean"], r["test"][metric]["sd"],
                control=r["control"], front=key in r["pareto"],
            )
            for r in rows
            if r[key] is not None
        ]  # fmt: skip
        said = f"{metric} on the test split against {name}{', less is better' if down else ''}"
        costs = [p.x for p in points if p.x]
        wide = bool(costs) and min(costs) > 0 and max(costs) > WIDE * min(costs)
        drawn.append((said, scatter(said, name, metric, points, log=wide)))
    curves, times = _curves(found)
    for said, x, series in [("over the steps", "step", curves), ("over the time of training", "seconds", times)]:
        drawn.append((f"Validation loss {said}", lines(f"Validation loss {said}", x, "validation loss", series)))
    return f"<h2>Plots</h2>\n<p>{BARS}</p>{_figures(drawn)}"


def _curves(found: "Comparison") -> tuple[list[Series], list[Series]]:
    """Means over the seeds of the final runs, the best contestants first."""
    steps, times = [], []
    for row in found.rows:
        own = [r for r in found.runs if r.done and "test" in r.configuration.splits and _titled(r) == row["method"]]
        if curves := [curve for r in own if (curve := r.figures.get("validation"))]:
            columns = list(zip(*curves))
            loss = [statistics.fmean(loss for _, _, loss in column) for column in columns]
            spent = [statistics.fmean(spent for _, spent, _ in column) for column in columns]
            steps.append(Series(row["method"], [(column[0][0], v) for column, v in zip(columns, loss)]))
            times.append(Series(row["method"], list(zip(spent, loss))))
    return steps, times


def _sizes(found: "Comparison") -> str:
    if not found.sizes or not found.rows:
        return ""
    metric, sizes, series = found.rows[0]["deciding"], sorted(found.sizes), []
    for row in found.rows:
        here = [(n, r["test"][metric]["mean"]) for n in sizes for r in found.sizes[n]
                if r["method"] == row["method"] and r["test"]]  # fmt: skip
        if here:
            series.append(Series(row["method"], here))
    name = f"{metric} on the test split over the rows of train"
    head = "".join(f'<th scope="col">{h}</th>' for h in ("contestant", *(f"{n} rows" for n in sizes)))
    body = []
    for s in series:
        at = dict(s.points)
        values = "".join(f"<td>{at[n]:.3f}</td>" if n in at else "<td></td>" for n in sizes)
        body.append(f"<tr><td>{escape(s.label)}</td>{values}</tr>")
    picture = _figures([(name, lines(name, "rows of train", metric, series, log=True))])
    return f"<h2>How much data it takes</h2>\n<p>{FEWER}</p>{picture}{_grid(head, body)}"


def _guard(rows: Sequence[Mapping[str, Any]]) -> str:
    body = [
        f"<tr><td>{escape(r['method'])}</td><td>{g['plain_learning_rate']:g}</td><td>{g['plain_score']:.3f}</td>"
        f"<td>{g['learning_rate']:g}</td><td>{g['score']:.3f}</td></tr>"
        for r in rows
        if (g := r["guarded"])
    ]
    if not body:
        return ""
    note = GUARD.format(tolerance=next(r["guarded"]["tolerance"] for r in rows if r["guarded"]))
    names = ("contestant", "rate", "score", "guarded rate", "guarded score")
    head = "".join(f'<th scope="col">{name}</th>' for name in names)
    return f"<h2>Choices and the guard</h2>\n<p>{note}</p>{_grid(head, body)}"


def _screened(rows: Sequence[Mapping[str, Any]]) -> str:
    body = [
        f"<tr><td{BEST if r['compared'] else ''}>{escape(r['method'])}</td><td>{r['loss']:.4f}</td>"
        f"<td>{r['learning_rate']:g}</td><td>{r['tried']}</td><td>{r['step'] / 1e-3:,.1f}</td></tr>"
        for r in rows
    ]
    if not body:
        return ""
    names = ("method", "validation loss", "learning rate", "rates tried", "time of a step (ms)")
    head = "".join(f'<th scope="col"><button type="button">{name}</button></th>' for name in names)
    return f"<h2>Screening</h2>\n<p>{SCREENING}</p>{_grid(head, body)}"


def _failures(found: "Comparison") -> str:
    failed = [(r["method"], f"{count} runs: {why}") for r in found.rows for why, count in r["failures"].items()]
    failed += sorted(found.unfit.items())
    items = "".join(f"<li><b>{escape(name)}</b>: {escape(why)}</li>" for name, why in failed)
    return f"<h2>What could not be run</h2>\n<ul>{items}</ul>" if items else ""


def _protocol(found: "Comparison") -> str:
    s, training = found.settings, found.settings["training"]
    facts = [
        f"{s['steps']} steps of {training['batch_size']} examples for every contestant",
        f"learning rates tried with seed {s['seeds'][0]} on the validation split; then seeds "
        f"{', '.join(map(str, s['seeds']))} on the test split, which nothing else sees",
        f"at most {s['rows']} rows of each split are measured",
        "the parameters after the last step count; nothing is chosen on the way",
        "latency: a forward pass over one batch of at most 8 examples, the median of five",
    ]
    if found.target is not None:
        reached = f"until the validation loss was {found.target:.4g} or less, at the measured points"
        facts.append(f"time to target: seconds of training {reached}")
    if other := s["also"].get("forgetting"):
        facts.append(f"forgetting: loss on {other['rows']} rows of {other['data']}, after minus before")
    if s["budget"]:
        facts.append(f"budget {s['budget']}")
    if e := next((r.environment for r in found.runs if r.done), None):
        versions = ", ".join(f"{name} {e[name]}" for name in ("torch", "transformers", "graft") if name in e)
        facts.append(f"{e['cpu']}, {e['cores']} cores, threads of a run: {e['threads']}; {versions}")
    return "<h2>Protocol</h2>\n<ul>" + "".join(f"<li>{escape(f)}</li>" for f in facts) + "</ul>"


def _figures(drawn: Sequence[tuple[str, str]]) -> str:
    made = [f"<figure><figcaption>{escape(name)}</figcaption>{svg}</figure>" for name, svg in drawn if svg]
    return f'<div class="plots">{"".join(made)}</div>'


def _titled(record: Record) -> str:
    return title(record.configuration.method, record.configuration.options)


def _spread(value: Mapping[str, Any]) -> str:
    return f"{value['mean']:.3f}" + ("" if value["sd"] is None else f" ± {value['sd']:.3f}")


def _list(items: Sequence[Any]) -> str:
    return escape(", ".join(map(str, items)))
