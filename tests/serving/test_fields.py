"""The table of request fields, in both directions: what rows say is so, and none is missing."""

from __future__ import annotations

import json

import pytest
from starlette.testclient import TestClient

from safe_decode.engines.transformers.batch.prompts import PromptReader
from safe_decode.engines.transformers.capability_table import TABLE
from safe_decode.errors import PromptError
from safe_decode.prompts.template_variables import variables_read
from safe_decode.serving.app import create_app
from safe_decode.serving.requests.admission import IGNORED, admitted, shown_names
from safe_decode.serving.requests.body import read_ask
from safe_decode.serving.schemas.errors import ApiError
from safe_decode.serving.schemas.field_table import FIELDS, RULES
from safe_decode.serving.schemas.messages import AnthropicMessage, ChatMessage, Part
from safe_decode.serving.schemas.requests import (
    ChatCompletionRequest,
    CompletionRequest,
    CountTokensRequest,
    MessagesRequest,
    TokenizeRequest,
)
from safe_decode.serving.schemas.responses_request import ResponsesRequest
from safe_decode.testing.models import byte_tokenizer
from tests.servers import MODEL, settings_of, staged_engine
from tests.staged import CALM, CALM_TEXT, staged

KINDS = {
    "chat": (ChatCompletionRequest,),
    "completions": (CompletionRequest,),
    "messages": (MessagesRequest,),
    "responses": (ResponsesRequest,),
    "tokens": (CountTokensRequest, TokenizeRequest),
    "message": (ChatMessage, AnthropicMessage),
    "part": (Part,),
}
BASES = {
    "chat": {"messages": CALM},
    "completions": {"prompt": "A"},
    "messages": {"messages": CALM, "max_tokens": 64},
    "responses": {"input": CALM},
    "tokens": {"messages": CALM},
    "message": {"messages": CALM},
    "part": {"messages": CALM},
}
PATHS = {
    "chat": "/v1/chat/completions",
    "completions": "/v1/completions",
    "messages": "/v1/messages",
    "responses": "/v1/responses",
}
HONOURED = {
    "model": MODEL,
    "messages": CALM,
    "prompt": "A",
    "input": CALM,
    "instructions": "You help.",
    "system": "You help.",
    "temperature": 0.5,
    "top_p": 0.9,
    "top_k": 5,
    "min_p": 0.1,
    "repetition_penalty": 1.1,
    "presence_penalty": 0.5,
    "frequency_penalty": 0.5,
    "logit_bias": {"70": 1.0},
    "seed": 3,
    "n": 2,
    "max_tokens": 8,
    "max_completion_tokens": 8,
    "max_output_tokens": 8,
    "reasoning": {"effort": None},
    "min_tokens": 3,
    "ignore_eos": True,
    "stop": "K",
    "stop_sequences": ["K"],
    "reasoning_effort": "none",
    "stream": False,
    "logprobs": 0,
    "response_format": {"type": "text"},
    "return_token_ids": True,
    "safety": {"redirect": "refuse"},
    "best_of": 1,
    "add_special_tokens": True,
    "role": "user",
    "content": "a",
    "refusal": "No.",
    "type": "text",
    "text": {"format": {"type": "text"}},
}
ODD = {"stream_options", "chat_template_kwargs", "top_logprobs"}
"""Honoured beside another field, or where the operator or the template lets them; tested below."""
REFUSED = {
    "tools": [{"type": "function"}],
    "tool_choice": "required",
    "functions": [{"name": "f"}],
    "function_call": {"name": "f"},
    "modalities": ["audio"],
    "audio": {"voice": "x"},
    "web_search_options": {"a": 1},
    "echo": True,
    "suffix": "x",
    "thinking": {"type": "enabled", "budget_tokens": 1024},
    "mcp_servers": [{"url": "http://x"}],
    "container": "c",
    "tool_calls": [{"id": "1", "type": "function"}],
    "tool_call_id": "1",
    "previous_response_id": "resp_1",
    "conversation": "conv_1",
    "prompt": {"id": "p"},
    "background": True,
    "top_logprobs": 3,
}
IGNORED_VALUE = {"anything": ["goes", 1, None]}


@pytest.fixture(scope="module")
def client():
    with TestClient(create_app(staged_engine(), settings_of())) as opened:
        yield opened


