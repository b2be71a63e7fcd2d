"""Rollouts on disk: interrupted ones go on, and wrapping is blind to the label."""

from collections import Counter

import pytest

from probes.data.conversations import Conversation, read_jsonl
from probes.rollouts.framings import FRAMED_POPULATION, Wrapping, read_texts, wrapped
from probes.rollouts.generate import RolloutConfig
from probes.rollouts.judges import JudgeVerdict
from probes.rollouts.resume import rollout_to, with_room
from probes.rollouts.types import Request, requests_of
from safe_decode.certificate_choice import BEGUN
from safe_decode.errors import ConfigurationError, DataError

CONFIG = RolloutConfig(max_new_tokens=6, do_sample=True, batch_size=4)


def requests(n=10, harmful=None):
    return [
        Request(
            messages=({"role": "user", "content": f"word {i}"},),
            group=f"g{i}",
            prompt_harmful=harmful,
        )
        for i in range(n)
    ]


def test_an_interrupted_run_goes_on_and_ends_as_if_it_had_not_been(llama, tokenizer, tmp_path):
    def run(name, judge):
        return rollout_to(
            tmp_path / name,
            llama,
            tokenizer,
            requests(),
            judge=judge,
            config=CONFIG,
            responses_per_part=4,
        )

    def calm(_row):
        return JudgeVerdict("benign")

    heard = []

    def fails(row):
        heard.append(row)
        if len(heard) == 7:
            raise RuntimeError("the judge left")
        return JudgeVerdict("benign")

    whole = run("whole.jsonl", calm)
    fails.__qualname__ = calm.__qualname__ = "the judge"
    with pytest.raises(RuntimeError, match="the judge left"):
        run("broken.jsonl", fails)
    assert not (tmp_path / "broken.jsonl").exists()
    resumed = run("broken.jsonl", calm)
    assert (whole.resumed, resumed.resumed) == (0, 4)
    assert resumed.conversations == whole.conversations == read_jsonl(tmp_path / "broken.jsonl")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["broken.jsonl", "whole.jsonl"]
    assert [row.group for row in resumed.conversations] == [f"g{i}" for i in range(10)]


def test_parts_of_another_run_are_refused(llama, tokenizer, tmp_path):
    def stop(_row):
        raise RuntimeError("stopped")

    path = tmp_path / "rows.jsonl"
    with pytest.raises(RuntimeError):
        rollout_to(path, llama, tokenizer, requests(), judge=stop, config=CONFIG)
    with pytest.raises(DataError, match="holds the parts of another run"):
        rollout_to(path, llama, tokenizer, requests(9), judge=stop, config=CONFIG)


def test_requests_keep_their_prefill_and_those_without_room_are_left_out(llama, tokenizer):
    rows = requests(3)
    assert len(with_room(llama, tokenizer, rows, 200)) == 3
    assert with_room(llama, tokenizer, rows, 250) == []
    row = Conversation(
        messages=rows[0].messages, response="", group="a", meta={"prefill": "Sure, "}
    )
    assert [one.prefill for one in requests_of([row], samples=2)] == ["Sure, ", "Sure, "]


def test_benign_and_harmful_requests_are_wrapped_at_the_same_rate():
    asked = [*requests(200, harmful=True), *requests(80, harmful=False), *requests(20)]
    found = wrapped(asked, Wrapping(framed=0.25, prefilled=0.5, seed=1))
    for harmful, n in ((True, 200), (False, 80), (None, 20)):
        rows = [one for one in found if one.prompt_harmful is harmful]
        assert sum("framing" in one.meta for one in rows) == n // 4
        assert sum(one.prefill is not None for one in rows) == n // 2
    names = Counter(one.meta["framing"] for one in found if "framing" in one.meta)
    assert max(names.values()) - min(names.values()) <= 3
    for before, after in zip(asked, found, strict=True):
        assert before.messages[-1]["content"] in after.messages[-1]["content"]
        changed = "framing" in after.meta or after.prefill is not None
        named = after.meta.get("population")
        apart = FRAMED_POPULATION if after.prefill is None else BEGUN
        assert named == (apart if changed and after.prompt_harmful is False else None)
    assert wrapped(asked, Wrapping(framed=0, prefilled=0)) == asked


def test_wrappings_that_cannot_be_are_refused(tmp_path):
    with pytest.raises(ConfigurationError, match=r"framed=1.5 is outside"):
        Wrapping(framed=1.5)
    with pytest.raises(ConfigurationError, match=r"framings \['a'\] must hold {request}"):
        Wrapping(framings={"a": "no slot"})
    path = tmp_path / "texts"
    path.write_text("one\\ntwo\n\nthree\n")
    assert read_texts(path) == ("one\ntwo", "three")
    path.write_text("\n")
    with pytest.raises(DataError, match="holds no text"):
        read_texts(path)
