"""Each call is judged by the certificate of its own cap, and begun answers by theirs."""

from __future__ import annotations

import dataclasses

import pytest

from safe_decode import SafeDecoder
from safe_decode.certificate import Certificate, Envelope
from safe_decode.certificate_choice import BEGUN
from safe_decode.engines.rows import Row, RowRequest, Sampling
from safe_decode.engines.transformers.batch.engine import TransformersEngine
from safe_decode.testing.bundles import bundle_for
from safe_decode.testing.models import byte_tokenizer, tiny_model
from tests.staged import CALM, staged

PROMPT = [{"role": "user", "content": "Hello there"}]
BEGUN_PROMPT = [*PROMPT, {"role": "assistant", "content": "Sure"}]


def certificate(threshold, cap, population="benign"):
    envelope = Envelope(cap, do_sample=False, temperature=1.0, top_p=1.0, top_k=50)
    return Certificate.compute(
        [threshold] * 20, alpha=0.5, delta=0.05, population=population, envelope=envelope
    )


CERTIFICATES = (
    certificate(1e9, 64),
    certificate(1e8, 12),
    certificate(1e7, 32, BEGUN),
)


def with_caps(bundle, certificates=CERTIFICATES):
    return dataclasses.replace(bundle, certificates=certificates)


@pytest.fixture(scope="module")
def decoder():
    model, tokenizer = tiny_model(), byte_tokenizer()
    return SafeDecoder(model, tokenizer, with_caps(bundle_for(model, tokenizer)))


@pytest.mark.filterwarnings("ignore:Using the model-agnostic default")
@pytest.mark.parametrize(
    ("options", "threshold"),
    [
        ({"max_new_tokens": 10}, 1e8),  # and two unseen ones behind them
        ({"max_new_tokens": 11}, 1e9),
        ({"max_length": 40}, 1e8),
        ({}, 1e9),  # twenty tokens, as in transformers
    ],
)
def test_a_call_takes_the_tightest_threshold_that_covers_it(decoder, options, threshold):
    if "max_length" in options:
        width = decoder.tokenizer.apply_chat_template(PROMPT, add_generation_prompt=True)
        options = {"max_length": len(width["input_ids"]) + 10}
    out = decoder.generate([PROMPT], **options)
    assert out.traces[0].header.threshold == threshold
    assert out.traces[0].header.certificate.startswith("valid")


def test_rows_of_one_call_are_judged_by_their_own_beginnings(decoder):
    out = decoder.generate([PROMPT, BEGUN_PROMPT], max_new_tokens=10)
    assert [one.header.threshold for one in out.traces] == [1e8, 1e7]
    assert [one.header.population for one in out.traces] == ["benign", BEGUN]
    assert [one.header.certificate for one in out.traces] == ["valid", "valid"]
    long = decoder.generate([BEGUN_PROMPT], max_new_tokens=40)
    assert long.traces[0].header.certificate.startswith("void")


def test_without_a_certificate_of_begun_answers_the_whole_length_counts():
    model, tokenizer = tiny_model(), byte_tokenizer()
    bundle = with_caps(bundle_for(model, tokenizer), CERTIFICATES[:2])
    out = SafeDecoder(model, tokenizer, bundle).generate([BEGUN_PROMPT], max_new_tokens=8)
    assert out.traces[0].header.threshold == 1e9  # 4 + 8 + 2 tokens


def test_a_served_row_is_judged_by_its_cap_and_its_beginning():
    stage = staged()
    bundle = dataclasses.replace(
        stage.bundle,
        certificates=tuple(
            dataclasses.replace(one, alpha=alpha, delta=own.delta, envelope=envelope)
            for own in stage.bundle.certificates[:1]
            for alpha in (own.alpha,)
            for one, envelope in (
                (own, own.envelope),
                (
                    Certificate.compute(
                        [5.0] * own.n,
                        alpha=own.alpha,
                        delta=own.delta,
                        population="benign",
                        envelope=own.envelope,
                    ),
                    dataclasses.replace(own.envelope, max_new_tokens=12),
                ),
                (
                    Certificate.compute(
                        [6.0] * own.n,
                        alpha=own.alpha,
                        delta=own.delta,
                        population=BEGUN,
                        envelope=own.envelope,
                    ),
                    own.envelope,
                ),
            )
        ),
        default_alpha=stage.bundle.certificates[0].alpha,
    )
    engine = TransformersEngine(SafeDecoder(stage.model, stage.tokenizer, bundle), keep_traces=True)
    own = stage.bundle.certificates[0].threshold
    begun = [*CALM, {"role": "assistant", "content": "A"}]
    told = []
    for messages, cap in ((CALM, 10), (CALM, 11), (begun, 10)):
        asked = RowRequest(
            engine.chat(messages), Sampling(max_tokens=cap, seed=0), engine.facts.policy
        )
        row = Row(asked, lambda _event: None)
        engine.run([row])
        told.append(row.trace.header.threshold)
        assert engine.facts.certificate_of(asked).threshold == told[-1]
    engine.close()
    assert told == [5.0, own, 6.0]
