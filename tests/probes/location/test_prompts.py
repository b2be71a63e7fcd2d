"""What location reads: files of prompts or of responses, and what is kept of them."""

import json

import pytest

from probes.data.conversations import Conversation
from probes.location.prompt_files import answered, location_data, read_prompts
from probes.rollouts.generate import RolloutConfig
from safe_decode.errors import ConfigurationError, DataError


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def said(response, **changes):
    messages = ({"role": "user", "content": "x"},)
    return Conversation(messages=messages, response=response, group=response, **changes)


def test_prompts_are_answered_by_the_model_itself(llama, tokenizer, tmp_path):
    file = read_prompts(
        write(
            tmp_path / "f",
            {"prompt": "a lamp"},
            {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]},
        )
    )
    assert (len(file), file.conversations) == (2, ())
    config = RolloutConfig(max_new_tokens=4)
    rows = answered(llama, tokenizer, file, config=config)
    assert [row.prompt for row in rows] == ["a lamp", "u"]
    assert all(len(row.response_ids) <= 4 and row.response for row in rows)
    config = RolloutConfig(max_new_tokens=4, do_sample=True)
    rows = answered(llama, tokenizer, file, samples=3, config=config)
    assert len({row.group for row in rows}) == 2
    assert len({row.response for row in rows}) > 2


def test_responses_in_the_file_are_taken_as_they_are(llama, tokenizer, tmp_path):
    path = write(tmp_path / "f", {"prompt": "a", "response": "r", "refusal": True})
    (row,) = answered(llama, tokenizer, read_prompts(path))
    assert (row.response, row.refusal, row.response_ids) == ("r", True, None)


def test_samples_that_would_be_alike_are_refused(llama, tokenizer, tmp_path):
    file = read_prompts(write(tmp_path / "f", {"prompt": "a"}))
    with pytest.raises(ConfigurationError, match="samples=2 must be 1 without sampling"):
        answered(llama, tokenizer, file, samples=2)


@pytest.mark.parametrize("response", [{}, {"response": "r"}])
def test_rows_of_other_splits_are_left_out_and_counted(tmp_path, response):
    splits = ["locate", "test", None, "fit"]
    rows = [{"prompt": str(i), "split": split, **response} for i, split in enumerate(splits)]
    file = read_prompts(write(tmp_path / "f", *rows))
    kept = [row.messages[-1]["content"] for row in (*file.requests, *file.conversations)]
    assert (kept, file.left_out) == (["0", "2"], 2)


def test_the_digest_is_of_the_files_bytes(tmp_path):
    one, same, other = (
        read_prompts(write(tmp_path / name, {"prompt": prompt}))
        for name, prompt in (("a", "x"), ("b", "x"), ("c", "y"))
    )
    assert one.digest == same.digest != other.digest


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        ([{"prompt": "a", "response": "r"}, {"prompt": "b"}], "f:2: the row has no response, 1"),
        ([{"prompt": "a", "messages": []}], "f:1: the row needs either prompt or messages"),
        ([{"prompt": "a"}, {"text": "a"}], "f:2: the row needs either prompt or messages"),
        ([{"prompt": 3}], "f:1: message .* must have exactly the texts"),
        ([{"messages": "hello"}], "f:1: messages='hello' is not a non-empty tuple"),
        ([{"prompt": "a", "ended": 1}], r"f:1: unknown fields \['ended'\]"),
        ([{"prompt": "a", "split": "train"}], "f:1: split='train' is not one of"),
        ([["a"]], "f:1: the row is a list, wanted a JSON object"),
        ([{"prompt": "a", "split": "test"}], r"has no row to use \(1 belong to other"),
        ([], "has no row to use"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused_by_line(tmp_path, rows, told):
    with pytest.raises(DataError, match=told):
        read_prompts(write(tmp_path / "f", *rows))


def test_a_damaged_file_is_refused(tmp_path):
    (tmp_path / "f").write_bytes(b'{"prompt": "a"}\n{"prompt"')
    with pytest.raises(DataError, match="f:2: Expecting"):
        read_prompts(tmp_path / "f")
    (tmp_path / "f").write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match="cannot be read as UTF-8"):
        read_prompts(tmp_path / "f")
    with pytest.raises(DataError, match="none cannot be read"):
        read_prompts(tmp_path / "none")


def test_refusals_of_harmful_and_answers_to_benign_prompts_are_kept():
    harmful = [said("I cannot help."), said("Sure."), said("I won't say."), said("I cannot help.")]
    benign = [said("Fold it."), said("I can't help with that."), said("odd", refusal=True)]
    data = location_data(harmful, benign, min_refusals=2)
    assert [row.response for row in data.refusals] == [
        "I cannot help.",
        "I won't say.",
        "I cannot help.",
    ]
    assert [row.response for row in data.benign] == ["Fold it."]
    assert data.counts == {
        "harmful_responses": 4,
        "refusals": 3,
        "distinct_refusals": 2,
        "benign_responses": 3,
        "benign_answers": 1,
    }


def test_too_few_distinct_refusals_or_answers_are_refused():
    harmful = [said("I cannot help.")] * 9
    with pytest.raises(DataError, match="9 refuse, in 1 distinct texts, wanted at least 2"):
        location_data(harmful, [said("Fold it.")], min_refusals=2)
    with pytest.raises(DataError, match="all 9 responses to benign prompts refuse"):
        location_data(harmful, harmful, min_refusals=1)
