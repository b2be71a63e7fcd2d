"""Four readers of the same guard: the library and the server, whole and streamed.

Knows how a question is put to each and what its reader was shown. Does not know which questions
are attacks, or what harm is. The server runs in this process, behind its own HTTP interface.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import httpx2

from probes.rollouts.types import Request
from safe_decode import SafeDecoder
from safe_decode.engines.transformers.batch.engine import TransformersEngine
from safe_decode.serving.app import create_app
from safe_decode.serving.settings import ServeSettings
from safe_decode.streaming.events import Ended
from safe_decode.trace.schema import SafetyTrace

__all__ = ["Ask", "Heard", "Library", "EndReader", "Server", "Spent"]

MODEL = "pair"


@dataclass(frozen=True)
class Ask:
    """One question.

    Attributes:
        request: Who asks what; its own prefill is not used.
        begun: The beginning of the answer that is sent along; may be empty.
        cap: New tokens.
        stop: Ends the answer; None: nothing does.
        bias: Added to the scores of tokens, by id.
        names_likely: Whether the likeliest tokens are asked for; servers alone tell them.
    """

    request: Request
    begun: str
    cap: int
    stop: str | None = None
    bias: Mapping[int, float] = field(default_factory=dict)
    names_likely: bool = False


@dataclass(frozen=True)
class Spent:
    """What a row's end cost.

    Attributes:
        lookahead_tokens: Tokens that nobody sees, decoded and judged behind the end.
        withheld_tokens: Tokens of the tail that were not shown.
    """

    lookahead_tokens: int = 0
    withheld_tokens: int = 0


@dataclass(frozen=True)
class Heard:
    """What a reader was given.

    Attributes:
        text: All that was shown, the guard's own words included.
        is_cut: Whether the guard stepped in.
        is_refused: Whether the question was not taken at all.
        likely: The likeliest token before the first choice, by name; None where not told.
        spent: Where the reader can tell.
    """

    text: str
    is_cut: bool = False
    is_refused: bool = False
    likely: str | None = None
    spent: Spent = Spent()


class EndReader(Protocol):
    """Asks, and tells what came."""

    @property
    def name(self) -> str:
        """For tables."""
        ...

    def hear(self, asks: Sequence[Ask]) -> list[Heard]:
        """Ask all, greedily; answers in order."""
        ...


@dataclass(frozen=True)
class Library:
    """`SafeDecoder.generate`, or its stream.

    Attributes:
        decoder: As deployed.
        streams: Whether texts are read from a stream.
        batch: Rows that run together.
    """

    decoder: SafeDecoder
    streams: bool = False
    batch: int = 128

    @property
    def name(self) -> str:
        """For tables."""
        return "library, streamed" if self.streams else "library"

    def hear(self, asks: Sequence[Ask]) -> list[Heard]:
        """Ask all; rows of one cap, stop string and bias share batches, like lengths together."""
        groups: dict[tuple[Any, ...], list[int]] = {}
        for place, ask in enumerate(asks):
            key = (ask.cap, ask.stop, tuple(sorted(ask.bias.items())))
            groups.setdefault(key, []).append(place)
        found: dict[int, Heard] = {}
        for places in groups.values():
            places.sort(key=lambda place: _length(asks[place]))
            for begin in range(0, len(places), self.batch):
                part = places[begin : begin + self.batch]
                heard = self._batch([asks[place] for place in part])
                found |= dict(zip(part, heard, strict=True))
        return [found[place] for place in range(len(asks))]

    def _batch(self, asks: Sequence[Ask]) -> list[Heard]:
        first = asks[0]
        options: dict[str, Any] = {"max_new_tokens": first.cap, "do_sample": False}
        if first.stop is not None:
            options["stop_strings"] = [first.stop]
        if first.bias:
            options["sequence_bias"] = {(token,): value for token, value in first.bias.items()}
        conversations = [[*ask.request.messages] for ask in asks]
        prefills = [ask.begun or None for ask in asks]
        if not self.streams:
            output = self.decoder.generate(conversations, prefill=prefills, **options)
            rows = zip(output.texts, output.traces, strict=True)
            return [Heard(text, trace.tripped, spent=spent_of(trace)) for text, trace in rows]
        with self.decoder.stream(conversations, prefill=prefills, **options) as stream:
            ends = {event.row: event for event in stream if isinstance(event, Ended)}
        return [
            Heard(end.text, end.trace.tripped, spent=spent_of(end.trace))
            for end in (ends[row] for row in range(len(asks)))
        ]


def spent_of(trace: SafetyTrace) -> Spent:
    """Read what the end of a row cost."""
    end = trace.end
    return Spent(end.lookahead_tokens, end.withheld_tokens)


class Server:
    """`safe-decode serve` in this process, asked as a client asks it.

    Args:
        decoder: As deployed.
        streams: Whether answers are streamed.
        batch: Rows of one run.
    """

    def __init__(self, decoder: SafeDecoder, *, streams: bool = False, batch: int = 128) -> None:
        self._streams, self._batch = streams, batch
        self._engine = TransformersEngine(decoder)

    @property
    def name(self) -> str:
        """For tables."""
        return "server, streamed" if self._streams else "server"

    def hear(self, asks: Sequence[Ask]) -> list[Heard]:
        """Ask all at once; the scheduler makes its own batches."""
        return asyncio.run(self._hear(asks))

    async def _hear(self, asks: Sequence[Ask]) -> list[Heard]:
        hours = 24 * 3600.0
        settings = ServeSettings.model_validate(
            {
                **{"served_name": MODEL, "page": False, "max_batch": self._batch},
                **{"max_queue": max(1, len(asks)), "max_body_bytes": 1_000_000},
                **{"queue_timeout_s": hours, "request_timeout_s": hours},
            }
        )
        app = create_app(self._engine, settings)
        async with (
            app.router.lifespan_context(app),
            httpx2.AsyncClient(
                transport=httpx2.ASGITransport(app=app), base_url="http://127.0.0.1", timeout=None
            ) as client,
        ):
            return list(await asyncio.gather(*(self._ask(client, ask) for ask in asks)))

    async def _ask(self, client: httpx2.AsyncClient, ask: Ask) -> Heard:
        begun = [{"role": "assistant", "content": ask.begun}] if ask.begun else []
        body: dict[str, Any] = {
            "model": MODEL,
            "messages": [*ask.request.messages, *begun],
            "max_tokens": ask.cap,
            "temperature": 0,
            "stream": self._streams,
        }
        if ask.stop is not None:
            body["stop"] = [ask.stop]
        if ask.bias:
            body["logit_bias"] = {str(token): value for token, value in ask.bias.items()}
        if ask.names_likely:
            body |= {"logprobs": True, "top_logprobs": 1}
        response = await client.post("/v1/chat/completions", json=body)
        if response.status_code in (400, 422):
            return Heard("", is_refused=True)
        response.raise_for_status()
        return _streamed(response.text) if self._streams else _whole(response.json())


def _whole(body: Mapping[str, Any]) -> Heard:
    (choice,) = body["choices"]
    message, told = choice["message"], choice["logprobs"]
    notes = told["content"] if told else []
    return Heard(
        message["content"] or "",  # the refusal stands in it too
        is_cut=message["refusal"] is not None,
        likely=notes[0]["top_logprobs"][0]["token"] if notes else None,
    )


def _streamed(body: str) -> Heard:
    text, is_cut = "", False
    for line in body.splitlines():
        if not line.startswith("data: {"):
            continue
        for choice in json.loads(line.removeprefix("data: ")).get("choices", ()):
            delta = choice["delta"]
            is_cut |= delta.get("refusal") is not None
            text += delta.get("content") or ""
    return Heard(text, is_cut)


def _length(ask: Ask) -> int:
    return sum(len(message["content"]) for message in ask.request.messages) + len(ask.begun)
