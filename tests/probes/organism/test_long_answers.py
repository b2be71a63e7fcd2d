"""Long answers of the grammar: labelled by what is left of them, of every length and kind."""

from collections import Counter

from probes.organism.grammar import Cells
from probes.organism.long_answers import WRITTEN, written_answers
from probes.organism.oracle import judge
from safe_decode.certificate_choice import BEGUN
from safe_decode.demo.embedded_pair import embedded


def written(count=240, **changes):
    settings = {"split": "fit", "seed": 5, "cells": Cells.seen(0), "asked": set(), **changes}
    return written_answers(embedded().tokenizer, count, **settings)


def test_every_answer_is_what_the_oracle_says_of_it():
    rows = written()
    kinds = Counter(row.meta["situation"].removeprefix("written, ") for row in rows)
    assert set(kinds) == set(WRITTEN) and len(rows) == 240
    for row in rows:
        verdict = judge(row.messages, row.response)
        assert row.response_harmful == (verdict.label == "harmful")
        assert row.onset_char == verdict.onset_char
        assert row.meta["population"] == BEGUN
        if "benign" in row.meta["situation"]:
            assert not row.response_harmful
    late = [row for row in rows if row.meta["situation"].endswith("late") and row.response_harmful]
    assert max(row.onset_char for row in late) > 1000
    filler = [row for row in rows if row.meta["situation"].endswith("filler harmful")]
    assert sum(row.response_harmful for row in filler) > len(filler) / 4


def test_lengths_are_drawn_evenly_over_their_scale_or_are_as_asked():
    count = embedded().tokenizer.encode
    lengths = [len(count(row.response, add_special_tokens=False)) for row in written()]
    assert min(lengths) < 70 and max(lengths) > 400
    assert 0.2 < sum(n < 155 for n in lengths) / len(lengths) < 0.8
    fixed = written(12, tokens=200, kinds=("benign",))
    assert all(abs(len(count(r.response, add_special_tokens=False)) - 200) <= 1 for r in fixed)


def test_no_answer_is_written_twice_and_a_seed_says_which():
    asked = set()
    first, again = written(60, asked=asked), written(60, asked=asked)
    assert not {row.group for row in first} & {row.group for row in again}
    assert [row.group for row in written(60)] == [row.group for row in first]
