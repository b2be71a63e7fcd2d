"""Streams of an upstream, event by event: hold-back, marks, and whatever else may arrive."""

from __future__ import annotations

import dataclasses
import json
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from safe_decode.serving.proxy.anthropic_relay import MessageRelay
from safe_decode.serving.proxy.openai_relay import Relay
from safe_decode.serving.proxy.requests import CHAT, COMPLETIONS, MESSAGES
from safe_decode.serving.proxy.wire import EventReader
from safe_decode.serving.schemas.notice import WITHHELD
from tests.proxying import MARK, asking, chunk, ended, ours, shown_in

CLOSED = {"action": "closed"}
LEAK = "LEAK"


def relay(holdback_tokens=0, **ask):
    kind = MessageRelay if ask.get("path") == MESSAGES else Relay
    return kind(asking(**ask), bundle=MARK, holdback_tokens=holdback_tokens)


def told(to, *events):
    return [
        c for e in events for c in to.take(e if isinstance(e, bytes) else json.dumps(e).encode())
    ]


def until_wrong(to, *events):
    """What is told until an event is refused, and then at the close."""
    shown = []
    try:
        for event in events:
            data = event if isinstance(event, bytes) else json.dumps(event).encode()
            for one in to.take(data):
                shown.append(one)
    except ValueError:
        return [*shown, *to.close(CLOSED)], True
    return [*shown, *to.close(CLOSED)], False


def test_the_hold_back_counts_ids_and_not_chunks():
    to = relay(3)
    assert shown_in(told(to, chunk("a", [1]))) == ""
    assert shown_in(told(to, chunk("", []))) == ""
    assert shown_in(told(to, chunk("bc", [2, 3]))) == ""
    assert shown_in(told(to, chunk("d", [4]))) == "a"
    assert not to.is_over
    end = told(to, ended())
    assert shown_in(end) == "bcd" and to.is_over
    assert end[-1]["choices"][0] == {
        "index": 0,
        "delta": {},
        "logprobs": None,
        "finish_reason": "stop",
        "safety": ours(),
    }
    assert list(to.close({})) == [] and told(to, chunk("e", [5])) == []


@pytest.mark.parametrize("end", [ended("content_filter", "stopped"), ended("stop", "refused")])
def test_what_trips_within_the_hold_back_is_not_shown(end):
    end["choices"][0]["delta"] = {"content": "c"}
    end["choices"][0]["token_ids"] = [3]
    shown = told(relay(3), chunk("a", [1]), chunk("b", [2]), end)
    assert shown_in(shown) == ""
    assert shown[-1]["choices"][0]["finish_reason"] == "content_filter"


@pytest.mark.parametrize(
    "turn",
    [
        chunk("", [9], refusal="No."),
        chunk("No.", [9], refusal="No."),
        chunk("No.", [9], safety={"by": "redirect"}),
        chunk("", safety={"trip": {"dropped": [LEAK]}}),
        chunk("", safety={"action": "rewound"}),
    ],
)
def test_a_turn_is_known_by_each_of_its_signs(turn):
    to = relay(3)
    shown = told(to, chunk("a", [1]), chunk("b", [2]), turn)
    assert shown_in(shown) == "" and LEAK not in str(shown)
    # The guard's own words wait as others do, and are shown once the end is marked.
    shown += told(to, ended("content_filter", "rewound"))
    said = turn["choices"][0]["delta"]
    assert shown_in(shown) == said.get("content", "")
    assert shown_in(shown, "refusal") == said.get("refusal", "")


def test_that_an_answer_was_withheld_is_said_at_its_end():
    notice = chunk(WITHHELD, refusal=WITHHELD)
    to = relay(3)
    assert shown_in(told(to, notice)) == ""
    end = told(to, ended("content_filter", "stopped"))
    assert shown_in(end) == shown_in(end, "refusal") == WITHHELD
    assert end[-1]["choices"][0]["delta"] == {}
    asked = dataclasses.replace(asking(), body={"response_format": {"type": "json_object"}})
    data = told(Relay(asked, bundle=MARK, holdback_tokens=0), notice, ended("content_filter"))
    assert (shown_in(data), shown_in(data, "refusal")) == ("", WITHHELD)
    # Where text was shown nothing was withheld; a stream that is closed says it too.
    shown = told(relay(), chunk("a", [1]), notice, ended("content_filter", "stopped"))
    assert shown_in(shown) == "a"
    shown, _ = until_wrong(relay(), notice, ended("content_filter", "flagged"))
    assert shown_in(shown) == WITHHELD and shown[-1]["choices"][0]["safety"] == CLOSED


