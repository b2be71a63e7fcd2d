"""Ways of generating, inside and outside of what a certificate covers.

Knows options and how an answer is asked for. Does not know what is counted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    MaxTimeCriteria,
    StoppingCriteriaList,
)

from probes.rollouts.types import Request
from safe_decode import SafeDecoder
from safe_decode.engines.rows import Row, RowPolicy, RowRequest, Sampling
from safe_decode.engines.transformers.batch.engine import TransformersEngine
from safe_decode.prompts.batch import from_prompts
from safe_decode.streaming.events import Ended
from safe_decode.trace.schema import SafetyTrace

__all__ = [
    "INSIDE",
    "OUTSIDE",
    "SAMPLED",
    "TEMPERATURE",
    "Configuration",
    "ConfiguredAnswer",
    "cap_of",
    "generated",
    "served",
]

TEMPERATURE = 0.3
"""Of sampled answers that a certificate made here speaks of."""

_PADDING = 48


def cap_of(decoder: SafeDecoder) -> int:
    """Return the cap of the decoder's certificate, in tokens."""
    return decoder.certificate.envelope.max_new_tokens


def _greedy() -> GenerationConfig:
    return GenerationConfig(do_sample=False)  # type: ignore[no-untyped-call]


@dataclass(frozen=True)
class ConfiguredAnswer:
    """One answer of a configuration: its text and its trace."""

    text: str
    trace: SafetyTrace


Answer = Callable[[SafeDecoder, Sequence[Request], Mapping[str, Any]], list[ConfiguredAnswer]]


@dataclass(frozen=True)
class Configuration:
    """One way of generating.

    Attributes:
        name: For the table.
        options: Of `generate`; a callable is called anew for each batch.
        batch: Rows that run together.
        answer: How the model is asked.
        is_sampled: Whether the certificate of sampled answers is in force.
    """

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)
    batch: int = 192
    answer: Answer | None = None
    is_sampled: bool = False


