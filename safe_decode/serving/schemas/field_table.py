"""The table: what becomes of each field of a request, and why.

Knows the fields of the interfaces that clients speak, and what serving does with each. Does not
know values of one request, models or HTTP; `requests.admission` reads bodies by this table. What
the table does not name is refused at the top of a body, since it may change the answer, and
ignored in a message, where only role and text are read.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import get_args

from safe_decode.serving.schemas.field_rule import (
    FieldPlace,
    FieldRule,
    FieldTreatment,
    honoured,
    ignored,
    refused,
)

__all__ = ["FIELDS", "RULES", "as_rows"]

_CHAT: tuple[FieldPlace, ...] = ("chat",)
_RAW: tuple[FieldPlace, ...] = ("completions",)
_OPENAI: tuple[FieldPlace, ...] = ("chat", "completions")
_CLAUDE: tuple[FieldPlace, ...] = ("messages",)
_RESPONSES: tuple[FieldPlace, ...] = ("responses",)
_TOKENS: tuple[FieldPlace, ...] = ("tokens",)
_NEW: tuple[FieldPlace, ...] = ("chat", "responses")
_ANSWERS: tuple[FieldPlace, ...] = ("chat", "completions", "messages", "responses")
_BODIES: tuple[FieldPlace, ...] = (*_ANSWERS, "tokens")

_BOOKS = "kept by nobody here, and moves no token"
_TEXT_ALONE = "only text is generated and guarded; leave it out"

FIELDS: tuple[FieldRule, ...] = (
    # What is answered, and how its tokens are chosen.
    *honoured(_BODIES, "the one model that is served", "model"),
    *honoured(("chat", "messages", "tokens"), "only role and text are read", "messages"),
    *honoured((*_RAW, "tokens"), "text, or token ids", "prompt"),
    *honoured(_RESPONSES, "text, or items of type message", "input"),
    *honoured(_RESPONSES, "a message of the system before the others", "instructions"),
    *honoured((*_CLAUDE, "tokens"), "a message of the system before the others", "system"),
    *honoured(
        _ANSWERS,
        "left open: as certified; else as sampling_beyond_certificate says",
        temperature="temperature",
        top_p="top_p",
        top_k="top_k",
    ),
    *honoured(_OPENAI, "of drawn tokens alone; else as top_p", min_p="min_p"),
    *honoured(
        _OPENAI,
        "on what stands in the prompt and was said; left open: the model's own",
        repetition_penalty="repetition_penalty",
    ),
    *honoured(
        _OPENAI,
        "on what was said",
        presence_penalty="presence_penalty",
        frequency_penalty="frequency_penalty",
    ),
    *honoured(_OPENAI, "by token id", logit_bias="logit_bias"),
    *honoured(_OPENAI, "the same seed gives the same draws, whoever runs beside it", "seed"),
    *honoured(_OPENAI, "up to the operator's max_choices", "n"),
    # Where it ends.
    *honoured(
        ("chat", "completions", "messages"),
        "beyond the longest certificate: as cap_beyond_certificate says",
        max_tokens="max_new_tokens",
    ),
    *honoured(_CHAT, "goes before max_tokens", max_completion_tokens="max_new_tokens"),
    *honoured(_RESPONSES, "as max_tokens", max_output_tokens="max_new_tokens"),
    *honoured(_OPENAI, "the model cannot end before it", min_tokens="min_new_tokens"),
    *honoured(_OPENAI, "the model cannot end; the cap ends it", ignore_eos="ignore_eos"),
    *honoured(_OPENAI, "at most 4; not shown", stop="stop_strings"),
    *honoured(_CLAUDE, "at most 16; not shown", stop_sequences="stop_strings"),
    # What the template makes of it.
    *honoured(
        _CHAT,
        "numbers and words that the model's template reads; what it does not read is ignored",
        chat_template_kwargs="chat_template_kwargs",
    ),
    *honoured(
        _CHAT,
        "a variable of the template; ignored where the template does not read it",
        reasoning_effort="chat_template_kwargs",
    ),
    *honoured(_RESPONSES, "its effort, as reasoning_effort", reasoning="chat_template_kwargs"),
    # How it is answered.
    *honoured(_RESPONSES, "the format text alone; its verbosity is ignored", "text"),
    *honoured(_ANSWERS, "", "stream"),
    *honoured(_NEW, "include_usage; other options are ignored", "stream_options"),
    *honoured(_RAW, "include_usage; other options are ignored", "stream_options"),
    *honoured(_OPENAI, "of the chosen tokens", "logprobs"),
    *honoured(_CHAT, "only where the operator sets expose_alternatives", "top_logprobs"),
    *honoured(_CHAT, "JSON only where the operator sets allow_json", "response_format"),
    *honoured(("chat", "completions", "messages"), "ids of what is shown", "return_token_ids"),
    *honoured(_ANSWERS, "may tighten the guard, never loosen it", "safety"),
    *honoured(_RAW, "as n, which is how many are returned", "best_of"),
    *honoured(_TOKENS, "of a prompt; default true", "add_special_tokens"),
    # What changes no token of the answer.
    *ignored(_ANSWERS, _BOOKS, "metadata", "service_tier", in_strict=True),
    *ignored(_NEW, _BOOKS, "store", in_strict=True),
    *ignored(("chat", "completions", "responses"), _BOOKS, "user", in_strict=True),
    *ignored(_CHAT, "no tool is called", "parallel_tool_calls", in_strict=True),
    *ignored(_RESPONSES, "no tool is called", "parallel_tool_calls", "max_tool_calls"),
    *ignored(
        _ANSWERS,
        _BOOKS,
        *("safety_identifier", "prompt_cache_key", "prompt_cache_retention", "session_id"),
        *("conversation_id", "chat_id", "request_id", "trace_id"),
    ),
    *ignored(
        _ANSWERS,
        "the model stays loaded, with the context that it has",
        *("keep_alive", "num_ctx"),
    ),
    *ignored(_ANSWERS, "caches hold no answer", "cache_prompt", "cache_salt", "cache_control"),
    *ignored(_ANSWERS, "rows run in the order in which they came", "priority"),
    *ignored(_CHAT, "nothing here reads it", "verbosity"),
    *ignored(_CHAT, "a guess may save time and changes no token", "prediction"),
    *ignored(_RESPONSES, "what it names is not kept here", "include"),
    *ignored(_RESPONSES, "a prompt that does not fit is refused, never cut", "truncation"),
    *ignored(_CLAUDE, "the answer is made on this machine", "inference_geo"),
    *ignored(_TOKENS, "asks for no answer", "max_tokens", "metadata", "stream", "cache_control"),
    # What would change the answer in silence, or is not guarded.
    *refused(
        (*_OPENAI, "messages", "responses", "tokens"),
        "tools are neither called nor guarded; leave it out",
        tools=([],),
        tool_choice=("none", "auto", {"type": "none"}, {"type": "auto"}),
    ),
    *refused(
        _CHAT,
        "tools are neither called nor guarded; leave it out",
        functions=([],),
        function_call=("none", "auto"),
    ),
    *refused(_CHAT, _TEXT_ALONE, modalities=(["text"],), audio=()),
    *refused(_CHAT, "nothing is searched; leave it out", web_search_options=()),
    *refused(_OPENAI, "the prompt is not sent back; leave echo out", echo=(False,)),
    *refused(_RAW, "text is only continued; leave suffix out", suffix=("",)),
    *refused(
        (*_CLAUDE, "tokens"),
        "spans of reasoning are not asked for by name; leave it out",
        thinking=({"type": "disabled"},),
    ),
    *refused(_CLAUDE, "nothing is connected; leave it out", mcp_servers=([],), container=()),
    *refused(
        _RESPONSES,
        "answers are not kept; pass the whole conversation as input",
        previous_response_id=(),
        conversation=(),
    ),
    *refused(_RESPONSES, "prompts are not kept; pass its text as input", prompt=()),
    *refused(_RESPONSES, "the answer comes with the request; leave it out", background=(False,)),
    *refused(_RESPONSES, "alternatives were not judged; leave it out", top_logprobs=(0,)),
    # Messages and their parts.
    *honoured(
        ("message",),
        "system, developer, user or assistant; a last one of the assistant is "
        "the beginning of the answer",
        "role",
    ),
    *honoured(("message",), "text, or parts of text", "content"),
    *honoured(("message",), "of an earlier turn; read as what was said", "refusal"),
    *ignored(("message",), "roles alone tell who speaks", "name", in_strict=True),
    *ignored(
        ("message",),
        "only role and text are read; so is any other field of a message that is not named here",
        *("id", "type", "status", "annotations", "reasoning_content", "reasoning"),
        *("phase", "prefix", "partial", "created_at"),
    ),
    *refused(
        ("message",),
        "tools are neither called nor guarded; send the text of the turn alone",
        tool_calls=([],),
        tool_call_id=("",),
        function_call=(),
    ),
    *refused(("message",), "sound is not read; send its text", audio=()),
    *honoured(("part",), "text, input_text, output_text or refusal", "type"),
    *honoured(("part",), "", "text"),
    *honoured(("part",), "of an earlier turn; read as what was said", "refusal"),
    *ignored(("part",), "caches hold no answer", "cache_control", in_strict=True),
    *ignored(
        ("part",),
        "only text is read; so is any other field of a part that is not named here",
        *("annotations", "logprobs", "citations", "id"),
    ),
)
"""Every field that is known, in the order in which the documentation shows them."""


def _by_place(rows: Iterable[FieldRule]) -> dict[tuple[FieldPlace, str], FieldRule]:
    found: dict[tuple[FieldPlace, str], FieldRule] = {}
    for row in rows:
        for place in row.places:
            if (place, row.name) in found:
                raise ValueError(f"{row.name} of {place} stands twice in the table.")
            found[place, row.name] = row
    return found


RULES: Mapping[tuple[FieldPlace, str], FieldRule] = _by_place(FIELDS)
"""The rows by place and name."""


def as_rows(place: FieldPlace) -> dict[FieldTreatment, list[FieldRule]]:
    """Return the rows of a place, by what becomes of them."""
    mine = [row for row in FIELDS if place in row.places]
    return {t: [row for row in mine if row.treatment == t] for t in get_args(FieldTreatment)}