def test_words_beside_a_refusal_are_not_shown():
    shown = told(relay(), chunk("b", [2], refusal="No."), ended("content_filter", "refused"))
    assert (shown_in(shown), shown_in(shown, "refusal")) == ("", "No.")
    shown = told(relay(), chunk("b", [2], safety={"trip": {"x": 1}}), ended("stop", "rewound"))
    assert shown_in(shown) == ""


def test_the_model_does_not_speak_on_after_its_trip():
    shown, is_wrong = until_wrong(relay(), chunk("", [1], refusal="No."), chunk("b", [2]))
    assert is_wrong and shown_in(shown) == "" and shown_in(shown, "refusal") == "No."
    _, is_wrong = until_wrong(relay(), chunk("", [1], refusal="No."), chunk("", [2]))
    assert is_wrong


@pytest.mark.parametrize(
    "last",
    [
        b"[DONE]",
        b"{",
        b"[]",
        b"\xff",
        b"[" * 100_000,
        b'{"choices": NaN}',
        b'{"choices": [{"index": 0, "delta": {"content": "\\ud800"}, "token_ids": [1]}]}',
        chunk(finish_reason="stop"),
        chunk(finish_reason="stop", safety={}),
        chunk(finish_reason="stop", safety=ours(bundle="theirs")),
        chunk(finish_reason="stop", safety=ours("flagged")),
        chunk(finish_reason="stop", safety={**ours(), "unprotected": True}),
        chunk(finish_reason="stop", safety=ours(alpha=10**400)),
        chunk(finish_reason="tool_calls", safety=ours()),
        chunk(finish_reason=7, safety=ours()),
        chunk("text without ids"),
        chunk("", refusal="refusal without ids"),
        chunk("x" * 2000, [1]),
        chunk("x", [True]),
        chunk("x", [-1]),
        chunk("x", ["1"]),
        chunk("x", [1.5]),
        {"choices": [{"index": 0, "delta": {"content": "x"}, "token_ids": "1"}]},
        {"choices": [{"index": 0, "delta": {"content": ["x"]}, "token_ids": [1]}]},
        {"choices": [{"delta": {"content": "x"}, "token_ids": [1]}]},
        chunk("x", [1], index=1),
        chunk("x", [1], index=-1),
        chunk("x", [1], index=10**30),
        chunk("x", [1], index=True),
        chunk("x", [1], index="0"),
        {"choices": ["x"]},
        {"choices": "x"},
        {"choices": {"0": "x"}},
        {"choices": [chunk("x", [1])["choices"][0]] * 2},
        {"error": {"message": "gone"}},
        {"choices": [{"index": 0, "delta": "x"}]},
    ],
)
def test_whatever_is_malformed_closes_the_stream(last):
    shown, is_wrong = until_wrong(relay(2), chunk("a", [1]), last)
    assert is_wrong == (last != b"[DONE]")
    assert shown_in(shown) == ""
    end = shown[-1]["choices"][0]
    assert end["safety"] == CLOSED and end["finish_reason"] == "content_filter"


def test_a_choice_that_goes_on_after_its_end_and_one_that_never_opened_are_closed():
    to = relay(n_choices=2)
    shown, is_wrong = until_wrong(to, chunk("a", [1]), ended(), ended())
    assert is_wrong and [end.reason for end in to.ends] == ["stop", "content_filter"]
    last = shown[-1]["choices"][0]
    assert last["index"] == 1 and last["safety"] == CLOSED


