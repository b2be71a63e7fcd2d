"""Columns beside the fields: put aside, counted, named, and none of them lost."""

import csv
import json

import pytest

from probes.cli.tables.facts import show_warnings
from probes.data.conversations import read_jsonl, write_jsonl
from probes.data.reader import read_conversations
from probes.data.sources import source_of
from probes.location.prompt_files import read_prompts
from safe_decode.errors import DataError

ROW = {
    "prompt": "How do I whittle a spoon?",
    "response": "With a sharp knife.",
    "prompt_harmful": 0,
    "response_harmful": 0,
    "refusal": 0,
    "category": "craft",
    "source": "workshop",
    "meta": {"model": "somebody's"},
    "group": "g1",
}


def written(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_rows_with_a_source_are_read_and_evaluated_within_it(tmp_path):
    path = written(tmp_path / "rows.jsonl", ROW, {**ROW, "group": "g2", "source": "forum"})
    reading = read_conversations(path, strict=True)
    assert [source_of(row) for row in reading.conversations] == ["workshop", "forum"]
    assert reading.conversations[0].meta == {"model": "somebody's", "source": "workshop"}
    assert reading.bad == 0 and reading.set_aside == {"source": 2}
    assert reading.to_json()["set_aside"] == {"source": 2}


def test_further_columns_are_kept_under_their_names_and_told(tmp_path, capsys):
    row = {"prompt": "p", "response": "r", "kind": "plain", "prefill": "", "score": 0.5}
    reading = read_conversations(written(tmp_path / "rows.jsonl", row, {**row, "kind": None}))
    assert reading.conversations[0].meta == {"columns": {"kind": "plain", "score": 0.5}}
    assert reading.set_aside == {"kind": 1, "score": 2}
    show_warnings([reading])
    told = capsys.readouterr().err
    assert "columns put aside into meta: kind (1 rows), score (2 rows)" in told
    assert "--columns" in told


def test_what_meta_says_already_stands(tmp_path):
    row = {**ROW, "meta": {"source": "own", "columns": {"kind": "own"}}, "kind": "other"}
    reading = read_conversations(written(tmp_path / "rows.jsonl", row))
    meta = reading.conversations[0].meta
    assert meta["source"] == "own"
    assert meta["columns"] == {"kind": "own", "source": "workshop"}


def test_a_meta_that_is_no_object_is_refused_by_its_name(tmp_path):
    with pytest.raises(DataError, match="meta='words' is not an object"):
        read_conversations(written(tmp_path / "rows.jsonl", {**ROW, "meta": "words"}))


def test_rows_put_aside_are_written_and_read_back(tmp_path):
    reading = read_conversations(written(tmp_path / "rows.jsonl", {**ROW, "kind": "plain"}))
    write_jsonl(tmp_path / "again.jsonl", reading.conversations)
    assert read_jsonl(tmp_path / "again.jsonl") == reading.conversations
    assert not read_conversations(tmp_path / "again.jsonl").set_aside


def test_csv_rows_keep_their_further_columns_too(tmp_path):
    path = tmp_path / "rows.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, ["prompt", "response", "response_harmful", "source"])
        table.writeheader()
        table.writerow({"prompt": "p", "response": "r", "response_harmful": "1", "source": "s"})
        table.writerow({"prompt": "q", "response": "r", "response_harmful": "0", "source": ""})
    first, second = read_conversations(path).conversations
    assert first.meta == {"source": "s"} and first.response_harmful is True
    assert second.meta == {}


def test_values_that_json_does_not_hold_become_text(tmp_path):
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pa.table({"prompt": ["p"], "response": ["r"], "blob": [b"\x00\x01"]})
    parquet.write_table(table, tmp_path / "rows.parquet")
    (row,) = read_conversations(tmp_path / "rows.parquet").conversations
    write_jsonl(tmp_path / "rows.jsonl", [row])
    assert read_jsonl(tmp_path / "rows.jsonl")[0].meta["columns"]["blob"] == "b'\\x00\\x01'"


@pytest.mark.parametrize("answered", [True, False])
def test_prompts_to_locate_on_may_have_further_columns(tmp_path, answered):
    row = {"prompt": "p", "prompt_harmful": 1, "source": "forum"}
    row |= {"response": "No."} if answered else {}
    file = read_prompts(written(tmp_path / "rows.jsonl", row))
    (read,) = file.conversations or file.requests
    assert read.meta == {"source": "forum"}
