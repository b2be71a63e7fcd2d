"""Conversations: what is accepted, what is refused, and that splits never share a group."""

import json
from collections import Counter

import pytest

from probes.data.conversations import (
    SPLITS,
    Conversation,
    assign_splits,
    by_split,
    read_jsonl,
    split_of,
    write_jsonl,
)
from safe_decode.errors import ConfigurationError, DataError

USER = ({"role": "user", "content": "How do I boil an egg?"},)


def test_jsonl_returns_what_was_written(tmp_path):
    rows = [
        Conversation(messages=USER, response="Ten minutes.\nÖl", group="a", response_harmful=False),
        Conversation(
            messages=({"role": "system", "content": "Be brief."}, *USER),
            response="Sure. Now harm.",
            group="b",
            response_harmful=True,
            prompt_harmful=False,
            refusal=False,
            category="cooking",
            onset_char=6,
            split="fit",
            response_ids=(5, 0, 7),
            prefill_tokens=2,
            ended=False,
            meta={"framing": "story"},
        ),
    ]
    path = tmp_path / "rows.jsonl"
    write_jsonl(path, rows)
    assert read_jsonl(path) == rows
    assert [p.name for p in tmp_path.iterdir()] == ["rows.jsonl"]


def test_a_failed_write_keeps_the_old_file_and_leaves_nothing_behind(tmp_path):
    path = tmp_path / "rows.jsonl"
    write_jsonl(path, [Conversation(messages=USER, response="ok", group="a")])

    def rows():
        yield Conversation(messages=USER, response="new", group="b")
        raise RuntimeError("the source failed")

    with pytest.raises(RuntimeError, match="the source failed"):
        write_jsonl(path, rows())
    assert [row.group for row in read_jsonl(path)] == ["a"]
    assert [p.name for p in tmp_path.iterdir()] == ["rows.jsonl"]


def test_prompt_stands_for_messages_and_equal_prompts_share_a_group(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [
        {"prompt": "a", "response": "x", "response_harmful": 1},
        {"prompt": "a", "response": "y", "refusal": 0},
        {"prompt": "b", "response": "x"},
    ]
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    first, second, third = read_jsonl(path)
    assert first.group == second.group != third.group
    assert first.response_harmful is True
    assert second.refusal is False
    assert third.prompt == "b"


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ({"prompt": "a"}, "no response"),
        ({"response": "a"}, "either prompt or messages"),
        ({"prompt": "a", "response": "b", "harm": 1}, r"unknown fields \['harm'\]"),
        ({"prompt": "a", "response": "b", "refusal": 2}, "refusal=2 is not true, false or null"),
        ({"prompt": "a", "response": 7}, "response=7 is not a string"),
        ({"prompt": "a", "response": "b", "onset_char": 1}, "outside the response of 1 characters"),
        (
            {"prompt": "a", "response": "b", "onset_char": 0, "response_harmful": False},
            "onset_char is set but response_harmful is false",
        ),
        ({"prompt": "a", "response": "b", "split": "train"}, "is not one of"),
        ({"prompt": "a", "response": "b", "prefill_tokens": 1}, "outside 0..0"),
        ({"prompt": "a", "response": "b", "response_ids": [-1]}, "not token ids"),
        ({"messages": [], "response": "b"}, "not a non-empty tuple"),
        ({"messages": [{"role": "user"}], "response": "b"}, "role and content"),
        ({"messages": [{"role": "bot", "content": "a"}], "response": "b"}, "role='bot'"),
        ({"messages": [{"role": "assistant", "content": "a"}], "response": "b"}, "the assistant's"),
        ([1], "wanted a JSON object"),
        ("{", "Expecting"),
    ],
)
def test_a_bad_row_is_refused_naming_file_and_line(tmp_path, row, complaint):
    path = tmp_path / "rows.jsonl"
    good = json.dumps({"prompt": "a", "response": "b"})
    path.write_text(f"{good}\n{row if isinstance(row, str) else json.dumps(row)}\n")
    with pytest.raises(DataError, match=rf"rows\.jsonl:2: .*{complaint}"):
        read_jsonl(path)


def test_a_split_depends_on_nothing_but_group_and_seed():
    groups = [f"group-{i}" for i in range(4000)]
    rows = [Conversation(messages=USER, response="ok", group=g) for g in groups for _ in range(2)]
    parts = by_split(assign_splits(rows, seed=3))
    assert {s: {row.group for row in part} for s, part in parts.items()} == {
        s: {g for g in groups if split_of(g, seed=3) == s} for s in SPLITS
    }
    shares = Counter(split_of(g, seed=3) for g in groups)
    assert 1100 < shares["fit"] < 1300
    assert 330 < shares["locate"] < 470
    assert any(split_of(g, seed=3) != split_of(g, seed=4) for g in groups)


def test_a_group_in_two_splits_is_refused():
    rows = [
        Conversation(messages=USER, response="x", group="a", split="fit"),
        Conversation(messages=USER, response="y", group="a", split="test"),
    ]
    with pytest.raises(DataError, match="stands in the splits 'fit' and 'test'"):
        by_split(rows)
    with pytest.raises(DataError, match="has no split"):
        by_split([Conversation(messages=USER, response="x", group="a")])


def test_shares_must_add_to_one():
    with pytest.raises(ConfigurationError, match=r"shares add to 0\.5"):
        split_of("a", shares={"fit": 0.5})
    assert split_of("a", shares={"select": 1.0}) == "select"