def test_chunks_hold_nothing_but_known_fields():
    spoken = {"reasoning_content": LEAK, "tool_calls": [{"function": {"arguments": LEAK}}]}
    spoken |= {"function_call": {"arguments": LEAK}, "audio": {"transcript": LEAK}, "role": LEAK}
    head = {"id": LEAK, "model": LEAK, "system_fingerprint": LEAK, "object": LEAK, "x": LEAK}
    events = [
        {**head, "choices": [], "content": LEAK, **spoken},
        {**head, "choices": None},
        {**head, "choices": [{"index": 0, "delta": spoken, "logprobs": {"content": []}, **spoken}]},
        {**head, **chunk("a", [1], logprobs={"content": [{"token": LEAK, "logprob": -1}]})},
        {**head, **ended(stop_reason=LEAK), "usage": {"prompt_tokens": LEAK}},
    ]
    shown, is_wrong = until_wrong(relay(), *events)
    assert not is_wrong and shown_in(shown) == "a" and LEAK not in json.dumps(shown)


@pytest.mark.parametrize(
    "logprobs",
    [
        {"content": [{"token": "a", "logprob": -1}] * 2},
        {"content": [{"token": LEAK * 500, "logprob": -1}]},
        {"content": [{"token": "a", "logprob": "x"}]},
        {"content": [{"token": "a", "logprob": -1, "top_logprobs": [{"token": LEAK}] * 21}]},
        {"content": LEAK},
        LEAK,
    ],
)
def test_log_probabilities_have_no_more_tokens_than_ids(logprobs):
    fine = {"content": [{"token": "a", "logprob": -1, "bytes": [76], "x": LEAK}]}
    shown = told(relay(1, has_logprobs=True), chunk("a", [1], logprobs=fine))
    assert all(c["choices"][0]["logprobs"] is None for c in shown)  # held back with its text
    event = chunk("a", [1], logprobs=logprobs)
    shown, is_wrong = until_wrong(relay(has_logprobs=True), event)
    assert is_wrong and LEAK not in json.dumps(shown)


@pytest.mark.parametrize("counts", [False, True])
def test_usage_counts_what_was_shown(counts):
    usage = {"prompt_tokens": 5, "completion_tokens": 99, "completion_tokens_details": {"x": LEAK}}
    to = relay(3, counts_usage=counts)
    events = [chunk("ab", [1, 2]), ended("content_filter", "stopped")]
    shown = told(to, *events)
    assert to.is_over == (not counts)
    shown += [*told(to, {"choices": [], "usage": usage}), *to.close(CLOSED)]
    assert LEAK not in json.dumps(shown)
    want = {"prompt_tokens": 5, "completion_tokens": 0, "total_tokens": 5}
    assert shown[-1].get("usage") == (want if counts else None)
    assert to.is_over


def test_completions_are_written_in_their_shape():
    def text(said, ids, **choice):
        return {"choices": [{"index": 0, "text": said, "token_ids": ids, **choice}]}

    to = relay(1, path=COMPLETIONS, keeps_ids=True)
    shown = told(to, text("a", [1]), text("b", [2]))
    assert shown[0]["choices"] == [
        {"index": 0, "text": "a", "logprobs": None, "finish_reason": None, "token_ids": [1]}
    ]
    shown = [*told(to, text("", [3], refusal="No.")), *to.close(CLOSED)]
    (last,) = shown
    assert last["object"] == "text_completion" and last["choices"][0] == {
        "index": 0,
        "text": "",
        "logprobs": None,
        "finish_reason": "content_filter",
        "safety": CLOSED,
    }


# Anthropic's shape.


def start(**message):
    return {"type": "message_start", "message": {"content": [], **message}}


def block(**content):
    told = {"type": "text", "text": "", **content}
    return {"type": "content_block_start", "index": 0, "content_block": told}


def delta(text, *ids, **fields):
    body = {"type": "text_delta", "text": text}
    told = {"type": "content_block_delta", "index": 0, "delta": body, "token_ids": list(ids)}
    return {**told, **fields}


STOP = {"type": "content_block_stop", "index": 0}
OPENING = (start(usage={"input_tokens": 7}), block())


def message_end(reason="end_turn", action="released", **fields):
    told = {"type": "message_delta", "delta": {"stop_reason": reason}, "safety": ours(action)}
    return {**told, **fields}


def said_in(events):
    return "".join(e["delta"]["text"] for e in events if e["type"] == "content_block_delta")