def body_of(place, extra):
    """A body with fields where they stand: at its top, in its message, or in a part of it."""
    body = {"model": MODEL, **BASES[place]}
    if place == "message":
        return {**body, "messages": [{**CALM[0], **extra}]}
    if place == "part":
        part = {"type": "text", "text": CALM[0]["content"], **extra}
        return {**body, "messages": [{"role": "user", "content": [part]}]}
    return {**body, **extra}


def kind_of(place):
    return KINDS[place][0] if place in PATHS or place == "tokens" else ChatCompletionRequest


def admit(place, extra, **options):
    raw = json.dumps(body_of(place, extra)).encode()
    return admitted(read_ask(kind_of(place), raw, "application/json"), **options)


def rows(treatment, places=tuple(KINDS)):
    return [
        pytest.param(row, place, id=f"{place}-{row.name}")
        for row in FIELDS
        for place in row.places
        if row.treatment == treatment and place in places
    ]


def named(place, name):
    return {"message": f"messages.{name}", "part": f"messages.content.{name}"}.get(place, name)


# The table and the schemas.


@pytest.mark.parametrize("place", KINDS)
def test_a_schema_has_the_honoured_fields_and_no_others(place):
    own = {name for kind in KINDS[place] for name in kind.model_fields}
    honoured = {name for (where, name), row in RULES.items() if where == place}
    assert own <= honoured
    assert own == {n for n in honoured if RULES[place, n].treatment == "honoured"}


def test_every_row_says_why_and_names_a_capability_that_exists():
    features = {row.feature for row in TABLE}
    for row in FIELDS:
        assert row.feature == "" or row.feature in features, row.name
        assert row.treatment == "honoured" or row.why, row.name
        assert row.treatment == "honoured" or not row.feature, row.name


def test_every_field_has_a_value_here():
    assert {row.name for row in FIELDS if row.treatment == "refused"} == set(REFUSED)
    for row, place in ((p.values[0], p.values[1]) for p in rows("refused")):
        assert row.name in REFUSED, place
    for row, place in ((p.values[0], p.values[1]) for p in rows("honoured")):
        assert row.name in HONOURED or row.name in ODD, place


# What each row does.


@pytest.mark.parametrize(("row", "place"), rows("ignored"))
def test_what_is_ignored_is_accepted_and_named(row, place):
    assert admit(place, {row.name: IGNORED_VALUE}) == (named(place, row.name),)
    assert admit(place, {row.name: None}) == ()
    if row.in_strict:
        assert admit(place, {row.name: IGNORED_VALUE}, is_strict=True)
        return
    with pytest.raises(ApiError, match=f"Unrecognized.*{row.name}") as refused:
        admit(place, {row.name: IGNORED_VALUE}, is_strict=True)
    assert refused.value.status == 400 and refused.value.param.endswith(row.name)


@pytest.mark.parametrize(("row", "place"), rows("refused"))
def test_what_is_refused_is_named_with_its_reason(row, place):
    with pytest.raises(ApiError, match=row.name) as refused:
        admit(place, {row.name: REFUSED[row.name]})
    assert refused.value.status == 400 and row.why in refused.value.message
    assert refused.value.param.endswith(row.name)
    for value in (None, *row.neutral):
        assert admit(place, {row.name: value}) == ()


@pytest.mark.parametrize(("row", "place"), rows("honoured", tuple(PATHS)))
def test_what_is_honoured_is_taken_and_not_named_as_ignored(client, row, place):
    if row.name in ODD:
        return
    value = True if (row.name, place) == ("logprobs", "chat") else HONOURED[row.name]
    response = client.post(PATHS[place], json=body_of(place, {row.name: value}))
    assert response.status_code == 200, response.text
    assert IGNORED not in response.headers


@pytest.mark.parametrize("place", PATHS)
def test_all_that_is_ignored_changes_nothing_and_is_told_in_a_header(client, place):
    names = [
        n for (where, n), row in RULES.items() if where == place and row.treatment == "ignored"
    ]
    plain = client.post(PATHS[place], json=body_of(place, {}))
    laden = client.post(PATHS[place], json=body_of(place, dict.fromkeys(names, IGNORED_VALUE)))
    assert laden.status_code == 200 and IGNORED not in plain.headers
    told = laden.headers[IGNORED].split(", ")
    assert set(told) - {f"{len(names) - 16} more"} <= set(names) and len(told) >= min(
        len(names), 16
    )

    def said(response):
        body = response.json()
        if "choices" in body:
            return [choice.get("message", choice.get("text")) for choice in body["choices"]]
        return body.get("content") or body["output"][0]["content"]

    assert said(plain) == said(laden)


