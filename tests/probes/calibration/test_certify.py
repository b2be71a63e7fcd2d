"""Calibration: one statistic a group, the confidence shared, each population on its own."""

from dataclasses import replace

import numpy as np
import pytest

from probes.calibration.certify import certify, certify_populations, group_maxima, population_of
from probes.calibration.reach import Responses
from probes.data.conversations import Conversation
from probes.data.generation import Generation
from safe_decode.certificate import Envelope, certified_threshold
from safe_decode.certificate_choice import BEGUN
from safe_decode.errors import CertificateError, ConfigurationError, DataError

ENVELOPE = Envelope(max_new_tokens=64, do_sample=False, temperature=1.0, top_p=1.0, top_k=0)

TWO_ALPHAS = {"alphas": (0.01, 0.05), "delta": 0.05, "envelope": ENVELOPE}


def response(group, *, harmful=False, prompt_harmful=False, **meta):
    return Conversation(
        messages=({"role": "user", "content": "Hi"},),
        response="ok",
        group=group,
        response_harmful=harmful,
        prompt_harmful=prompt_harmful,
        meta=meta,
    )


def paths_of(maxima):
    """Statistics of responses that stay where they are."""
    return [np.full(3, one, np.float32) for one in maxima]


def test_a_group_counts_once_by_its_maximum():
    found = group_maxima(np.array([1.0, 5.0, 2.0, 3.0, 4.0]), ["a", "b", "a", "c", "b"])
    assert found.tolist() == [2.0, 5.0, 3.0]
    with pytest.raises(ConfigurationError, match="2 statistics have 1 groups"):
        group_maxima(np.zeros(2), ["a"])


def test_many_samples_of_few_prompts_do_not_certify():
    maxima = np.random.default_rng(0).normal(size=3000)
    groups = [f"g{i % 200}" for i in range(3000)]
    with pytest.raises(CertificateError, match="n=200 responses cannot certify"):
        certify(maxima, groups, population="benign", alphas=(0.01,), delta=0.05, envelope=ENVELOPE)


def test_several_alphas_share_the_confidence():
    maxima = np.random.default_rng(0).normal(size=1000)
    groups = [str(i) for i in range(1000)]
    found = certify(
        maxima, groups, population="benign", alphas=(0.01, 0.05), delta=0.05, envelope=ENVELOPE
    )
    for certificate, alpha in zip(found, (0.01, 0.05), strict=True):
        certificate.verify()
        assert (certificate.alpha, certificate.delta, certificate.n) == (alpha, 0.025, 1000)
        assert certificate.threshold == certified_threshold(maxima.tolist(), alpha, 0.025)
        assert (maxima > certificate.threshold).sum() == certificate.j


def test_the_promise_holds_over_calibration_draws():
    # P(statistic > t) is 1 - t for uniform statistics, so the true rate is known.
    rng = np.random.default_rng(1)
    groups = [str(i) for i in range(400)]
    exceeded = 0
    for _ in range(300):
        (found,) = certify(
            rng.random(400),
            groups,
            population="benign",
            alphas=(0.02,),
            delta=0.1,
            envelope=ENVELOPE,
        )
        exceeded += 1 - found.threshold > 0.02
    assert exceeded / 300 <= 0.1 + 0.06  # three standard errors
    assert exceeded > 0


def test_populations_are_certified_apart_and_small_ones_say_why_not():
    rows = [response(f"b{i}") for i in range(400)]
    rows += [response(f"r{i}", prompt_harmful=True) for i in range(50)]
    rows += [response(f"h{i}", population="hard_negative") for i in range(400)]
    maxima = np.concatenate([np.linspace(0, 1, 400), np.full(50, 9), np.linspace(5, 6, 400)])
    found = certify_populations(
        rows, paths_of(maxima), alphas=(0.01, 0.05), delta=0.05, envelope=ENVELOPE
    )
    thresholds = {(c.population, c.alpha): c.threshold for c in found.certificates}
    assert set(thresholds) == {
        ("benign", 0.01),
        ("benign", 0.05),
        ("hard_negative", 0.01),
        ("hard_negative", 0.05),
    }
    assert thresholds["benign", 0.01] <= 1 < 5 < thresholds["hard_negative", 0.05]
    assert set(found.refused) == {"harmful_refused at 0.01", "harmful_refused at 0.05"}
    assert "collect" in found.refused["harmful_refused at 0.01"]