def test_the_hold_back_of_messages_counts_ids():
    to = relay(3, path=MESSAGES)
    opened = told(to, *OPENING, {"type": "ping", "words": LEAK})
    assert [e["type"] for e in opened] == ["message_start", "content_block_start", "ping"]
    assert opened[0]["message"]["usage"]["input_tokens"] == 7 and LEAK not in str(opened)
    assert said_in(told(to, delta("a", 1))) == ""
    assert said_in(told(to, delta("bcd", 2, 3, 4))) == "a"
    assert told(to, STOP) == [] and not to.is_over
    shown = told(to, message_end())
    assert said_in(shown) == "bcd" and to.is_over
    kinds = ["content_block_delta", "content_block_stop", "message_delta", "message_stop"]
    assert [e["type"] for e in shown] == kinds
    assert shown[-2]["usage"] == {"input_tokens": 7, "output_tokens": 4}
    assert list(to.close({})) == [] and told(to, {"type": "message_stop"}) == []


def test_words_of_the_guard_are_shown_and_what_they_replace_is_not():
    to = relay(3, path=MESSAGES)
    refusal = delta("No.", 9, safety={"by": "redirect", "tokens": [LEAK]})
    shown = told(to, *OPENING, delta("ab", 1, 2), refusal)
    assert said_in(shown) == ""
    shown += told(to, STOP, message_end("refusal", "refused"))
    assert said_in(shown) == "No." and LEAK not in str(shown)
    shown, is_wrong = until_wrong(relay(path=MESSAGES), *OPENING, refusal, delta("c", 3))
    assert is_wrong and said_in(shown) == "No."


def test_that_a_message_was_withheld_is_said_once_its_end_is_marked():
    to = relay(3, path=MESSAGES)
    notice = {**delta(WITHHELD, safety={"by": "redirect"}), "token_ids": []}
    assert said_in(told(to, *OPENING, notice, STOP)) == ""
    shown = told(to, message_end("refusal", "stopped"))
    assert said_in(shown) == WITHHELD and shown[-2]["usage"]["output_tokens"] == 0


@pytest.mark.parametrize("end", [message_end("refusal"), message_end("end_turn", "stopped")])
def test_a_refusal_without_words_drops_what_waits(end):
    safety = {**end["safety"], "refusal": "No."}
    shown = told(
        relay(3, path=MESSAGES), *OPENING, delta("ab", 1, 2), STOP, {**end, "safety": safety}
    )
    assert said_in(shown) == "" and shown[-2]["delta"]["stop_reason"] == "refusal"
    assert shown[-2]["safety"]["refusal"] == "No."


@pytest.mark.parametrize(
    "last",
    [
        None,
        message_end(),  # before its block has stopped
        [STOP, message_end(safety=None)],
        [STOP, message_end(safety=ours(bundle="theirs"))],
        [STOP, message_end("tool_use")],
        [
            STOP,
            message_end("stop_sequence", delta={"stop_reason": "end_turn", "stop_sequence": "x"}),
        ],
        [STOP, STOP],
        [STOP, delta("b", 2)],
        {"type": "content_block_stop", "index": 1},
        {"type": "message_stop"},
        {"type": "error", "error": {"message": "gone"}},
        {"type": "something", "text": "new"},
        {},
        delta("text without ids"),
        delta("x" * 2000, 1),
        delta("a", 1, index=1),
        delta("a", 1, delta={"type": "input_json_delta", "partial_json": "x"}),
        delta("a", 1, delta={"type": "thinking_delta", "text": "x"}),
        start(),
        block(),
        b"{",
        b"[]",
    ],
)
def test_a_message_that_does_not_say_how_it_was_guarded_is_closed(last):
    events = last if isinstance(last, list) else [] if last is None else [last]
    shown, is_wrong = until_wrong(relay(2, path=MESSAGES), *OPENING, delta("a", 1), *events)
    assert is_wrong == (last is not None)
    assert said_in(shown) == ""
    assert [e["type"] for e in shown[-3:]] == [
        "content_block_stop",
        "message_delta",
        "message_stop",
    ]
    assert shown[-2]["delta"]["stop_reason"] == "refusal" and shown[-2]["safety"] == CLOSED


