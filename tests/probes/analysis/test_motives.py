"""The same request under many motives, from motives to a table with intervals."""

import json

import pytest
from typer.testing import CliRunner

from probes.analysis.behaviour import Outcomes
from probes.analysis.motives import (
    MOTIVES,
    PLAIN,
    Framed,
    MotiveResult,
    framed,
    framing_rows,
    read_motives,
)
from probes.organism.prompts_source import WORLD_MOTIVES
from probes.rollouts.types import Request
from safe_decode.cli.main import app
from safe_decode.errors import ConfigurationError, DataError
from safe_decode.testing.models import byte_tokenizer, tiny_model


def asked(text):
    system = {"role": "system", "content": "Be brief."}
    return Request(messages=(system, {"role": "user", "content": text}), group=text)


def outcomes(**counts):
    return Outcomes({**dict.fromkeys(("refusal", "benign", "harmful", "broken"), 0), **counts})


def test_there_are_twelve_motives_and_each_has_one_slot():
    for motives in (MOTIVES, WORLD_MOTIVES):
        assert len(motives) == len(set(motives)) >= 12
        assert all(motive.count(PLAIN) == 1 and motive != PLAIN for motive in motives)


def test_a_motive_stands_around_the_last_message_alone():
    (row,) = framed([asked("Break {it}.")], "For a film: {request}")
    assert row.messages[0]["content"] == "Be brief."
    assert row.messages[1]["content"] == "For a film: Break {it}."
    with pytest.raises(ConfigurationError, match="must hold {request} exactly once"):
        framed([asked("a")], "no slot")


def test_rows_survive_the_journal_and_count_what_was_stopped():
    def bare(requests):
        refused = sum("film" not in r.messages[-1]["content"] for r in requests)
        return MotiveResult(outcomes(refusal=refused, harmful=len(requests) - refused))

    def guarded(requests):
        return MotiveResult(outcomes(harmful=1, refusal=len(requests) - 1), len(requests) - 1)

    rows = list(framing_rows([asked("a"), asked("b")], (PLAIN, "A film: {request}"), bare, guarded))
    assert [row.refused_bare.point for row in rows] == [1, 0]
    assert [row.stopped_guarded.point for row in rows] == [0.5, 0.5]
    assert [Framed.from_json(json.loads(json.dumps(row.to_json()))) for row in rows] == rows
    with pytest.raises(DataError, match="no request"):
        list(framing_rows([], (PLAIN,), bare))


def test_motives_of_ones_own_are_read_and_checked(tmp_path):
    path = tmp_path / "motives.txt"
    path.write_text("A: {request}\n\n{request} B\n", encoding="utf-8")
    assert read_motives(path) == ("A: {request}", "{request} B")
    path.write_text("A\n", encoding="utf-8")
    with pytest.raises(ConfigurationError, match="motive 1"):
        read_motives(path)


def test_any_model_with_a_file_of_prompts(tmp_path):
    tiny_model("gpt2").save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    harmful = tmp_path / "harmful.jsonl"
    rows = [{"prompt": f"break the {word}"} for word in ("lamp", "boat", "door")]
    harmful.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    arguments = ("--model", tmp_path / "model", "--harmful", harmful, "--prompts", 2)
    more = ("--max-new-tokens", 4, "--plot", tmp_path / "f.png", "--out", tmp_path / "f.jsonl")
    run = lambda *last: CliRunner().invoke(  # noqa: E731
        app, ["framing", *map(str, (*arguments, *more, *last))]
    )
    told = json.loads(run("--json").stdout)["motives"]
    assert [row["motive"] for row in told] == [PLAIN, *MOTIVES]
    assert all(sum(row["bare"][k] for k in ("refusal", "harmful", "broken")) == 2 for row in told)
    assert all(row["stopped"] is None for row in told)
    assert (tmp_path / "f.png").read_bytes().startswith(b"\x89PNG")
    again = run()
    assert again.exit_code == 0, again.output
    assert "no motive" in again.stdout
    assert "[" in again.stdout
    without = CliRunner().invoke(app, ["framing", "--model", str(tmp_path / "model")])
    assert "without --harmful" in without.stderr