class Forbids(LogitsProcessor):
    """A processor of a user's own: every third id is out of reach."""

    def __call__(self, _ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Forbid."""
        scores = scores.clone()
        scores[:, 7::3] = -torch.inf
        return scores


def generated(
    decoder: SafeDecoder, batch: Sequence[Request], options: Mapping[str, Any]
) -> list[ConfiguredAnswer]:
    """Answer by `generate`; of several answers to a request all are taken."""
    output = decoder.generate([list(one.messages) for one in batch], **options)
    return [
        ConfiguredAnswer(text, trace)
        for text, trace in zip(output.texts, output.traces, strict=True)
    ]


def padded(
    decoder: SafeDecoder, batch: Sequence[Request], options: Mapping[str, Any]
) -> list[ConfiguredAnswer]:
    """Answer by ids with columns of padding that no row needs."""
    messages = [list(one.messages) for one in batch]
    inputs = from_prompts(decoder.tokenizer, messages, None, decoder.model.device)
    ids, mask = inputs.input_ids, inputs.attention_mask
    pad = decoder.tokenizer.pad_token_id
    assert pad is not None  # the embedded tokenizer has one
    ids = torch.cat([ids.new_full((len(ids), _PADDING), pad), ids], -1)
    mask = torch.cat([mask.new_zeros((len(mask), _PADDING)), mask], -1)
    output = decoder.generate(input_ids=ids, attention_mask=mask, **options)
    return [
        ConfiguredAnswer(text, trace)
        for text, trace in zip(output.texts, output.traces, strict=True)
    ]


def streamed(
    decoder: SafeDecoder, batch: Sequence[Request], options: Mapping[str, Any]
) -> list[ConfiguredAnswer]:
    """Answer by `stream`."""
    with decoder.stream([list(one.messages) for one in batch], **options) as stream:
        ends = [event for event in stream if isinstance(event, Ended)]
    return [ConfiguredAnswer(end.text, end.trace) for end in sorted(ends, key=lambda end: end.row)]


def served(
    decoder: SafeDecoder, batch: Sequence[Request], options: Mapping[str, Any]
) -> list[ConfiguredAnswer]:
    """Answer by the server's engine; options are those of a request."""
    engine = TransformersEngine(decoder, keep_traces=True)
    sampling = Sampling(**{"max_tokens": cap_of(decoder), "seed": 0, **options})
    policy = RowPolicy(decoder.certificate.alpha, "flag", decoder.policy.holdback_tokens)
    rows = [
        Row(RowRequest(engine.chat(one.messages), sampling, policy), lambda _event: None)
        for one in batch
    ]
    engine.run(rows)
    engine.close()
    found = []
    for row in rows:
        assert row.trace is not None
        ids = [step.token for step in row.trace.steps if step.token is not None]
        found.append(
            ConfiguredAnswer(decoder.tokenizer.decode(ids, skip_special_tokens=True), row.trace)
        )
    return found


_STATIC = {"cache_implementation": "static"}
_NEUTRAL = {
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "min_new_tokens": 0,
    "num_beams": 1,
}
_UNUSED = {"temperature": 0.3, "top_k": 3, "top_p": 0.5, "min_p": 0.4}
_RECORDED = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
SAMPLED = {"do_sample": True, "temperature": TEMPERATURE, "top_p": 1.0, "top_k": 0}

INSIDE: tuple[Configuration, ...] = (
    Configuration("plain"),
    Configuration("batch of 16", batch=16),
    Configuration("batch of 64", batch=64),
    Configuration("cap of 24", {"max_new_tokens": 24}),
    Configuration("cap of 80", {"max_new_tokens": 80}),
    Configuration("48 columns of padding more", answer=padded),
    Configuration("static cache", _STATIC),
    Configuration("no cache, cap of 48", {"use_cache": False, "max_new_tokens": 48}),
    Configuration("an empty cache of the user's", {"past_key_values": DynamicCache}),
    Configuration("prefill in chunks of 8", {"prefill_chunk_size": 8}),
    Configuration("scores and logits recorded", _RECORDED),
    Configuration("a seed", {"seed": 3}),
    Configuration("streamed", answer=streamed),
    Configuration("stop strings", {"stop_strings": [". ", "!"]}),
    Configuration("half a second", {"max_time": 0.5}),
    Configuration(
        "a criterion",
        {"stopping_criteria": lambda: StoppingCriteriaList([MaxTimeCriteria(0.5)])},
    ),
    Configuration("penalties at neutral values", _NEUTRAL),
    Configuration("sampling's options in greedy decoding", _UNUSED),
    Configuration("renormalized", {"renormalize_logits": True, "low_memory": True}),
    Configuration("eos and pad named", {"eos_token_id": 2, "pad_token_id": 2}),
    Configuration(
        "a generation_config",
        {"generation_config": _greedy, "max_new_tokens": 128},
    ),
    Configuration(
        "prompt lookup, cap of 48", {"prompt_lookup_num_tokens": 4, "max_new_tokens": 48}, batch=1
    ),
    Configuration("served", answer=served),
    Configuration("served, stop and cap", {"stop": (". ",), "max_tokens": 64}, answer=served),
    Configuration("sampled", SAMPLED, is_sampled=True),
    Configuration("sampled, two of each", {**SAMPLED, "num_return_sequences": 2}, is_sampled=True),
    Configuration("sampled, a seed", {**SAMPLED, "seed": 5}, is_sampled=True),
    Configuration("sampled, static cache", {**SAMPLED, **_STATIC}, is_sampled=True),
    Configuration("sampled, served", {"temperature": TEMPERATURE}, answer=served, is_sampled=True),
)
OUTSIDE: tuple[Configuration, ...] = (
    Configuration("sampled under the greedy certificate", {**SAMPLED, "temperature": 1.5}),
    Configuration("top_k of 5 under the sampled one", {**SAMPLED, "top_k": 5}, is_sampled=True),
    Configuration("repetition_penalty", {"repetition_penalty": 1.3}),
    Configuration("no_repeat_ngram_size", {"no_repeat_ngram_size": 2}),
    Configuration("min_new_tokens", {"min_new_tokens": 120}),
    Configuration("suppress_tokens", {"suppress_tokens": list(range(7, 1000, 4))}),
    Configuration("sequence_bias", {"sequence_bias": [[[i], -6.0] for i in range(7, 600, 5)]}),
    Configuration("a processor", {"logits_processor": lambda: [Forbids()]}),
    Configuration("three beams", {"num_beams": 3, "max_new_tokens": 64}, batch=32),
    Configuration(
        "served, penalties", {"presence_penalty": 1.5, "frequency_penalty": 1.0}, answer=served
    ),
)