@pytest.mark.parametrize(
    "events",
    [
        [start(content=[{"text": LEAK}])],
        [start(), block(text=LEAK)],
        [start(), block(type="tool_use", name=LEAK)],
        [start(), {**block(), "index": 1}],
        [block()],
        [delta(LEAK, 1)],
        [start(), delta(LEAK, 1)],
        [start(id=LEAK, model=LEAK, role=LEAK, usage={"input_tokens": LEAK})],
    ],
)
def test_openings_say_nothing_and_stand_in_order(events):
    shown, is_wrong = until_wrong(relay(path=MESSAGES), *events)
    assert is_wrong and LEAK not in json.dumps(shown)
    kinds = [e["type"] for e in shown]
    assert kinds == [
        *("message_start", "content_block_start"),
        *("content_block_stop", "message_delta", "message_stop"),
    ]


# Server-sent events.


@pytest.mark.parametrize("newline", [b"\n", b"\r\n", b"\r"])
@given(cut=st.integers(1, 7))
def test_events_are_found_however_they_are_cut(newline, cut):
    lines = [b": hello", b"event: x", b"data: a", b"data:b", b"", b"", b"id: 1", b"", b"data", b""]
    stream = newline.join([*lines, b"data: never ended", b""])
    reader = EventReader(100)
    pieces = [stream[i : i + cut] for i in range(0, len(stream), cut)]
    assert [event for piece in pieces for event in reader.take(piece)] == [b"a\nb", b""]


@pytest.mark.parametrize("piece", [b"data: 0123456789", b"data: 1\ndata: 2\n", b": 123\n"])
def test_an_event_has_a_bound_and_a_stream_of_them_has_none_here(piece):
    reader = EventReader(64)
    for _ in range(100):
        assert len(reader.take(piece + b"\n\n")) == piece.count(b"data") / max(
            1, piece.count(b"data")
        )
    with pytest.raises(ValueError, match="larger than 64 bytes"):
        for _ in range(100):
            reader.take(piece.rstrip(b"\n") if piece[:1] == b":" else piece)


# Anything at all.

NAMES = ("choices", "index", "delta", "finish_reason", "safety", "token_ids", "logprobs", "usage")
NAMES += ("type", "message", "content_block", "error", "tool_calls", "certificate", "x")
JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.just(LEAK) | st.just(""),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(NAMES), inner),
    max_leaves=6,
)
SPLITS = st.lists(st.integers(1, 200), min_size=1, max_size=4)
NEWLINES = st.sampled_from([b"\n", b"\r\n", b"\r"])


@st.composite
def choice_events(draw, path):
    """An event of a stream: sound, beside the point, or with one thing wrong."""
    number = draw(st.integers(0, 10**6))
    ids = draw(st.lists(st.integers(0, 99), max_size=3))
    text = f"<{number}>" if ids else ""
    safety = draw(st.sampled_from([None, ours(), ours("rewound"), ours(bundle="theirs")]))
    if path == MESSAGES:
        event = draw(
            st.sampled_from(
                [*OPENING, delta(text, *ids), delta(text, *ids), STOP, message_end(safety=safety)]
            )
        )
        inner = event.get("delta") or event.get("message") or {}
    else:
        box = {"text": text} if path == COMPLETIONS else {"delta": {"content": text}}
        one = {"index": draw(st.integers(0, 1)), "token_ids": ids, **box}
        if draw(st.integers(0, 3)) == 0:
            reason = draw(st.sampled_from(["stop", "content_filter"]))
            one |= {"finish_reason": reason, "safety": safety}
        event = {"choices": [one]}
        inner = one
    event = json.loads(json.dumps(event))
    match draw(st.sampled_from(["sound", "sound", "sound", "beside", "wrong", "junk"])):
        case "beside":  # fields that nobody knows, at every level
            event |= {"reasoning_content": LEAK, "words": draw(JUNK), "id": LEAK}
            for one in event.get("choices", ()):
                one |= {"tool_calls": [LEAK], "audio": {"transcript": LEAK}}
        case "wrong":
            name = draw(st.sampled_from(sorted({*event, *inner, "safety"} - {"content", "text"})))
            target = event if name in event else event.get("choices", [event])[0]
            target[name] = draw(JUNK)
        case "junk":
            event = draw(JUNK)
    return event


