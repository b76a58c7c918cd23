"""What is seen while a comparison runs: a table on a terminal, lines elsewhere."""

import sys

from graft.comparison.live import Live


def follow(records):
    with Live(enabled=True) as live:
        live.expect("seeds", [r.configuration for r in records])
        for record in records:
            live.tell([record.configuration], None)
            live.tell([], record)


def test_a_line_for_each_run(some, capsys):
    follow(some({"lora": [0.25, 0.75]})[-2:])
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("seeds, 1 of 2: rewrites lora 0.01 seed 0 done") and "0.250 on test" in lines[0]
    assert lines[1].startswith("seeds, 2 of 2") and "0.750 on test" in lines[1] and len(lines) == 2


def test_a_table_on_a_terminal(some, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    follow(some({"lora": [0.25, 0.75], "ia3": [0.5]}))
    shown = capsys.readouterr().err
    assert "seeds: 7 of 7" in shown and "0.250  0.750" in shown and "ia3" in shown
