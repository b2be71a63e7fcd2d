"""What is not covered by the certificate: kept, voided or refused by setting, and always told."""

from __future__ import annotations

import dataclasses
import json

import pytest
from starlette.testclient import TestClient

from safe_decode.engines.rows import RowPrompt
from safe_decode.serving.app import create_app
from safe_decode.serving.proxy.fields import safety_of
from safe_decode.serving.requests.admission import CHANGED
from safe_decode.serving.requests.covered import CoveredValues
from safe_decode.serving.schemas.errors import ApiError
from tests.servers import MODEL, settings_of, staged_engine
from tests.staged import CALM, CALM_TEXT

CHAT = "/v1/chat/completions"
CERTIFIED, HOLDBACK, CONTEXT = 64, 2, 1024


def covered(facts=None, **settings):
    return CoveredValues(facts or staged_engine().facts, settings_of(**settings))


def prompt_of(n_ids=10, prefill_tokens=0):
    return RowPrompt(tuple(range(n_ids)), prefill_tokens + 1, prefill_tokens, is_chat=True)


def cap(asked, prompt=None, *, facts=None, holdback_tokens=HOLDBACK, **settings):
    return covered(facts, **settings).cap(
        asked, prompt or prompt_of(), holdback_tokens=holdback_tokens, param="max_tokens"
    )


@pytest.mark.parametrize("mode", ["keep", "void", "refuse"])
def test_what_is_covered_is_served_as_asked_in_every_mode(mode):
    for asked in (1, 5, CERTIFIED - HOLDBACK):
        served = cap(asked, cap_beyond_certificate=mode)
        assert (served.tokens, served.changes) == (asked, ())
    left_open = cap(None, cap_beyond_certificate=mode)
    assert (left_open.tokens, left_open.changes) == (CERTIFIED - HOLDBACK, ())


def test_a_beginning_and_a_longer_hold_back_count_against_what_is_covered():
    assert cap(None, prompt_of(10, 7)).tokens == CERTIFIED - HOLDBACK - 7
    assert cap(None, holdback_tokens=24).tokens == CERTIFIED - 24
    # What no certificate covers is void by name, and cannot be kept.
    assert cap(None, prompt_of(200, 100)).tokens == CERTIFIED - HOLDBACK


def test_a_cap_that_is_cut_is_told_with_its_reason():
    (change,) = cap(4096).changes
    assert (change.param, change.asked, change.served) == ("max_tokens", 4096, 62)
    assert change.why.startswith("the longest certificate covers 62 tokens")
    (change,) = cap(50, max_new_tokens=20).changes
    assert change.served == 20 and change.why == "the operator's limit"
    (change,) = cap(60, prompt_of(CONTEXT - HOLDBACK - 5)).changes
    assert change.served == 5 and "context has room for 5 tokens" in change.why


def test_a_cap_beyond_the_certificate_is_served_whole_where_the_operator_says_so():
    served = cap(500, cap_beyond_certificate="void")
    assert (served.tokens, served.changes) == (500, ())
    (change,) = cap(5000, cap_beyond_certificate="void").changes
    assert change.served == CONTEXT - 10 - HOLDBACK and "context" in change.why
    # The operator's own number holds in every mode, and so does a model without a limit.
    assert cap(500, cap_beyond_certificate="void", max_new_tokens=90).tokens == 90
    endless = dataclasses.replace(staged_engine().facts, context_tokens=None)
    assert cap(10**9, facts=endless, cap_beyond_certificate="void").tokens == 62


def test_a_cap_beyond_the_certificate_is_refused_by_name_where_the_operator_says_so():
    with pytest.raises(ApiError, match="max_tokens=63 is outside.*ask for at most 62") as refused:
        cap(63, cap_beyond_certificate="refuse")
    assert refused.value.status == 400 and refused.value.param == "max_tokens"


def sampled_facts():
    """Facts of an engine whose certificates speak of draws."""
    facts = staged_engine().facts
    changes = {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "options": {"min_p": "0.05"}}
    certificates = tuple(
        dataclasses.replace(one, envelope=dataclasses.replace(one.envelope, **changes))
        for one in facts.choice.certificates
    )
    choice = dataclasses.replace(facts.choice, certificates=certificates)
    return dataclasses.replace(facts, choice=choice)


@pytest.mark.parametrize("mode", ["keep", "void", "refuse"])
def test_what_is_left_open_is_drawn_as_certified_in_every_mode(mode):
    reader = covered(sampled_facts(), sampling_beyond_certificate=mode)
    served = reader.sampling(temperature=None, top_p=0.9, top_k=-1, min_p=None)
    assert served.values == {"temperature": 0.7, "top_p": 0.9, "top_k": 0, "min_p": 0.05}
    assert served.changes == ()
    greedy = covered(sampling_beyond_certificate=mode).sampling(temperature=0.0, top_p=0.5)
    assert greedy.changes == () and greedy.values["top_p"] == 0.5


def test_another_distribution_is_kept_away_and_told_or_refused_by_name():
    kept = covered(sampled_facts(), sampling_beyond_certificate="keep")
    served = kept.sampling(temperature=1.5, top_p=None, top_k=5)
    assert served.values == {"temperature": 0.7, "top_p": 0.9, "top_k": 0, "min_p": 0.05}
    assert [(c.param, c.asked, c.served) for c in served.changes] == [
        ("temperature", 1.5, 0.7),
        ("top_k", 5, 0),
    ]
    assert "temperature 0.7" in served.changes[0].why
    refusing = covered(sampling_beyond_certificate="refuse")
    with pytest.raises(ApiError, match="temperature=0.7 is outside.*greedy decoding"):
        refusing.sampling(temperature=0.7, top_p=0.5)


# Told to the client, the operator and through the proxy.


def post(client, **body):
    return client.post(CHAT, json={"model": MODEL, "messages": CALM, **body})


def test_a_client_is_told_in_a_header_and_in_each_choice(tmp_path):
    path = tmp_path / "audit.jsonl"
    with TestClient(create_app(staged_engine(), settings_of(audit=path))) as client:
        kept = post(client, max_tokens=4096)
        plain = post(client, max_tokens=20)
    assert kept.headers[CHANGED] == "max_tokens=62" and CHANGED not in plain.headers
    choice = kept.json()["choices"][0]
    assert choice["safety"]["certificate"]["status"] == "valid"
    (change,) = choice["safety"]["changed"]
    assert (change["param"], change["asked"], change["served"]) == ("max_tokens", 4096, 62)
    assert "changed" not in plain.json()["choices"][0]["safety"]
    record = json.loads(path.read_text().splitlines()[0])
    assert record["changed"] == {"max_tokens": [4096, 62]}
    passed = safety_of(choice["safety"], staged_engine().facts.bundle[:16])
    assert passed["changed"] == [{"param": "max_tokens", "asked": 4096, "served": 62}]


def test_a_void_certificate_says_why_and_a_kept_temperature_is_greedy():
    settings = settings_of(cap_beyond_certificate="void", sampling_beyond_certificate="keep")
    with TestClient(create_app(staged_engine(), settings)) as client:
        answer = post(client, max_tokens=100, temperature=1.9, seed=1)
    choice = answer.json()["choices"][0]
    assert choice["message"]["content"] == CALM_TEXT
    assert answer.headers[CHANGED] == "temperature=0"
    certificate = choice["safety"]["certificate"]
    assert certificate["status"] == "void" and "max_new_tokens=100" in certificate["why"]