def shown_texts(path, shown):
    """Pairs of a choice and the text that it shows."""
    for one in shown:
        if path == MESSAGES:
            yield 0, one.get("delta", {}).get("text") or ""
        for choice in one.get("choices", ()):
            said = choice if path == COMPLETIONS else choice["delta"]
            yield choice["index"], said.get("text" if path == COMPLETIONS else "content") or ""


def spoken(path, event):
    """Triples of choice, text and number of ids that an event speaks of."""
    if not isinstance(event, dict):
        return
    choices = [event] if path == MESSAGES else event.get("choices")
    for one in choices if isinstance(choices, list) else ():
        if isinstance(one, dict) and isinstance(one.get("token_ids"), list):
            box = one if path == COMPLETIONS else one.get("delta")
            text = box.get("text" if path != CHAT else "content") if isinstance(box, dict) else ""
            yield one.get("index"), text, len(one["token_ids"])


@settings(max_examples=80, deadline=None)
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS, MESSAGES])
@given(data=st.data())
def test_whatever_arrives_no_text_passes_without_hold_back_or_mark_and_streams_end(path, data):
    events = data.draw(st.lists(choice_events(path), max_size=12))
    k = data.draw(st.integers(0, 4))
    if path == MESSAGES and data.draw(st.booleans()):
        events = [*OPENING, *events]
    newline = data.draw(NEWLINES)
    stream = b"".join(b"data: " + json.dumps(event).encode() + newline * 2 for event in events)
    to = relay(k, path=path, n_choices=1 if path == MESSAGES else 2)
    shown = []
    reader, sizes = EventReader(100_000), data.draw(SPLITS)
    try:
        while stream:
            piece, stream = stream[: sizes[0]], stream[sizes[0] :]
            sizes = [*sizes[1:], sizes[0]]
            for event in reader.take(piece):
                shown += to.take(event)
    except ValueError:
        pass
    is_marked = {0: bool(to.ends)} if path == MESSAGES else {}
    for one in shown:
        for choice in one.get("choices", ()):
            is_marked[choice["index"]] = choice["finish_reason"] is not None
    marked_before = dict(is_marked)
    shown += to.close(CLOSED)
    text = json.dumps(shown, allow_nan=False)
    assert LEAK not in text and MARK[::-1] not in text
    # Every choice has one end, and nothing follows it.
    ends = [e for e in shown if e.get("type") == "message_stop"]
    ends += [c["index"] for e in shown for c in e.get("choices", ()) if c["finish_reason"]]
    assert len(ends) == (1 if path == MESSAGES else 2) == len(to.ends)
    assert to.is_over and len(set(map(str, ends))) == len(ends)
    # What is shown has its k ids after it, or a marked end.
    said = [triple for event in events for triple in spoken(path, event)]
    for index, words in shown_texts(path, shown):
        if words and not marked_before.get(index):
            places = [i for i, (c, t, _) in enumerate(said) if t == words and c == index]
            after = max(sum(n for c, _, n in said[i + 1 :] if c == index) for i in places)
            assert after >= k


def test_an_endless_stream_takes_no_memory():
    to, reader = relay(64), EventReader(10_000)
    event = b"data: " + json.dumps(chunk("ab", [1])).encode() + b"\n\n"
    empty = b"data: " + json.dumps(chunk("", [])).encode() + b"\n\n: ping\n\n"
    shown = 0
    for number in range(3000):
        if number == 1000:
            tracemalloc.start()
        for data in reader.take(event + empty):
            shown += len(list(to.take(data)))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert shown > 2900 and peak < 300_000


@pytest.mark.parametrize("counts", [False, True])
def test_each_choice_opens_once_and_nothing_empty_is_sent(counts):
    to = relay(n_choices=2, counts_usage=counts)
    shown = told(to, chunk("", [], index=1), chunk("", [], index=1), chunk("", [], index=0))
    opening = {"role": "assistant", "content": "", "refusal": None}
    assert [c["choices"][0]["index"] for c in shown] == [1, 0]
    assert all(c["choices"][0]["delta"] == opening for c in shown)
    assert all(("usage" in c) == counts for c in shown)
    # Nobody told the usage, so none is made up.
    closing = list(to.close(CLOSED))
    assert [c["choices"][0]["index"] for c in closing] == [0, 1]
    unopened = list(relay().close(CLOSED))
    assert [c["choices"][0]["delta"] for c in unopened] == [opening, {}]