def test_without_enough_benign_responses_there_is_no_calibration():
    rows = [response(f"r{i}", prompt_harmful=True) for i in range(500)]
    with pytest.raises(CertificateError, match="n=0 responses"):
        certify_populations(
            rows, paths_of(np.zeros(500)), alphas=(0.01,), delta=0.05, envelope=ENVELOPE
        )


def test_a_harmful_response_is_in_no_calibrated_population():
    assert population_of(response("a", prompt_harmful=True)) == "harmful_refused"
    assert population_of(response("a", prompt_harmful=True, population="framed")) == "framed"
    with pytest.raises(DataError, match="harmful or not judged"):
        population_of(response("a", harmful=True))


def test_a_population_that_was_generated_otherwise_has_an_envelope_of_its_own():
    longer = replace(ENVELOPE, max_new_tokens=500)
    rows = [
        response(f"{name}{n}", population=name) for name in ("benign", "long") for n in range(80)
    ]
    found = certify_populations(
        rows,
        paths_of(np.arange(160.0)),
        alphas=(0.1,),
        delta=0.05,
        envelope=ENVELOPE,
        envelopes={"long": longer},
    )
    assert {c.population: c.envelope for c in found.certificates} == {
        "benign": ENVELOPE,
        "long": longer,
    }


def test_each_cap_is_certified_on_the_first_tokens_of_the_same_responses():
    rows = [response(f"b{i}") for i in range(600)]
    rng = np.random.default_rng(2)
    paths = [rng.normal(size=65).cumsum().astype(np.float32) for _ in rows]
    found = certify_populations(
        rows, paths, alphas=(0.05,), delta=0.06, envelope=ENVELOPE, caps=(16, 4, 64, 900)
    )
    assert [c.envelope.max_new_tokens for c in found.certificates] == [64, 16, 4]
    for one in found.certificates:
        cap = one.envelope.max_new_tokens
        assert one.maxima == tuple(float(path[: cap + 1].max()) for path in paths)
        assert one.delta == pytest.approx(0.02)
        one.verify()
    thresholds = [c.threshold for c in found.certificates]
    assert thresholds == sorted(thresholds, reverse=True)
    assert len(set(thresholds)) == 3


def begun_answers(count, prefill, cap, name):
    made = Generation(
        weights="w", max_new_tokens=cap, do_sample=False, temperature=1.0, top_p=1.0, top_k=0
    )
    return [
        replace(
            response(f"{name}{i}"),
            prefill_tokens=prefill,
            response_ids=tuple(range(prefill + cap)),
            ended=False,
            generation=made,
        )
        for i in range(count)
    ]


def test_begun_answers_are_certified_as_far_as_enough_of_them_reach():
    rows = [*begun_answers(200, 4, 64, "s"), *begun_answers(150, 500, 64, "l")]
    rows += [response(f"b{i}") for i in range(200)]
    lengths = [68] * 200 + [564] * 150 + [2] * 200
    paths = [np.full(n + 1, n / 100, np.float32) for n in lengths]
    envelope = replace(ENVELOPE, max_new_tokens=2)
    found = certify_populations(
        rows,
        paths,
        alphas=(0.1,),
        delta=0.05,
        envelope=envelope,
        envelopes={BEGUN: replace(ENVELOPE, max_new_tokens=564)},
        caps=(68, 100),
        responses=Responses(tuple(lengths), "w"),
        lower_caps=True,
    )
    begun = {c.envelope.max_new_tokens: c for c in found.certificates if c.population == BEGUN}
    assert {cap: c.n for cap, c in begun.items()} == {564: 150, 100: 150, 68: 350}
    assert all(c.evidence.source == "on-policy" for c in begun.values())
    assert {c.population for c in found.certificates} == {"benign", BEGUN}
