"""What a search leaves: results.json and report.html, which needs nothing but itself."""

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from ..comparison.charts import Point, Series, lines, scatter
from ..comparison.report import leave, page
from ..runs.summary import measured

if TYPE_CHECKING:
    from . import Search

FIGURES = {
    "quality": ("", 1.0, "{:.4g}"),
    "loss": ("", 1.0, "{:.4g}"),
    "parameters": ("trained parameters", 1.0, "{:,.0f}"),
    "memory": ("peak memory (MiB)", 2.0**20, "{:,.0f}"),
    "seconds": ("time of training (s)", 1.0, "{:,.1f}"),
    "saved": ("saved (KiB)", 2.0**10, "{:,.0f}"),
}
WORDS = ("configuration", "targets", "")  # heads of columns of text


def write(found: "Search") -> None:
    """The files of a search, each of them whole."""
    leave(found, html(found), {
        "objective": found.objective,
        "verdict": found.verdict,
        "supernet": found.supernet,
        "best": found.best,
        "trials": found.rows,
    })  # fmt: skip


def html(found: "Search") -> str:
    """The report as one page."""
    metric = measured(found.runs[0].configuration)[0] if found.runs else "loss"
    return page("Configurations searched", found.settings, [
        _summary(found, metric), _best(found, metric), _plots(found, metric), _trials(found, metric), _protocol(found),
    ])  # fmt: skip


def shown(name: str, value: float, metric: str) -> float:
    """A loss of a search as it is known: a metric of which more is better has its own sign."""
    return -value if name == "quality" and metric != "loss" else value


def _summary(found: "Search", metric: str) -> str:
    done = [r for r in found.rows if r["status"] == "done"]
    refused = sum(r["status"] == "refused" for r in found.rows)
    said = f"{len(done)} runs ended well"
    said += f", {refused} points were not started" if refused else ""
    said += f". The search ended because {found.verdict}." if found.verdict else "."
    many = " of them" if len(found.best) > 1 else ""
    judged = f"by {' and '.join(_called(n, metric) for n in found.objective)} on the validation split"
    return (
        f"<p>{escape(said)} The best{many}, {escape(judged)}, were run again.</p>" if found.best else f"<p>{said}</p>"
    )


def _best(found: "Search", metric: str) -> str:
    names = list(found.best[0]["test"]) if found.best else []
    head = ["configuration", "targets", "learning rate", f"{metric} (validation)", *(f"{m} (test)" for m in names)]
    head += [FIGURES[f][0] for f in ("parameters", "memory", "seconds")]
    body = []
    for b in found.best:
        cells = [b["title"], _targets(b["targets"]), _rate(b["training"])]
        cells += [f"{b['validation'][metric]:.4g}", *(_spread(b["test"].get(m)) for m in names)]
        cells += [_number(f, b[f]) for f in ("parameters", "memory", "seconds")]
        body.append(cells)
    return f"<h2>Found</h2>\n{_grid(head, body)}" if body else ""


def _plots(found: "Search", metric: str) -> str:
    done = [r for r in found.rows if r["status"] == "done"]
    if not done:
        return ""
    first, least, curve = found.objective[0], math.inf, []
    for i, r in enumerate(done, 1):
        least = min(least, r[first])
        curve.append((float(i), shown(first, least, metric)))
    name = f"best {_called(first, metric)} so far"
    drawn = [(name, lines(name, "runs", _called(first, metric), [Series("best", curve)]))]
    for other in ("parameters", "memory", "seconds"):
        _, unit, _ = FIGURES[other]
        points = [
            Point(r["title"], r[other] / unit, shown("quality", r["quality"], metric), front=r["best"])
            for r in done if r[other] is not None
        ]  # fmt: skip
        name = f"{metric} on the validation split against {FIGURES[other][0]}"
        drawn.append((name, scatter(name, FIGURES[other][0], metric, points, log=other == "parameters")))
    figures = [f"<figure><figcaption>{escape(n)}</figcaption>{svg}</figure>" for n, svg in drawn if svg]
    return f'<h2>Plots</h2>\n<p>Filled: what was found.</p><div class="plots">{"".join(figures)}</div>'


def _trials(found: "Search", metric: str) -> str:
    figures = [f for f in FIGURES if (f, metric) != ("quality", "loss")]
    head = ["trial", "configuration", *(_called(f, metric) for f in figures), "", "point"]
    body = []
    for i, r in enumerate(found.rows, 1):
        values = ["" if r[f] is None else _number(f, shown(f, r[f], metric)) for f in figures]
        label = f"{r['point'].get('method', '')}."
        point = ", ".join(f"{k.removeprefix(label)}={v}" for k, v in r["point"].items() if k != "method")
        body.append([str(i), r["title"] or "", *values, r["reason"] or "", point])
    return f"<h2>Trials</h2>\n{_grid(head, body)}"


def _protocol(found: "Search") -> str:
    s = found.settings
    facts = [
        f"searched by {s['searcher']}: {', '.join(s['space'])}; "
        + "; ".join(f"{k.replace('_', ' ')} {v}" for k, v in s["domains"].items()),
        f"{s['training']['steps']} steps of {s['training']['batch_size']} examples in every run, with seed "
        f"{s['seeds'][0]}, on the validation split; the best with seeds {', '.join(map(str, s['seeds']))} on the test "
        "split, which nothing else sees",
        "the best of many runs on one validation split flatters itself there: its figures on the test split count",
    ]
    if s["at_most"]:
        facts.append(f"at most {', '.join(f'{k}={v:g}' for k, v in s['at_most'].items())}")
    return "<h2>Protocol</h2>\n<ul>" + "".join(f"<li>{escape(f)}</li>" for f in facts) + "</ul>"


def _called(name: str, metric: str) -> str:
    return metric if name == "quality" else FIGURES[name][0] or name


def _number(name: str, value: float | None) -> str:
    return "" if value is None else FIGURES[name][2].format(value / FIGURES[name][1])


def _rate(training: Mapping[str, Any]) -> str:
    changes = training.get("rate_changes", {})
    return f"{training['learning_rate']:.3g}" + "".join(f", from {at} on times {f:.3g}" for at, f in changes.items())


def _targets(targets: Any) -> str:
    if isinstance(targets, Mapping):
        return "; ".join(f"{name}: {_targets(where)}" for name, where in targets.items())
    return "" if targets is None else targets if isinstance(targets, str) else ", ".join(map(str, targets))


def _spread(value: Mapping[str, Any] | None) -> str:
    return "" if not value else f"{value['mean']:.3f}" + ("" if value["sd"] is None else f" ± {value['sd']:.3f}")


def _kind(head: str) -> str:
    return ' class="words"' if head in WORDS else ""


def _grid(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    first = "".join(f'<th scope="col"{_kind(h)}><button type="button">{escape(h)}</button></th>' for h in head)
    rows = "\n".join(
        f"<tr>{''.join(f'<td{_kind(h)}>{escape(c)}</td>' for h, c in zip(head, row))}</tr>" for row in body
    )
    return f'<div class="wide"><table><thead><tr>{first}</tr></thead><tbody>\n{rows}\n</tbody></table></div>'
