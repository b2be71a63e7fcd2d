"""Which certificate decides for a call: by its cap, and by whether its answer was begun for it."""

import pytest

from safe_decode.certificate import Certificate, Envelope
from safe_decode.certificate_choice import BEGUN, CertificateChoice, certificate_of
from safe_decode.engines.interface import GuardFacts
from safe_decode.engines.rows import RowPolicy, RowPrompt, RowRequest, Sampling
from safe_decode.errors import CertificateError


def certificate(threshold, cap, *, population="benign", alpha=0.1, dtype="float32"):
    envelope = Envelope(cap, do_sample=False, temperature=1.0, top_p=1.0, top_k=0)
    return Certificate.compute(
        [threshold] * 60,
        alpha=alpha,
        delta=0.05,
        population=population,
        envelope=envelope,
        dtype=dtype,
    )


SEVERAL = (
    certificate(3.0, 256),
    certificate(1.0, 16),
    certificate(2.0, 64),
    certificate(0.5, 64, alpha=0.2),
    certificate(9.0, 64, dtype="bfloat16"),
    certificate(5.0, 80, population=BEGUN),
    certificate(7.0, 564, population=BEGUN),
)


@pytest.mark.parametrize(
    ("tokens", "threshold"),
    [(1, 1.0), (16, 1.0), (17, 2.0), (64, 2.0), (65, 3.0), (256, 3.0), (257, 3.0), (None, 3.0)],
)
def test_the_smallest_cap_that_covers_a_call_decides(tokens, threshold):
    assert certificate_of(SEVERAL, 0.1, "benign", "float32", tokens).threshold == threshold
    choice = CertificateChoice(SEVERAL, "benign", "float32")
    assert choice.of_call(0.1, tokens=tokens).threshold == threshold


@pytest.mark.parametrize(
    ("tokens", "prefill", "threshold"),
    [(64, 16, 5.0), (64, 17, 7.0), (64, 500, 7.0), (None, 3, 7.0), (64, 0, 2.0)],
)
def test_an_answer_that_was_begun_has_a_certificate_of_its_own(tokens, prefill, threshold):
    choice = CertificateChoice(SEVERAL, "benign", "float32")
    assert choice.of_call(0.1, tokens=tokens, prefill_tokens=prefill).threshold == threshold


def test_where_begun_answers_are_not_certified_their_length_counts():
    choice = CertificateChoice(SEVERAL, "benign", "float32")
    assert choice.of_call(0.2, tokens=30, prefill_tokens=3).threshold == 0.5
    begun_alone = CertificateChoice(SEVERAL, BEGUN, "float32")
    assert begun_alone.of_call(0.1, tokens=30).threshold == 5.0


def test_the_longest_of_each_level_is_what_a_deployment_shows():
    choice = CertificateChoice(SEVERAL, "benign", "float32")
    assert {alpha: one.threshold for alpha, one in choice.longest.items()} == {0.1: 3.0, 0.2: 0.5}
    with pytest.raises(CertificateError, match=r"wanted one of \[0.1, 0.2\]"):
        choice.of_call(0.3)


def test_a_request_never_gets_a_higher_threshold_by_asking_for_another_level():
    """The level it asks for is certified for the largest cap alone."""
    certificates = (
        certificate(3.0, 256),
        certificate(1.0, 64),
        certificate(2.0, 256, alpha=0.2),
        certificate(0.5, 256, population=BEGUN, alpha=0.2),
        certificate(0.4, 256, population=BEGUN),
    )
    facts = GuardFacts(
        bundle="0" * 64,
        choice=CertificateChoice(certificates, "benign", "float32"),
        alpha=0.1,
        redirect="refuse",
        holdback_tokens=4,
        heads=("harm",),
        context_tokens=None,
        vocab_tokens=256,
    )

    def threshold(alpha, cap, prefill=0):
        prompt = RowPrompt((1,) * 9, 1, prefill, is_chat=True)
        policy = RowPolicy(alpha, "refuse", 4)
        request = RowRequest(prompt, Sampling(max_tokens=cap, seed=0), policy)
        return facts.certificate_of(request).threshold

    assert [threshold(0.1, 60), threshold(0.2, 60)] == [1.0, 1.0]
    assert [threshold(0.1, 200), threshold(0.2, 200)] == [3.0, 2.0]
    assert [threshold(0.1, 60, 5), threshold(0.2, 60, 5)] == [0.4, 0.4]
