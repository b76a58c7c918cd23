"""graft search on the command line."""

import json

import pytest

FACTS = "task:answers,people=4,strangers=1,edits=2,forget=1"


def test_a_search_is_made_shown_and_gone_on_with(graft, house, tmp_path, here):
    (tmp_path / "recipe.yaml").write_text("space: ['lora(rank=1|2)', ia3]\nlearning-rate: 1e-2\nsteps: 2\ntrials: 9\n")
    command = ("search", "--model", house / "llama", "--data", FACTS, "--recipe", tmp_path / "recipe.yaml",
               "--trials", "4", "--seeds", "0,1", "--batch-size", "4", "--rows", "4", "--objective", "loss,parameters",
               "--output", tmp_path / "out")  # fmt: skip
    done = graft(*command)
    assert done.code == 0, done.err
    assert "every point of the space was tried" in done.out and "report.html" in done.out
    assert (refused := graft(*command)).code == 2 and "resume it" in refused.err
    found = graft(*command, "--resume", "--json").json
    kept = json.loads((tmp_path / "out" / "results.json").read_text())
    assert found["trials"] == kept["trials"] and found["best"] == kept["best"] and len(found["trials"]) == 3
    assert all(b["seeds"] == [0, 1] and b["training"]["steps"] == 2 for b in found["best"])
    assert {b["parameters"] for b in found["best"]} == {t["parameters"] for t in found["trials"] if t["best"]}


@pytest.mark.parametrize(
    "args, said",
    [(("--space", "lorra(rank=2)"), "did you mean lora"), (("--searcher", "tpee"), "did you mean tpe"),
     (("--at-most", "parameters=3"), "the least seen is"), (("--objective", "speed"), "no objective 'speed'"),
     (("--address", "auto"), "address is for the engine ray"), (("--engine", "rai"), "no engine 'rai'"),
     (("--budget", "20"), "write 90s"), (("--learning-rate", "1e-2:x"), "no interval")],
)  # fmt: skip
def test_bad_input_is_one_sentence(graft, house, tmp_path, here, args, said):
    given = {"--model": house / "llama", "--data": FACTS, "--output": tmp_path / "out", "--space": "lora(rank=1|2)",
             "--learning-rate": "1e-3|1e-2"}  # fmt: skip
    given |= {args[0]: args[1]}
    done = graft("search", *(part for pair in given.items() for part in pair))
    assert done.code == 2 and not done.out and said in done.err and done.err.count("\n") == 1
