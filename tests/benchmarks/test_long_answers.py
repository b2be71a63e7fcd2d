"""The studies of long answers and of a real peer: what they draw, count and refuse."""

import asyncio
import importlib.util
import types
from itertools import islice

import numpy as np
import pytest

from benchmarks.cost import long_prefill
from benchmarks.detection import lengths
from benchmarks.peers import nemo
from probes.organism.grammar import Cells
from probes.organism.long_answers import KINDS, begun, long_requests
from probes.organism.oracle import judge
from safe_decode import SafeDecoder
from safe_decode.bench.models import embedded_subject
from safe_decode.certificate_choice import BEGUN
from safe_decode.demo.embedded_pair import embedded


@pytest.fixture(scope="module")
def decoder() -> SafeDecoder:
    loaded = embedded()
    return SafeDecoder(loaded.model, loaded.tokenizer, loaded.bundle)


def drawn(decoder, kind, *, harmful, n=3, depth=80):
    source = begun(
        kind,
        harmful=harmful,
        seed=5,
        depth=depth,
        cells=Cells.unseen(0),
        tokenizer=decoder.tokenizer,
    )
    return list(islice(source, n))


@pytest.mark.parametrize("harmful", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_a_beginning_is_as_long_as_asked_and_harmful_only_where_acts_are(decoder, kind, harmful):
    requests = drawn(decoder, kind, harmful=harmful)
    assert len({request.group for request in requests}) == 3
    for request in requests:
        assert request.prompt_harmful is harmful
        ids = decoder.tokenizer.encode(request.prefill, add_special_tokens=False)
        assert abs(len(ids) - 80) <= 1  # a cut text may be spelled by one token more or less
        label = judge(request.messages, request.prefill).label
        assert (label == "harmful") is (harmful and kind == "content")


def test_a_bundle_is_fitted_on_both_labels_at_every_depth_and_certified_on_harmless_ones(decoder):
    asked: set[str] = set()

    def drawn(split):
        return long_requests(
            decoder.tokenizer, 24, split=split, seed=3, cells=Cells.seen(0), asked=asked
        )

    fitted, certified = drawn("fit"), drawn("calibrate")
    assert len(asked) == len(fitted) + len(certified) == 48
    assert {(one.meta["depth"], one.prompt_harmful) for one in fitted} == {
        (depth, harmful) for depth in (128, 256, 500) for harmful in (False, True)
    }
    assert {one.meta["population"] for one in fitted} == {BEGUN, "harmful-request-refused"}
    assert {(one.meta["depth"], one.meta["population"]) for one in certified} == {(500, BEGUN)}
    assert not any(one.prompt_harmful for one in certified)


def test_only_what_the_bare_model_goes_on_with_is_kept_and_no_more_than_asked():
    def numbers():
        yield from range(10_000)

    bench = types.SimpleNamespace(bare=lambda part: ["harmful" if n % 3 else "x" for n in part])
    kept, asked = long_prefill.working(bench, numbers(), "harmful", wanted=5, most=5_000)
    assert kept == [1, 2, 4, 5, 7]
    assert asked == long_prefill._AT_ONCE
    kept, asked = long_prefill.working(bench, numbers(), "harmful", wanted=900, most=300)
    assert (len(kept), asked) == (200, 300)


def answers(tripped: int, refused: int, released: int):
    def one(trips: bool, label: str):
        trace = types.SimpleNamespace(tripped=trips)
        return types.SimpleNamespace(trace=trace, label=label, text="text")

    return (
        [one(True, "refusal")] * tripped
        + [one(False, "refusal")] * refused
        + [one(False, "harmful")] * released
    )


def test_what_is_held_is_what_trips_or_refuses(decoder):
    bench = types.SimpleNamespace(decoder=decoder, guarded=lambda _: answers(900, 97, 3))
    row = long_prefill.attack_row(bench, "content", range(1000), asked=1234)
    assert (row["n"], row["asked"], row["%"], row["met"]) == (1000, 1234, 99.7, "yes")
    bench.guarded = lambda _: answers(900, 96, 4)
    assert long_prefill.attack_row(bench, "content", range(1000), asked=1)["met"] == "no"


def test_twins_may_trip_as_often_as_is_certified(decoder):
    few = max(1, int(1000 * decoder.certificate.alpha))
    bench = types.SimpleNamespace(decoder=decoder, guarded=lambda _: answers(few, 0, 1000 - few))
    row = long_prefill.twin_row(bench, "filler", range(1000), asked=1000)
    assert (row["%"], row["met"]) == (100 * few / 1000, "yes")
    bench.guarded = lambda _: answers(100, 0, 900)
    assert long_prefill.twin_row(bench, "filler", range(1000), asked=1000)["met"] == "no"


def test_peaks_grow_with_the_length_and_are_those_of_the_guard(decoder, monkeypatch):
    monkeypatch.setattr(lengths, "DEPTHS", (16, 80))
    requests = drawn(decoder, "content", harmful=True)
    found = lengths.peaks(decoder, requests)
    assert found.shape == (3, 2)
    assert (np.diff(found, axis=1) >= 0).all()
    trips = found[:, 1] > decoder.certificate.threshold
    output = decoder.generate(
        [list(request.messages) for request in requests],
        prefill=[request.prefill for request in requests],
        max_new_tokens=1,
        do_sample=False,
    )
    scanned = [
        max(step.statistic for step in trace.steps if not step.attempt and step.position <= 80)
        for trace in output.traces
    ]
    np.testing.assert_allclose(found[:, 1], scanned, atol=1e-3)
    assert trips.tolist() == [trace.tripped for trace in output.traces]
    assert trips.any()


def test_each_length_tells_its_own_threshold(decoder, monkeypatch):
    monkeypatch.setattr(lengths, "DEPTHS", (16, 80))
    short, long = lengths.length_rows(decoder, Cells.seen(0), "seen", 8)
    name = next(key for key in short if key.startswith("threshold at which"))
    assert (short["tokens"], long["tokens"]) == (16, 80)
    assert short[name] <= long[name]
    assert short["harmful"] <= long["harmful"] == 8


def test_streams_of_the_arms_say_what_they_are_asked_for():
    subject, loaded = embedded_subject(), embedded()
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    decoder = SafeDecoder(subject.model, loaded.tokenizer, loaded.bundle, redirect="flag")
    bare = nemo.bare_stream(subject, loaded.tokenizer, options)
    arms = {"bare": bare, "ours": nemo.our_stream(decoder, options)}

    async def texts() -> list[str]:
        return ["".join([text async for text in stream()]) for stream in arms.values()]

    one, other = asyncio.run(texts())
    assert one
    assert one.strip() == other.strip()
    taken = asyncio.run(nemo._interleaved(arms, 6, 2))
    assert all(len(laps) == 2 for laps in taken.values())
    assert all(lap.first_s > 0 and lap.token_s > 0 for laps in taken.values() for lap in laps)


def test_a_stream_that_says_nothing_or_fails_is_no_measurement():
    async def nothing():
        for text in ("", ""):
            yield text

    async def failed():
        yield '{"error": "the rail failed"}'

    with pytest.raises(RuntimeError, match="without any text"):
        asyncio.run(nemo._take(nothing, 1))
    with pytest.raises(RuntimeError, match="a rail failed"):
        asyncio.run(nemo._take(failed, 1))


@pytest.mark.skipif(
    importlib.util.find_spec("nemoguardrails") is None,
    reason="nemoguardrails has pins of its own; see benchmarks/peers/nemo.py",
)
def test_the_real_rail_streams_what_the_model_says():
    subject, loaded = embedded_subject(), embedded()
    options = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}
    bare = nemo.bare_stream(subject, loaded.tokenizer, options)
    arms = {"bare": bare, "rail": nemo.nemo_stream(subject, loaded.tokenizer, bare)}

    async def texts() -> list[str]:
        return ["".join([text async for text in stream()]) for stream in arms.values()]

    one, other = asyncio.run(texts())
    assert one.strip() == other.strip()
