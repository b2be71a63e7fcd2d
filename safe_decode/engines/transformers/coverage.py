"""What of a call a certificate covers, by the table of capabilities.

Knows the table, envelopes and how two of them differ. Does not know models, tensors, or how a
configuration came about: transformers merges argument, given and own configuration, and what it
hands to a decoding method is read here. What was certified was generated under options of its
own, which the envelope records; one without a record was made with none.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from safe_decode.certificate import Envelope
from safe_decode.engines.rows import RowRequest
from safe_decode.engines.transformers.capability import Capability
from safe_decode.engines.transformers.capability_table import TABLE
from safe_decode.typing import Cache, GenerationSettings

__all__ = [
    "ENDS",
    "departure",
    "given_options",
    "options_in_force",
    "record_of",
    "recorded",
    "request_options",
]

ENDS = "eos_token_id"
"""Recorded apart: it has no neutral value."""

_ROWS: Mapping[str, Capability] = {row.feature: row for row in TABLE}
_NAMED = frozenset({"do_sample", "temperature", "top_p", "top_k", "max_new_tokens", "max_length"})
"""Fields of their own in an envelope."""
_OWN_CRITERIA = frozenset({"MaxLengthCriteria", "EosTokenCriteria"})
"""generate drops its own of such a type, cap or end, where a user passes one."""
_SHOWN_ITEMS = 4


def options_in_force(config: GenerationSettings, *, samples: bool = True) -> dict[str, str]:
    """Read what a generation configuration does to responses, beyond an envelope's own fields.

    Args:
        config: Of transformers; as `generate` prepared it, or a model's own.
        samples: Whether the options of sampling are read, as `generate` does; a sampler of
            one's own does not.

    Returns:
        Each option that departs from its neutral value, as JSON; end ids left out.
    """
    kinds = ("certified", "voids", "sampled") if samples else ("certified", "voids")
    found = {
        row.feature: recorded(getattr(config, row.feature))
        for row in TABLE
        if row.effect in kinds
        and row.feature not in _NAMED
        and row.feature != ENDS
        and row.departs_with(getattr(config, row.feature, None))
    }
    if getattr(config, "min_new_tokens", None) is not None:
        found.pop("min_length", None)  # generate derives it, from the prompt's length
    return found


def given_options(options: Mapping[str, Any]) -> dict[str, str]:
    """Read what arguments of a call void, that no configuration holds.

    Args:
        options: Keyword arguments of `generate`.
    """
    found: dict[str, str] = {}
    for name, value in options.items():
        row = _ROWS.get(name)
        if name == "stopping_criteria":
            for kind in _replacing(value):
                found[name] = recorded(kind)
        if row is None or row.effect != "voids" or not row.departs_with(value):
            continue
        kept = _cache_shown(value) if name == "past_key_values" else value
        if kept is not None:
            found[name] = recorded(kept)
    return found


def request_options(request: RowRequest, own: Mapping[str, str]) -> dict[str, str]:
    """Read what a request to the server does to its response, beyond an envelope's own fields.

    Args:
        request: Its options have the names of the library's, or rows of their own in the table.
        own: What the model's own configuration does, see `options_in_force`.

    Returns:
        The options in force, the model's own among them, which a request may replace or raise.
    """
    sampling = request.sampling
    rows = [row for row in TABLE if row.status == "served"]
    given = {row.feature: getattr(sampling, row.feature, None) for row in rows}
    options = {**own, **given_options({**given, "chat_template_kwargs": request.prompt.variables})}
    if sampling.min_p:
        options["min_p"] = recorded(sampling.min_p)
    if sampling.repetition_penalty is not None:
        options["repetition_penalty"] = recorded(sampling.repetition_penalty)
    floor = max(sampling.min_tokens, json.loads(own.get("min_new_tokens", "0")))
    if floor:
        options["min_new_tokens"] = recorded(floor)
    return options


def record_of(config: GenerationSettings, ends: Sequence[int]) -> dict[str, str]:
    """Record, for an envelope, what responses are generated under beyond its own fields.

    Args:
        config: The model's own generation configuration.
        ends: Ids at which responses end.
    """
    return {**options_in_force(config), ENDS: recorded(sorted(ends))}


def recorded(value: object) -> str:
    """Write an option's value as an envelope keeps it."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, Mapping):
        value = sorted([list(k) if isinstance(k, tuple) else k, v] for k, v in value.items())
    return json.dumps(value, default=_kind_of)


def departure(certified: Envelope, call: Envelope, own_ends: Sequence[int] = ()) -> str | None:
    """Say in what a call departs from how certified responses were generated; None: in nothing.

    Args:
        certified: Of the certificate.
        call: Of the call, with its end ids among the options.
        own_ends: End ids of the model as it was wrapped: those of an envelope without a record.
    """
    if call.max_new_tokens > certified.max_new_tokens:
        return f"max_new_tokens={call.max_new_tokens} exceeds {certified.max_new_tokens}"
    if call.do_sample != certified.do_sample:
        return f"do_sample={call.do_sample} is not {certified.do_sample}"
    for name in ("temperature", "top_p", "top_k") if certified.do_sample else ():
        if getattr(call, name) != getattr(certified, name):
            return f"{name}={getattr(call, name)} is not {getattr(certified, name)}"
    wanted = {ENDS: recorded(sorted(own_ends)), **certified.options}
    got = {ENDS: wanted[ENDS], **call.options}
    for row in TABLE:
        name = row.feature
        if row.effect in ("voids", "shortens") and name in got:
            return f"{name}={_shown(got[name])} is not covered: {row.reason or row.status}"
        matters = row.effect == "certified" or (row.effect == "sampled" and certified.do_sample)
        neutral = recorded(row.neutral[0] if row.neutral else None)
        value, due = got.get(name, neutral), wanted.get(name, neutral)
        if matters and name not in _NAMED and json.loads(value) != json.loads(due):
            return f"{name}={_shown(value)} is not {_shown(due)}"
    return None


def _replacing(criteria: Iterable[object] | None) -> list[str]:
    """Name the criteria that take the place of those that `generate` makes itself."""
    kinds = [{base.__name__ for base in type(one).__mro__} for one in criteria or ()]
    return [f"<{kind}>" for kinds_of_one in kinds for kind in kinds_of_one & _OWN_CRITERIA]


def _cache_shown(cache: Cache) -> str | None:
    """Say what keeps a cache of the user's from being covered; None for an empty, exact one."""
    n_positions = int(cache.get_seq_length())
    kind = type(cache).__name__
    if n_positions:
        return f"<{kind} of {n_positions} positions>"
    return f"<{kind}>" if "quantized" in kind.lower() else None


def _kind_of(value: object) -> str:
    return f"<{type(value).__name__}>"


def _shown(value: str) -> str:
    """Show a recorded value: plain ones and short lists as they are, others by their length."""
    read = json.loads(value)
    if isinstance(read, str) and read.startswith("<"):
        return read
    if isinstance(read, list) and len(read) > _SHOWN_ITEMS:
        return f"<{len(read)} entries>"
    return repr(read)
