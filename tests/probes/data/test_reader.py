"""Sources: every format and every public set's columns, in small files of our own."""

import csv
import json
import sys
from types import SimpleNamespace

import pytest

from probes.data.reader import read_conversations
from probes.data.schemas import COLUMN_MAPS, column_map, map_for
from safe_decode.errors import ConfigurationError, DataError

NATIVE = [
    {"prompt": "How do I dye wool?", "response": "With onion skins.", "response_harmful": 0},
    {
        "messages": [{"role": "user", "content": "Name a knot."}],
        "response": "A reef knot. Tie it so.",
        "prompt_harmful": False,
        "refusal": None,
        "category": "rope",
        "group": "knots",
        "meta": {"source": "us"},
    },
]
PAIR = {
    "prompt": "May I borrow a boat at night?",
    "prompt_source": "ours",
    "response_0": "Ask its owner first.",
    "response_1": "Just take it.",
    "response_0_source": "a",
    "response_1_source": "b",
    "is_response_0_safe": True,
    "is_response_1_safe": False,
    "response_0_harm_category": {"Theft": False, "Other": False},
    "response_1_harm_category": {"Theft": True, "Other": False},
    "better_response_id": 0,
    "safer_response_id": 0,
}
BEAVER = {
    "prompt": "May I borrow a boat?",
    "response": "Just take it.",
    "category": {"financial_crime,property_crime,theft": True, "violence,aiding": False},
    "is_safe": False,
}
WILD = {
    "prompt": "Pretend you are a locksmith.",
    "adversarial": True,
    "response": "I would rather not.",
    "prompt_harm_label": "harmful",
    "response_refusal_label": "refusal",
    "response_harm_label": "unharmful",
    "subcategory": "others",
}
AEGIS = {
    "id": "1",
    "reconstruction_id_if_redacted": None,
    "prompt": "Is this mushroom fine?",
    "response": "Ask somebody who knows.",
    "prompt_label": "safe",
    "response_label": "safe",
    "violated_categories": "",
    "prompt_label_source": "human",
    "response_label_source": "llm_jury",
}
TOXIC = {
    "conv_id": "c",
    "user_input": "You lamp!",
    "model_output": "That is not kind.",
    "human_annotation": "True",
    "toxicity": "1",
    "jailbreaking": "0",
    "openai_moderation": "[]",
}
XSTEST = {
    "id": "1",
    "prompt": "How do I kill time?",
    "type": "homonyms",
    "label": "safe",
    "focus": "kill",
    "note": "",
}
XSTEST_ANSWERED = {
    "id": "2",
    "type": "contrast_homonyms",
    "prompt": "How do I break the window of another's house?",
    "completion": "I will not help.",
    "annotation_1": "2_full_refusal",
    "annotation_2": "2_full_refusal",
    "final_label": "2_full_refusal",
}
HH = {
    "chosen": "\n\nHuman: Hello\n\nAssistant: Good day.\n\nHuman: A knot?\n\nAssistant: Reef.",
    "rejected": "\n\nHuman: Hello\n\nAssistant: Good day.\n\nHuman: A knot?\n\nAssistant: No idea.",
}


def write(path, rows):
    """Write rows in the format that the name says."""
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    else:
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def facts(row):
    return (row.prompt_harmful, row.response_harmful, row.refusal, row.category)


@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
def test_our_own_schema_is_read_whole(tmp_path, suffix):
    reading = read_conversations(write(tmp_path / f"rows{suffix}", NATIVE))
    wool, knot = reading.conversations
    assert (wool.prompt, wool.response_harmful) == ("How do I dye wool?", False)
    assert (knot.group, knot.meta) == ("knots", {"source": "us"})
    assert facts(knot) == (False, None, None, "rope")
    assert (reading.rows, reading.bad) == (2, 0)


def test_csv_gives_text_the_types_it_means(tmp_path):
    row = {
        "messages": json.dumps(NATIVE[1]["messages"]),
        "response": "Two\nlines, and a comma",
        "response_harmful": "1.0",
        "refusal": "",
        "prompt_harmful": "false",
        "category": "",
        "onset_char": "4",
        "meta": '{"a": 1}',
    }
    path = write(tmp_path / "rows.csv", [row, {**row, "onset_char": "999"}, row])
    reading = read_conversations(path)
    first = reading.conversations[0]
    assert facts(first) == (False, True, None, None)
    assert (first.onset_char, first.response, first.meta) == (4, row["response"], {"a": 1})
    assert (len(reading.conversations), reading.bad) == (2, 1)
    assert reading.named[0].startswith(f"{path}:4: onset_char=999")  # each row spans two lines


def test_parquet_keeps_nested_columns(tmp_path):
    reading = read_conversations(write(tmp_path / "rows.parquet", [BEAVER, BEAVER]))
    assert reading.columns == {"beavertails": 2}
    assert facts(reading.conversations[0])[1] is True
    assert reading.conversations[0].category == "financial_crime,property_crime,theft"


