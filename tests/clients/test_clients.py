"""Vendors' clients as shipped: OpenAI's, Anthropic's, LangChain's, against a started server.

Needs the extra `clients`; run with `-m clients`.
"""

from __future__ import annotations

import asyncio
import contextlib

import pytest

from tests.clients.conftest import CALM, KEY, MODEL

pytestmark = [pytest.mark.clients, pytest.mark.filterwarnings("default")]


@pytest.fixture
def openai(address):
    sdk = pytest.importorskip("openai")
    with sdk.OpenAI(base_url=f"{address}/v1", api_key=KEY) as client:
        yield client


def test_openai_answers_whole_and_streamed(openai):
    whole = openai.chat.completions.create(model=MODEL, messages=CALM)
    assert whole.choices[0].finish_reason == "stop" and whole.usage.total_tokens > 0
    stream = openai.chat.completions.create(
        model=MODEL, messages=CALM, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    said = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert said == whole.choices[0].message.content
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens


def test_openai_sees_a_trip_as_content_filter_with_its_refusal(openai, attack):
    choice = openai.chat.completions.create(model=MODEL, messages=attack).choices[0]
    assert choice.finish_reason == "content_filter" and choice.message.refusal
    assert choice.message.content.endswith(choice.message.refusal)
    assert choice.message.content.count(choice.message.refusal) == 1
    assert choice.model_extra["safety"]["action"] in ("rewound", "refused")


def test_openai_streams_a_refusal_as_content_once(openai, attack):
    import openai as sdk

    whole = openai.chat.completions.create(model=MODEL, messages=attack).choices[0].message
    stream = openai.chat.completions.create(model=MODEL, messages=attack, stream=True)
    choices = [chunk.choices[0] for chunk in stream]
    assert "".join(c.delta.content or "" for c in choices) == whole.content
    assert "".join(c.delta.refusal or "" for c in choices) == whole.refusal
    assert choices[-1].finish_reason == "content_filter"
    # The helper may raise at the end of such a stream; what it had gathered by then is right.
    gathered = []
    with (
        contextlib.suppress(sdk.ContentFilterFinishReasonError),
        openai.chat.completions.stream(model=MODEL, messages=attack) as helped,
    ):
        for event in helped:
            if event.type == "chunk":
                message = event.snapshot.choices[0].message
                gathered.append((message.content, message.refusal))
    assert gathered[-1] == (whole.content, whole.refusal)


def test_openai_s_messages_may_be_handed_back_as_they_are(openai, attack):
    message = openai.chat.completions.create(model=MODEL, messages=attack).choices[0].message
    again = openai.chat.completions.create(model=MODEL, messages=[*CALM, message, *CALM])
    apart = [*CALM, {"role": "assistant", "content": message.content}, *CALM]
    plain = openai.chat.completions.create(model=MODEL, messages=apart)
    assert again.usage.prompt_tokens == plain.usage.prompt_tokens


def test_openai_s_parse_raises_on_a_trip_and_not_otherwise(openai, attack):
    import openai as sdk

    calm = openai.chat.completions.parse(model=MODEL, messages=CALM)
    assert calm.choices[0].message.content
    with pytest.raises(sdk.ContentFilterFinishReasonError):
        openai.chat.completions.parse(
            model=MODEL, messages=attack, response_format={"type": "json_object"}
        )


def test_openai_s_stream_helper_raises_on_a_trip(openai, attack):
    import openai as sdk

    with (
        pytest.raises(sdk.ContentFilterFinishReasonError),
        openai.chat.completions.stream(model=MODEL, messages=attack) as stream,
    ):
        for _ in stream:
            pass
        stream.get_final_completion()


def test_openai_async(address):
    sdk = pytest.importorskip("openai")

    async def main():
        async with sdk.AsyncOpenAI(base_url=f"{address}/v1", api_key=KEY) as client:
            asked = [
                client.chat.completions.create(model=MODEL, messages=CALM, seed=1) for _ in range(4)
            ]
            return [answer.choices[0].message.content for answer in await asyncio.gather(*asked)]

    answers = asyncio.run(main())
    assert len(set(answers)) == 1 and answers[0]


def test_openai_s_errors_are_its_own(openai, address):
    import openai as sdk

    with pytest.raises(sdk.BadRequestError, match="tools"):
        openai.chat.completions.create(
            model=MODEL,
            messages=CALM,
            tools=[{"type": "function", "function": {"name": "f", "parameters": {}}}],
        )
    with pytest.raises(sdk.BadRequestError, match="top_logprobs"):
        openai.chat.completions.create(model=MODEL, messages=CALM, logprobs=True, top_logprobs=2)
    with pytest.raises(sdk.NotFoundError):
        openai.chat.completions.create(model="another", messages=CALM)
    with pytest.raises(sdk.BadRequestError, match="tighten"):
        openai.chat.completions.create(
            model=MODEL, messages=CALM, extra_body={"safety": {"holdback_tokens": 0}}
        )
    with (
        sdk.OpenAI(base_url=f"{address}/v1", api_key="wrong") as stranger,
        pytest.raises(sdk.AuthenticationError),
    ):
        stranger.models.list()


def test_openai_takes_a_tighter_policy_completions_and_models(openai, attack):
    choice = openai.chat.completions.create(
        model=MODEL, messages=attack, extra_body={"safety": {"redirect": "stop"}}
    ).choices[0]
    assert choice.model_extra["safety"]["action"] == "stopped" and not choice.message.refusal
    text = openai.completions.create(model=MODEL, prompt="Sure,", max_tokens=8, logprobs=0)
    assert len(text.choices[0].logprobs.tokens) <= 8
    assert [model.id for model in openai.models.list()] == [MODEL]


def test_openai_s_responses_whole_streamed_and_handed_back(openai, attack):
    from openai.types.responses import Response

    calm = openai.responses.create(model=MODEL, input=CALM, instructions="You help.")
    Response.model_validate(calm.model_dump(mode="json"))
    assert calm.status == "completed" and calm.output_text
    again = openai.responses.create(model=MODEL, input=[*CALM, *calm.output, *CALM])
    assert again.usage.input_tokens > calm.usage.input_tokens
    tripped = openai.responses.create(model=MODEL, input=attack)
    assert tripped.status == "incomplete"
    assert tripped.incomplete_details.reason == "content_filter"
    refusal = tripped.model_extra["safety"]["refusal"]
    assert refusal and tripped.output_text.endswith(refusal)
    assert tripped.output_text.count(refusal) == 1
    events = list(openai.responses.create(model=MODEL, input=attack, stream=True))
    said = [e.delta for e in events if e.type == "response.output_text.delta"]
    assert "".join(said) == tripped.output_text and events[-1].type == "response.incomplete"
    with openai.responses.stream(model=MODEL, input=CALM) as stream:
        for _ in stream:
            pass
        assert stream.get_final_response().output_text
    import openai as sdk

    with pytest.raises(sdk.NotFoundError, match="embeddings is not served"):
        openai.embeddings.create(model=MODEL, input="a")


def test_anthropic_counts_as_it_answers(address):
    sdk = pytest.importorskip("anthropic")
    with sdk.Anthropic(base_url=address, api_key=KEY) as client:
        counted = client.messages.count_tokens(model=MODEL, messages=CALM, system="You help.")
        answered = client.messages.create(
            model=MODEL, max_tokens=4, messages=CALM, system="You help."
        )
    assert counted.input_tokens == answered.usage.input_tokens


def test_anthropic_answers_and_refuses(address, attack):
    sdk = pytest.importorskip("anthropic")
    with sdk.Anthropic(base_url=address, api_key=KEY) as client:
        calm = client.messages.create(model=MODEL, max_tokens=64, messages=CALM)
        assert calm.stop_reason == "end_turn" and calm.content[0].text
        whole = client.messages.create(model=MODEL, max_tokens=128, messages=attack)
        assert whole.stop_reason == "refusal"
        with client.messages.stream(model=MODEL, max_tokens=128, messages=attack) as stream:
            said = "".join(stream.text_stream)
            final = stream.get_final_message()
        assert final.stop_reason == "refusal" and said == whole.content[0].text
        refusal = whole.model_extra["safety"]["refusal"]
        assert refusal and said.endswith(refusal) and said.count(refusal) == 1
        assert [block.type for block in final.content] == ["text"]
        with pytest.raises(sdk.NotFoundError):
            client.messages.create(model="another", max_tokens=8, messages=CALM)


def test_langchain_answers_and_streams(address, attack):
    langchain = pytest.importorskip("langchain_openai")
    chat = langchain.ChatOpenAI(base_url=f"{address}/v1", api_key=KEY, model=MODEL)
    calm = chat.invoke([("user", CALM[0]["content"])])
    assert calm.response_metadata["finish_reason"] == "stop" and calm.content
    pairs = [(message["role"], message["content"]) for message in attack]
    tripped = chat.invoke(pairs)
    assert tripped.response_metadata["finish_reason"] == "content_filter"
    refusal = tripped.additional_kwargs["refusal"]
    assert refusal and tripped.content.endswith(refusal) and tripped.content.count(refusal) == 1
    newest = langchain.ChatOpenAI(
        base_url=f"{address}/v1", api_key=KEY, model=MODEL, use_responses_api=True
    )
    assert newest.invoke(pairs).text.endswith(refusal)
    pieces = list(chat.stream(pairs))
    assert "".join(piece.content for piece in pieces) == tripped.content
    reasons = [piece.response_metadata.get("finish_reason") for piece in pieces]
    assert "content_filter" in reasons
