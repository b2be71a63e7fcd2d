"""The way of accelerators, taken on the CPU: trips unread until the next step, nothing differs."""

from __future__ import annotations

import pytest
import torch

from safe_decode.engines.transformers.loops.device_checks import AsyncFlag
from safe_decode.engines.transformers.loops.step import StepLoop
from safe_decode.session.trip_detector import TripDetector
from safe_decode.testing.bundles import decoder_for, peaks, threshold_between
from safe_decode.testing.models import EOS, byte_tokenizer, tiny_model

PROMPTS = ["hello", "what is it?", "tell me a long story", "go", "abc"]


@pytest.fixture
def as_on_an_accelerator(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Count the flags that were read late."""
    prepare, begin, read = StepLoop._prepare, TripDetector.__init__, AsyncFlag.read
    reads: list[int] = []

    def late(self, input_ids, *rest):
        prepare(self, input_ids, *rest)
        self._late = AsyncFlag(torch.device("cpu"))

    def unread(self, *parts, **named):
        begin(self, *parts, **named)
        self._reads_on_host = False

    def counted(self):
        reads.append(1)
        return read(self)

    monkeypatch.setattr(StepLoop, "_prepare", late)
    monkeypatch.setattr(TripDetector, "__init__", unread)
    monkeypatch.setattr(AsyncFlag, "read", counted)
    return reads


@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize("redirect", ["refuse", "rewind", "flag"])
def test_reading_late_changes_no_id_and_no_trace(redirect, sampled, request):
    model, tokenizer = tiny_model("llama"), byte_tokenizer()
    options = {"max_new_tokens": 24, "do_sample": sampled, "eos_token_id": [EOS, 40, 90, 120, 200]}

    def run(threshold: float, kind: str):
        torch.manual_seed(0)
        decoder = decoder_for(model, tokenizer, threshold=threshold, redirect=kind)
        return decoder.generate(PROMPTS, **options)

    threshold = threshold_between(peaks(run(1e9, "flag")))
    wanted = run(threshold, redirect)
    reads = request.getfixturevalue("as_on_an_accelerator")
    found = run(threshold, redirect)
    assert reads
    assert torch.equal(found.sequences, wanted.sequences)
    assert found.texts == wanted.texts
    assert list(found.traces) == list(wanted.traces)
    if redirect != "flag":
        assert {t.tripped for t in found.traces} == {True, False}


def test_the_newest_flag_is_the_one_that_is_read():
    flag = AsyncFlag(torch.device("cpu"))
    flag.send(torch.tensor([False, True]))
    assert flag.read()
    flag.send(torch.tensor([False, False]))
    assert not flag.read()
