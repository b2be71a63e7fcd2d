"""LiteLLM as shipped, against a started server.

Its pins clash with the others', so it is run from an environment of its own, see .ci/run.
"""

from __future__ import annotations

import pytest

from tests.clients.conftest import CALM, KEY, MODEL, REFUSED

pytestmark = [pytest.mark.clients, pytest.mark.filterwarnings("default")]


def test_litellm_answers_streams_and_maps_the_trip(address, attack):
    litellm = pytest.importorskip("litellm")
    told = {"model": f"openai/{MODEL}", "api_base": f"{address}/v1", "api_key": KEY}
    calm = litellm.completion(messages=CALM, **told)
    assert calm.choices[0].finish_reason == "stop" and calm.choices[0].message.content
    tripped = litellm.completion(messages=attack, **told)
    assert tripped.choices[0].finish_reason == "content_filter"
    said = tripped.choices[0].message.content
    assert said.rstrip().endswith(REFUSED) and said.count(REFUSED) == 1
    chunks = list(litellm.completion(messages=attack, stream=True, **told))
    assert chunks[-1].choices[0].finish_reason == "content_filter"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == said
    shaped = {"model": f"anthropic/{MODEL}", "api_base": address, "api_key": KEY}
    refused = litellm.completion(messages=attack, max_tokens=64, **shaped)
    assert refused.choices[0].finish_reason == "content_filter"
    assert refused.choices[0].message.content == said
    chunks = list(litellm.completion(messages=attack, max_tokens=64, stream=True, **shaped))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == said
