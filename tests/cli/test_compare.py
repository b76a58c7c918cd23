"""graft compare on the command line."""

import json

import pytest

FACTS = "task:answers,people=4,strangers=1,edits=2,forget=1"


def test_a_comparison_is_made_shown_and_gone_on_with(graft, house, tmp_path, here):
    command = ("compare", "--model", house / "llama", "--data", FACTS,
               "--methods", "lora(rank=2,alpha=4)", "--learning-rates", "1e-2", "--seeds", "0,1", "--steps", "2",
               "--batch-size", "4", "--rows", "4", "--forgetting", "none", "--output", tmp_path / "out")  # fmt: skip
    done = graft(*command)
    assert done.code == 0, done.err
    assert "lora(rank=2, alpha=4" in done.out and "not shown to beat" in done.out and "report.html" in done.out
    assert (refused := graft(*command)).code == 2 and "resume it" in refused.err
    found = graft(*command, "--resume", "--json").json
    kept = json.loads((tmp_path / "out" / "results.json").read_text())
    assert found["contestants"] == kept["contestants"] and found["settings"]["steps"] == 2
    assert {r["method"].partition("(")[0] for r in found["contestants"]} == {
        "no-op", "zero-shot", "in-context", "full-fine-tuning", "lora"
    }  # fmt: skip


@pytest.mark.parametrize(
    "args, said",
    [(("--model", "graft:nothing"), "nothing"), (("--methods", "lorra"), "'lorra'"), (("--budget", "20"), "write 90s"),
     (("--data", "task:rewrits"), "did you mean rewrites"), (("--rows", "0"), "rows must be")],
)  # fmt: skip
def test_bad_input_is_one_sentence(graft, house, tmp_path, args, said):
    given = {"--model": house / "llama", "--data": FACTS, "--output": tmp_path / "out"}
    given |= {args[0]: args[1]}
    done = graft("compare", *(part for pair in given.items() for part in pair))
    assert done.code == 2 and not done.out and said in done.err and done.err.count("\n") == 1