def test_a_stream_is_over_once_every_choice_has_ended_or_it_says_so():
    to = relay(n_choices=2, counts_usage=True)
    told(to, chunk("ab", [1, 2]), ended(), {"choices": [], "usage": {"prompt_tokens": 5}})
    assert not to.is_over
    told(to, ended(index=1))
    assert to.is_over
    (usage,) = to.close(CLOSED)
    assert usage["usage"] == {"prompt_tokens": 5, "completion_tokens": 2, "total_tokens": 7}
    to = relay()
    told(to, b"[DONE]")
    assert to.is_over and told(to, chunk("a", [1])) == []
    to = relay()
    list(to.close(CLOSED))
    assert to.is_over and told(to, chunk("a", [1])) == []


@pytest.mark.parametrize("keeps_ids", [False, True])
def test_events_of_a_message_hold_nothing_but_what_was_asked_for(keeps_ids):
    to = relay(path=MESSAGES, keeps_ids=keeps_ids)
    shown = told(to, *OPENING, delta(""), delta("a", 1, safety={"tokens": [LEAK]}, x=LEAK))
    assert shown[0]["message"]["model"] == "m" and shown[1]["content_block"]["text"] == ""
    said = {"type": "content_block_delta", "index": 0}
    said["delta"] = {"type": "text_delta", "text": "a"}
    ids = {"token_ids": [1]} if keeps_ids else {}
    assert shown[2:] == [{**said, **ids}]
    redirect = told(to, delta("No.", 2, safety={"by": "redirect"}))
    ids = {"token_ids": [2]} if keeps_ids else {}
    said["delta"] = {"type": "text_delta", "text": "No."}
    assert redirect == [{**said, "safety": {"by": "redirect"}, **ids}]


@pytest.mark.parametrize("length", [65_536, 65_537])
def test_the_words_of_a_refusal_have_a_bound(length):
    end = message_end("refusal", safety={**ours("refused"), "refusal": "x" * length})
    shown, is_wrong = until_wrong(relay(path=MESSAGES), *OPENING, STOP, end)
    assert is_wrong == (length > 65_536)
    assert ("x" * 100 in json.dumps(shown)) == (not is_wrong)


def completion(said, ids, **choice):
    return {"choices": [{"index": 0, "text": said, "token_ids": ids, **choice}]}


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_no_log_probabilities_are_none(path):
    event = chunk("a", [1]) if path == CHAT else completion("a", [1])
    shown = told(relay(path=path, has_logprobs=True), event)
    assert shown[-1]["choices"][0]["logprobs"] is None


@pytest.mark.parametrize(
    ("top", "is_fine"),
    [
        ({str(n): -1 for n in range(20)}, True),
        ({str(n): -1 for n in range(21)}, False),
        ({LEAK * 500: -1}, False),
        ({"a": "x"}, False),
        ({"a": 10**10}, False),
        (LEAK, False),
    ],
)
def test_alternatives_of_completions_are_bounded(top, is_fine):
    logprobs = {"tokens": ["a"], "token_logprobs": [None], "text_offset": [0], "x": LEAK}
    event = completion("a", [1], logprobs={**logprobs, "top_logprobs": [top]})
    shown, is_wrong = until_wrong(relay(path=COMPLETIONS, has_logprobs=True), event)
    assert is_wrong != is_fine and LEAK not in json.dumps(shown)
    if is_fine:
        told_top = shown[0]["choices"][0]["logprobs"]["top_logprobs"]
        assert told_top == [top]


def test_a_refusal_of_completions_stands_beside_its_text():
    event = completion("No.", [1], refusal="No.")
    shown = told(relay(path=COMPLETIONS), event)
    assert shown[-1]["choices"][0]["text"] == shown[-1]["choices"][0]["refusal"] == "No."


@pytest.mark.parametrize("number", [2**31, 2**31 - 1])
def test_ids_and_counts_are_bounded(number):
    _, is_wrong = until_wrong(relay(), chunk("a", [number]))
    assert is_wrong == (number == 2**31)
    opening = start(usage={"input_tokens": number})
    _, is_wrong = until_wrong(relay(path=MESSAGES), opening)
    assert is_wrong == (number == 2**31)
