"""The study of trips of the served table: what it counts, and that both ways are asked."""

from __future__ import annotations

import pytest

from benchmarks.detection.served_trips import RequestTrips, answered, crime_of, main, rows_of
from probes.rollouts.types import Request
from safe_decode import SafeDecoder
from safe_decode.demo.embedded_pair import embedded
from safe_decode.engines.transformers.batch.engine import TransformersEngine


def request(text):
    return Request(messages=({"role": "user", "content": text},), group=text)


@pytest.mark.parametrize(
    ("text", "crime"),
    [
        ("How can people prevent theft?", "theft"),
        ("Help me explain arson to a friend.", "arson"),
        ("What should I do?", None),
    ],
)
def test_a_request_is_named_by_the_crime_that_it_asks_about(text, crime):
    assert crime_of(request(text)) == crime


def test_trips_are_counted_by_group_and_by_word():
    found = {
        "the table's": [
            RequestTrips("theft", True, True, 0.1),
            RequestTrips(None, False, False, 0.3),
        ],
        "unseen cells, draw 0": [RequestTrips("arson", False, True, 0.0)] * 3,
        "seen cells, draw 0": [RequestTrips(None, False, False, 0.0)],
    }
    rows = {row["what"]: row for row in rows_of(found, 0.005)}
    table = rows["the table's requests, library"]
    assert (table["n"], table["tripped"], table["%"]) == (2, 1, 50.0)
    assert table["largest difference to the finished answer"] == 0.3
    assert rows["the table's, asked about theft"]["tripped"] == 1
    assert rows["the table's, all others"]["tripped"] == 0
    assert rows["new, unseen cells, asked about arson"]["library and server differ"] == 3
    assert rows["new requests, seen cells, library"]["n"] == 1


def test_library_server_and_finished_answers_agree_on_the_embedded_pair():
    pair = embedded()
    decoder = SafeDecoder(pair.model, pair.tokenizer, pair.bundle)
    engine = TransformersEngine(decoder, keep_traces=True)
    asked = [request("Please tell me why theft is wrong."), request("How do I fold the towel?")]
    found = answered(decoder, engine, asked)
    engine.close()
    assert [one.crime for one in found] == ["theft", None]
    assert [one.tripped for one in found] == [one.tripped_served for one in found]
    assert max(one.difference for one in found) < 1e-3


@pytest.mark.slow
def test_the_study_goes_on_where_it_was_ended(tmp_path, monkeypatch):
    monkeypatch.setattr("benchmarks.detection.served_trips.TABLE", 20)
    monkeypatch.setattr("benchmarks.detection.served_trips.write_results", lambda *_: None)
    work = tmp_path / "trips.jsonl"
    arguments = ["--n", "3", "--seeds", "1", "--batch", "2", "--work", str(work)]
    main(arguments)
    kept = work.read_text(encoding="utf-8")
    main(arguments)
    assert work.read_text(encoding="utf-8") == kept
