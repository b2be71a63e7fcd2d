"""A written trace gives the same decisions again, and a changed one says where it differs."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from typer.testing import CliRunner

from safe_decode.cli.main import app
from safe_decode.errors import DataError
from safe_decode.prompts.chat import encode_chat
from safe_decode.testing.bundles import bundle_for, decoder_for, peaks, threshold_between
from safe_decode.testing.models import byte_tokenizer, tiny_model
from safe_decode.trace.replay import replay, standing_steps
from safe_decode.trace.schema import read_traces

PROMPTS = ["hello", "what is it?", "tell me a long story", "go", "abc"]


@pytest.fixture(scope="module")
def told():
    model, tokenizer = tiny_model("llama"), byte_tokenizer()
    options = {"max_new_tokens": 80, "prefill": "Sure"}
    flagged = decoder_for(model, tokenizer, redirect="flag").generate(PROMPTS, **options)
    threshold = threshold_between(peaks(flagged))
    outputs = {
        redirect: decoder_for(model, tokenizer, redirect=redirect, threshold=threshold).generate(
            PROMPTS, **options
        )
        for redirect in ("flag", "refuse", "rewind", "stop")
    }
    return model, tokenizer, outputs


def rescorer(model, tokenizer, prompt):
    decoder = decoder_for(model, tokenizer)
    head = encode_chat(tokenizer, prompt).ids

    def rescore(turn, n):
        ids = torch.tensor([[*head, *turn]])
        with decoder._tap.listening() as beats, torch.no_grad():
            beats.keep_last(n)
            model(input_ids=ids, use_cache=False)
            return decoder._probe(beats.take())[0].tolist()

    return rescore


@pytest.mark.parametrize("redirect", ["flag", "refuse", "rewind", "stop"])
def test_traces_replay_from_their_logits_and_from_the_model(told, redirect):
    model, tokenizer, outputs = told
    monitor = bundle_for(model, tokenizer).monitor
    for prompt, trace in zip(PROMPTS, outputs[redirect].traces, strict=True):
        (read,) = read_traces(trace.lines(token_ids=True))
        found = replay(read, monitor, rescore=rescorer(model, tokenizer, prompt))
        assert found.differences == () and found.scores == len(trace.steps)
        assert found.logit_difference < 1e-3


def test_a_changed_trace_says_where_it_differs(told):
    model, tokenizer, outputs = told
    monitor = bundle_for(model, tokenizer).monitor
    trace = next(trace for trace in outputs["refuse"].traces if trace.tripped)
    at = trace.end.trip_step
    calm = dataclasses.replace(trace.steps[at], action="pass", why="below_threshold")
    steps = (*trace.steps[:at], calm, *trace.steps[at + 1 :])
    found = replay(dataclasses.replace(trace, steps=steps), monitor)
    assert any(f"recomputed at score {at}" in words for words in found.differences)
    off = dataclasses.replace(trace.steps[2], statistic=trace.steps[2].statistic + 0.5)
    steps = (*trace.steps[:2], off, *trace.steps[3:])
    found = replay(dataclasses.replace(trace, steps=steps), monitor)
    assert any(words.startswith("score 2: statistic") for words in found.differences)
    assert found.statistic_difference == pytest.approx(0.5, abs=1e-3)
    foreign = rescorer(tiny_model("llama", seed=1), tokenizer, PROMPTS[0])
    found = replay(outputs["flag"].traces[0], monitor, rescore=foreign)
    assert any("logits differ" in words for words in found.differences)
    (bare,) = read_traces(trace.lines())
    with pytest.raises(DataError, match="--token-ids"):
        replay(bare, monitor, rescore=rescorer(model, tokenizer, PROMPTS[0]))


@pytest.mark.parametrize("redirect", ["flag", "refuse", "rewind", "stop"])
def test_what_stands_of_a_trace_is_what_was_kept(told, redirect):
    _, tokenizer, outputs = told
    output = outputs[redirect]
    for trace, text in zip(output.traces, output.texts, strict=True):
        n = trace.end.prefill_tokens
        stands = [
            step.token
            for step, does in standing_steps(trace)
            if does and step.position > 0 and not (step.attempt == 0 and step.position <= n)
        ]
        shown = tokenizer.decode(stands, skip_special_tokens=True)
        assert text.startswith(shown.rstrip("\ufffd"))
        own = [step for step, does in standing_steps(trace) if does and step.why != "opener"]
        own = [s for s in own if s.position > 0 and (s.attempt or s.position > n)]
        assert len(own) == trace.end.released_tokens


def test_the_commands_tell_people_and_programs(told, tmp_path, monkeypatch):
    model, tokenizer, outputs = told
    monkeypatch.setenv("COLUMNS", "200")
    bundle = bundle_for(model, tokenizer)
    bundle.save(tmp_path / "bundle")
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    path, places = tmp_path / "traces.jsonl", ["--model", str(tmp_path / "model")]
    for trace in outputs["rewind"].traces:
        header = dataclasses.replace(trace.header, bundle=bundle.digest)
        dataclasses.replace(trace, header=header).write(path, token_ids=True)
    call = ["replay", str(path), *places, "--bundle", str(tmp_path / "bundle")]
    result = CliRunner().invoke(app, [*call, *(f"--prompt={text}" for text in PROMPTS)])
    assert result.exit_code == 0, result.output
    assert "5 of 5 traces replay to the same decisions." in result.output
    told_json = CliRunner().invoke(app, [*call, "--json"])
    assert json.loads(told_json.stdout)["agrees"] is True
    shown = CliRunner().invoke(app, ["show", str(path), *places])
    assert shown.exit_code == 0 and "«Sure»" in shown.output and "▲TRIP" in shown.output
    rows = json.loads(CliRunner().invoke(app, ["show", str(path), *places, "--json"]).stdout)
    marks = {token["mark"] for row in rows["rows"] for token in row["tokens"]}
    assert {"prefill", "plain", "trip", "dropped"} <= marks
    lines = path.read_text(encoding="utf-8").splitlines()
    record = json.loads(lines[3])
    record["statistic"] += 1.0
    path.write_text("\n".join([*lines[:3], json.dumps(record), *lines[4:]]), encoding="utf-8")
    assert CliRunner().invoke(app, call).exit_code == 1
    foreign = CliRunner().invoke(app, ["replay", str(path)])
    assert foreign.exit_code == 2
