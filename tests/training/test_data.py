import json

import pytest

from graft.core.errors import GraftError
from graft.training import data

ROWS = [{"text": f"row {i}", "label": "ab"[i % 2]} for i in range(10)]


@pytest.fixture
def files(tmp_path):
    import datasets

    table = datasets.Dataset.from_list(ROWS)
    table.to_parquet(tmp_path / "d.parquet")
    table.to_csv(tmp_path / "d.csv", index=False)
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(r) + "\n" for r in ROWS))
    (tmp_path / "d.json").write_text(json.dumps(ROWS))
    (tmp_path / "d.tsv").write_text("text\tlabel\n" + "".join(f"{r['text']}\t{r['label']}\n" for r in ROWS))
    return tmp_path


@pytest.mark.parametrize("suffix", ["parquet", "csv", "jsonl", "json", "tsv"])
def test_every_kind_of_file_gives_the_same_examples(files, suffix):
    assert [dict(e) for e in data.read(files / f"d.{suffix}")] == ROWS


def test_a_changed_file_is_read_again(files):
    data.read(files / "d.jsonl")
    (files / "d.jsonl").write_text(json.dumps(ROWS[3]) + "\n")
    assert [dict(e) for e in data.read(files / "d.jsonl")] == [ROWS[3]]


def test_folders(tmp_path):
    import datasets

    for name, rows in (("train-0", ROWS[:2]), ("train-1", ROWS[2:4]), ("test", ROWS[4:6])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    assert [dict(e) for e in data.read(tmp_path)] == ROWS[:4]
    assert [dict(e) for e in data.read(tmp_path, split="test")] == ROWS[4:6]
    both = datasets.DatasetDict(train=datasets.Dataset.from_list(ROWS[:3]), test=datasets.Dataset.from_list(ROWS[3:]))
    both.save_to_disk(tmp_path / "saved")
    assert [dict(e) for e in data.read(tmp_path / "saved", split="test")] == ROWS[3:]
    with pytest.raises(GraftError, match="no split 'dev'; it has train, test"):
        data.read(both, split="dev")


def test_a_folder_of_images_has_its_folders_as_labels(tmp_path):
    for name in ("cat/1.png", "cat/2.jpg", "dog/3.png", "dog/notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    read = data.read(tmp_path)
    assert [(e["image"].rsplit("/", 1)[1], e["label"]) for e in read] == [
        ("1.png", "cat"),
        ("2.jpg", "cat"),
        ("3.png", "dog"),
    ]


@pytest.mark.parametrize("as_table", [False, True])
def test_columns_are_renamed_and_the_others_kept(as_table):
    import datasets

    rows = [{"sentence": "x", "label": 5, "class": 1}]
    source = datasets.Dataset.from_list(rows) if as_table else rows
    read = data.read(source, columns={"text": "sentence", "label": "class"})
    assert dict(read[0]) == {"text": "x", "label": 1}
    swapped = data.read(source, columns={"label": "class", "class": "label"})
    assert dict(swapped[0]) == {"sentence": "x", "label": 1, "class": 5}
    with pytest.raises(GraftError, match="no column 'sentense': did you mean sentence"):
        data.read(source, columns={"text": "sentense"})


def test_held_out_parts_are_disjoint_complete_and_drawn_by_the_seed():
    train, held = data.held_out(ROWS, 0.3, seed=1)
    assert len(held) == 3 and sorted(e["text"] for e in [*train, *held]) == [r["text"] for r in ROWS]
    assert data.held_out(ROWS, 0.3, seed=1)[1] == held != data.held_out(ROWS, 0.3, seed=2)[1]
    with pytest.raises(GraftError, match=r"validation=0\.01 of 10 examples leaves one"):
        data.held_out(ROWS, 0.01, seed=1)


def test_what_cannot_be_read_is_said_in_one_sentence(files):
    def said(source, match, **options):
        with pytest.raises(GraftError, match=match) as caught:
            data.read(source, **options)
        assert "\n" not in str(caught.value)

    said(files / "e.jsonl", r"no such file: .*e\.jsonl: did you mean d\.json")
    (files / "bad.jsonl").write_text('{"text": "x"}\n{"text": \n')
    said(files / "bad.jsonl", "line 2 of bad.jsonl is not JSON")
    (files / "empty.jsonl").touch()
    said(files / "empty.jsonl", "empty")
    (files / "d.xml").touch()
    said(files / "d.xml", r"not of a kind that can be read: \.jsonl")
    said([], "is empty")
    said([{"text": "x"}, "y"], "example 1 of the data is a str")
    said(3, "not a int")
    (files / "none").mkdir()
    said(files / "none", "holds neither")
    said("nobody/nothing", "neither a local file or folder nor a data set")  # offline: refused at once


def test_a_missing_column_or_value_is_named():
    with pytest.raises(GraftError, match="no column 'label'; it has 'text', 'class': rename one"):
        data.column([{"text": "x", "class": 1}], "label")
    with pytest.raises(GraftError, match="row 1 of the data has no 'label'"):
        data.column([{"text": "x", "label": 1}, {"text": "y"}], "label")