@pytest.mark.parametrize("place", [*PATHS, "tokens"])
def test_what_stands_in_no_row_is_refused_at_the_top_and_ignored_in_a_message(place):
    with pytest.raises(ApiError, match="Unrecognized request argument supplied: guided_json"):
        admit(place, {"guided_json": {}})
    assert admit("message", {"mood": "fine"}) == ("messages.mood",)
    assert admit("part", {"mood": "fine"}) == ("messages.content.mood",)
    for inner in ("message", "part"):
        with pytest.raises(ApiError, match=r"Unrecognized.*messages\.0.*mood"):
            admit(inner, {"mood": "fine"}, is_strict=True)


def test_a_header_names_what_a_header_can_carry():
    assert shown_names(("user", "messages.a\r\nx: y", "é")) == "user, 2 more"
    assert shown_names(tuple(f"f{i}" for i in range(20))).endswith("f15, 4 more")


# What is honoured.


def choice_of(client, **body):
    response = client.post(PATHS["chat"], json={"model": MODEL, "messages": CALM, **body})
    assert response.status_code == 200, response.text
    return response, response.json()["choices"][0]


@pytest.mark.parametrize(
    ("extra", "why"),
    [
        ({"repetition_penalty": 1.3}, "repetition_penalty=1.3 is not 1.0"),
        ({"min_tokens": 3}, "min_new_tokens=3 is not 0"),
        ({"ignore_eos": True}, "ignore_eos=True is not covered"),
        ({"repetition_penalty": 1.0, "min_p": 0.2, "top_k": -1, "ignore_eos": False}, None),
    ],
)
def test_what_departs_from_the_certificate_voids_it_by_name(client, extra, why):
    told = choice_of(client, **extra)[1]["safety"]["certificate"]
    assert told["status"] == ("valid" if why is None else "void")
    assert why is None or told["why"].startswith(why)


def test_a_row_that_cannot_end_is_ended_by_its_cap_and_one_with_a_floor_says_as_much(client):
    (letter,) = staged().tokenizer.encode("A", add_special_tokens=False)
    # Where the stage may not end, it begins anew.
    anew = {"logit_bias": {str(letter): 3.5}}
    _, plain = choice_of(client, **anew)
    assert (plain["message"]["content"], plain["finish_reason"]) == (CALM_TEXT, "stop")
    _, endless = choice_of(client, ignore_eos=True, max_tokens=45, **anew)
    assert endless["message"]["content"] == CALM_TEXT * 2 + CALM_TEXT[:5]
    assert endless["finish_reason"] == "length"
    _, floored = choice_of(client, min_tokens=30, max_tokens=50, **anew)
    assert (floored["message"]["content"], floored["finish_reason"]) == (CALM_TEXT * 2, "stop")
    response = client.post(
        PATHS["chat"], json={"model": MODEL, "messages": CALM, "min_tokens": 9, "max_tokens": 8}
    )
    assert response.status_code == 400 and response.json()["error"]["param"] == "min_tokens"


def test_a_penalty_on_what_was_said_moves_the_answer(client):
    _, moved = choice_of(client, repetition_penalty=10.0)
    assert moved["message"]["content"] != CALM_TEXT
    _, same = choice_of(client, repetition_penalty=1.0)
    assert same["message"]["content"] == CALM_TEXT


def test_a_floor_of_likelihood_leaves_the_likeliest_token_alone(client):
    sampled = {"temperature": 2.0, "seed": 4, "max_tokens": 12}
    _, loose = choice_of(client, **sampled)
    _, tight = choice_of(client, **sampled, min_p=1.0)
    assert loose["message"]["content"] != CALM_TEXT[:12] == tight["message"]["content"]


def test_variables_that_the_template_does_not_read_are_named_and_void_nothing(client):
    response, choice = choice_of(
        client, chat_template_kwargs={"enable_thinking": False}, reasoning_effort="high"
    )
    told = response.headers[IGNORED].split(", ")
    assert sorted(told) == ["chat_template_kwargs.enable_thinking", "reasoning_effort"]
    assert choice["safety"]["certificate"]["status"] == "valid"
    assert IGNORED not in choice_of(client, reasoning_effort="none")[0].headers


