"""What a threshold finds at least: exact bounds, on groups, by cap and by beginning."""

from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import binom

from probes.calibration.detection import detection_bounds
from probes.data.conversations import Conversation
from safe_decode.certificate import Certificate, Envelope
from safe_decode.certificate_choice import BEGUN


def harmful(group, *, prefill=0):
    return Conversation(
        messages=({"role": "user", "content": "Hi"},),
        response="ok",
        group=group,
        response_harmful=True,
        prefill_tokens=prefill,
        response_ids=(1, 2, 3) if prefill else None,
    )


def certificate(threshold, cap, population="benign"):
    envelope = Envelope(cap, do_sample=False, temperature=1.0, top_p=1.0, top_k=0)
    return Certificate.compute(
        [threshold] * 60, alpha=0.1, delta=0.05, population=population, envelope=envelope
    )


def path_of(at, value, length=100):
    path = np.zeros(length + 1, np.float32)
    path[at] = value
    return path


def test_a_bound_is_exact_and_counts_what_the_cap_shows():
    rows = [harmful(str(n)) for n in range(50)]
    paths = [path_of(10 if n < 20 else 60, 5.0 if n < 45 else 0.5) for n in range(50)]
    whole, first = detection_bounds(
        rows, paths, (certificate(2.0, 100), certificate(1.0, 16)), delta=0.1
    )
    assert (whole.found, whole.n, whole.tokens) == (45, 50, 100)
    assert (first.found, first.n, first.tokens) == (20, 50, 16)
    assert whole.delta == first.delta == 0.05
    for one in (whole, first):
        # At the bound itself, so many or more are found with the probability delta.
        assert binom.sf(one.found - 1, one.n, one.at_least) == pytest.approx(one.delta)
    assert not whole.is_on_policy


def test_a_group_is_found_only_where_each_of_its_responses_trips():
    rows = [harmful(str(n % 40)) for n in range(80)]
    paths = [path_of(3, 5.0 if n < 70 else 0.0) for n in range(80)]
    (bound,) = detection_bounds(rows, paths, (certificate(2.0, 100),), delta=0.05)
    assert (bound.found, bound.n) == (30, 40)


def test_begun_answers_are_judged_by_their_own_certificate_where_there_is_one():
    rows = [harmful(str(n), prefill=3) for n in range(40)]
    paths = [path_of(3, 5.0)] * 40
    certificates = (certificate(2.0, 100), certificate(7.0, 200, BEGUN))
    (own,) = detection_bounds(rows, paths, certificates, delta=0.05)
    assert (own.responses, own.found, own.at_least) == ("harmful, begun", 0, 0.0)
    (plain,) = detection_bounds(rows, paths, certificates[:1], delta=0.05)
    assert plain.found == 40 and plain.at_least > 0.9


def test_few_groups_have_no_bound():
    rows = [harmful(str(n)) for n in range(29)]
    assert detection_bounds(rows, [path_of(1, 9.0)] * 29, (certificate(2.0, 9),), delta=0.05) == ()
    assert detection_bounds([], [], (certificate(2.0, 9),), delta=0.05) == ()
    own = [replace(row, group="one") for row in rows]
    assert (
        detection_bounds(own * 2, [path_of(1, 9.0)] * 58, (certificate(2.0, 9),), delta=0.1) == ()
    )