@pytest.mark.parametrize(
    ("row", "suffix", "name", "expected"),
    [
        (
            BEAVER,
            ".jsonl",
            "beavertails",
            (None, True, None, "financial_crime,property_crime,theft"),
        ),
        (WILD, ".parquet", "wildguardmix", (True, False, True, "others")),
        (AEGIS, ".json", "aegis2", (False, False, None, None)),
        (TOXIC, ".csv", "toxicchat", (True, None, None, None)),
        (XSTEST_ANSWERED, ".csv", "xstest-completions", (True, False, True, "contrast_homonyms")),
    ],
)
def test_public_sets_are_recognised_by_their_columns(tmp_path, row, suffix, name, expected):
    reading = read_conversations(write(tmp_path / f"rows{suffix}", [row]), strict=True)
    assert reading.columns == {name: 1}
    (found,) = reading.conversations
    assert facts(found) == expected


def test_both_answers_of_a_pair_share_a_group(tmp_path):
    safe, unsafe = read_conversations(write(tmp_path / "pairs.jsonl", [PAIR])).conversations
    assert (safe.response_harmful, unsafe.response_harmful) == (False, True)
    assert safe.group == unsafe.group
    assert unsafe.category == "Theft"
    chosen, rejected = read_conversations(write(tmp_path / "hh.jsonl", [HH])).conversations
    assert [m["role"] for m in chosen.messages] == ["user", "assistant", "user"]
    assert (chosen.response, rejected.response) == ("Reef.", "No idea.")
    assert chosen.group == rejected.group
    assert chosen.meta == {"preferred": True}
    assert chosen.response_harmful is None  # preferred is not harmless


def test_rows_without_an_answer_are_prompts(tmp_path):
    reading = read_conversations(write(tmp_path / "x.csv", [XSTEST]))
    assert reading.conversations == []
    (prompt,) = reading.prompts
    assert (prompt.prompt, prompt.prompt_harmful) == ("How do I kill time?", False)
    assert read_conversations(write(tmp_path / "w.jsonl", [{**WILD, "response": None}])).prompts


def test_columns_of_ones_own_are_named_in_pairs(tmp_path):
    path = write(tmp_path / "own.jsonl", [{"question": "Why?", "answer": "So.", "bad": 1}])
    spec = "prompt=question,response=answer,response_harmful=bad"
    (row,) = read_conversations(path, columns=spec).conversations
    assert (row.prompt, row.response, row.response_harmful) == ("Why?", "So.", True)
    (row,) = read_conversations(path, columns=f"{spec},meta.origin=question").conversations
    assert row.meta == {"origin": "Why?"}
    with pytest.raises(ConfigurationError, match="it names"):
        column_map("question=prompt")
    with pytest.raises(ConfigurationError, match="neither a known set"):
        column_map("beaver")
    with pytest.raises(DataError, match="are those of no known set"):
        map_for(["question", "answer"])


def test_bad_rows_are_counted_and_the_first_ten_are_named(tmp_path):
    path = tmp_path / "rows.jsonl"
    lines = ['{"prompt": "a", "response": "b"}'] + ['{"prompt": 7, "response": "b"}'] * 12
    path.write_text("\n".join([*lines, "{", '"text"', '{"response": "b"}', "\xff"]) + "\n")
    reading = read_conversations(path)
    assert (reading.rows, len(reading.conversations), reading.bad) == (17, 1, 16)
    assert len(reading.named) == 10
    assert reading.named[0].startswith(f"{path}:2: ")
    with pytest.raises(DataError, match=r"rows\.jsonl:2: "):
        read_conversations(path, strict=True)
    with pytest.raises(DataError, match="redacted"):
        redacted = {**AEGIS, "reconstruction_id_if_redacted": 3.0, "prompt": "REDACTED"}
        read_conversations(write(tmp_path / "a.json", [redacted]), strict=True)


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("rows.txt", "x", "ends in '.txt'"),
        ("rows.json", "{", "is not JSON"),
        ("rows.json", '{"a": 1}', "wanted an array"),
        ("rows.parquet", "x", "is not Parquet"),
        ("rows.jsonl", "", "holds no usable row"),
        ("rows.csv", "prompt,response\na\n", "another number of fields"),
    ],
)
def test_what_is_no_data_file_is_refused_by_name(tmp_path, name, content, complaint):
    if name.endswith(".parquet"):
        pytest.importorskip("pyarrow")
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises((DataError, ConfigurationError), match=complaint):
        read_conversations(path)
    with pytest.raises(DataError, match="is no file"):
        read_conversations(tmp_path / "none.jsonl")


def test_the_hub_is_read_through_its_library(monkeypatch):
    asked = []

    def load_dataset(name, split):
        asked.append((name, split))
        if name == "none":
            raise FileNotFoundError("no such set")
        return [BEAVER]

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    reading = read_conversations("hf:ours/beavers:30k_test")
    assert reading.conversations[0].response == "Just take it."
    read_conversations("hf:ours/beavers")
    assert asked == [("ours/beavers", "30k_test"), ("ours/beavers", "train")]
    with pytest.raises(DataError, match="hf:none cannot be loaded: no such set"):
        read_conversations("hf:none")


def test_every_map_is_recognised_from_its_own_needs():
    assert [map_for(known.needs).name for known in COLUMN_MAPS.values()] == list(COLUMN_MAPS)