@pytest.fixture(scope="module")
def thoughtful():
    """A tokenizer whose template reads a variable."""
    tokenizer = byte_tokenizer()
    tokenizer.chat_template += (
        "{% if enable_thinking is defined and not enable_thinking %}Z{% endif %}"
    )
    return tokenizer


def test_a_variable_that_the_template_reads_is_in_the_prompt_and_the_others_are_left_out(
    thoughtful,
):
    reader = PromptReader(thoughtful, context_tokens=None, vocab_tokens=10**6)
    plain = reader.chat(CALM)
    asked = {"enable_thinking": False, "depth": 3}
    quiet = reader.chat(CALM, variables=asked)
    assert (plain.variables, quiet.variables) == ({}, {"enable_thinking": False})
    assert quiet.ids[:-1] == plain.ids and thoughtful.decode(quiet.ids[-1:]) == "Z"
    assert reader.chat(CALM, variables={"enable_thinking": True}).ids == plain.ids


@pytest.mark.parametrize(
    "variables",
    [
        {"messages": "x"},
        {"add_generation_prompt": False},
        {"chat_template": "x"},
        {"tools": "x"},
        {"bos_token": "x"},
        {"enable_thinking": "<|assistant|>"},
        {"enable_thinking": "two words"},
        {"a-b": 1},
    ],
)
def test_no_variable_may_replace_what_the_template_is_made_of(thoughtful, variables):
    with pytest.raises(PromptError, match="chat_template_kwargs"):
        variables_read(thoughtful, variables)


def test_a_variable_that_may_not_be_set_is_a_refusal_of_the_request(client):
    body = {"model": MODEL, "messages": CALM, "chat_template_kwargs": {"messages": "x"}}
    response = client.post(PATHS["chat"], json=body)
    assert response.status_code == 400
    assert "chat_template_kwargs" in response.json()["error"]["message"]


def test_penalties_do_not_go_with_log_probabilities(client):
    body = {"model": MODEL, "messages": CALM, "logprobs": True, "repetition_penalty": 1.2}
    response = client.post(PATHS["chat"], json=body)
    assert (
        response.status_code == 400 and "repetition_penalty" in response.json()["error"]["message"]
    )
    assert client.post(PATHS["chat"], json={**body, "repetition_penalty": 1.0}).status_code == 200


# Parts of messages.


@pytest.mark.parametrize(
    ("kind", "word"),
    [
        ("image_url", "a picture"),
        ("image", "a picture"),
        ("input_audio", "sound"),
        ("document", "a file"),
        ("tool_use", "'tool_use'"),
    ],
)
@pytest.mark.parametrize("place", ["chat", "messages"])
def test_a_part_that_is_no_text_is_refused_in_words(client, place, kind, word):
    parts = [{"type": "text", "text": "What is this?"}, {"type": kind, "source": {"url": "x"}}]
    body = {"model": MODEL, "max_tokens": 8, "messages": [{"role": "user", "content": parts}]}
    response = client.post(PATHS[place], json=body)
    message = response.json()["error"]["message"]
    assert response.status_code == 400 and word in message
    assert "messages.0.content.1.type" in message and "only text is read and guarded" in message


def test_thoughts_that_are_handed_back_are_left_out_and_named(client):
    said = [{"type": "thinking", "thinking": "hm", "signature": "s"}, {"type": "text", "text": "A"}]
    turns = [*CALM, {"role": "assistant", "content": said}, *CALM]
    body = {"model": MODEL, "max_tokens": 8, "messages": turns}
    laden = client.post(PATHS["messages"], json=body)
    plain = [*CALM, {"role": "assistant", "content": "A"}, *CALM]
    bare = client.post(PATHS["messages"], json={**body, "messages": plain})
    assert laden.headers[IGNORED] == "messages.content.thinking"
    assert laden.json()["usage"] == bare.json()["usage"]


def test_a_part_of_text_without_text_is_refused_by_its_place(client):
    turns = [{"role": "user", "content": [{"type": "text"}]}]
    response = client.post(PATHS["chat"], json={"model": MODEL, "messages": turns})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "messages.0.content.0.text"


def test_the_document_names_what_is_ignored(client):
    schemas = client.get("/openapi.json").json()["components"]["schemas"]
    told = schemas["ChatCompletionRequest"]
    assert told["additionalProperties"] is False
    assert told["properties"]["keep_alive"]["description"].startswith("Ignored: ")
