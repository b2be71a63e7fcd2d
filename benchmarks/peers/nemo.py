"""The real NeMo Guardrails package, streaming: `python -m benchmarks.peers.nemo`.

Its output rail reads chunks of 200 tokens, 50 of them again, from the same local model that the
bare arm and ours stream from; what judges a chunk is an action of ours that lets a local guard
model of equal size read it once. Time a token and time to the first text that the reader gets,
interleaved in one run; writes `results/peers-nemo.jsonl`.

The package's pins clash with ours, so it gets an environment of its own:

    python -m venv nemo && nemo/bin/pip install . torch nemoguardrails
    nemo/bin/python -m benchmarks.peers.nemo
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from statistics import median
from typing import Any, NamedTuple

import torch
from transformers.generation.streamers import BaseStreamer

from benchmarks.card import card, write_results
from benchmarks.peers.guard_model import CHUNK_TOKENS, OVERLAP_TOKENS, guard_model
from safe_decode import SafeDecoder
from safe_decode.bench.models import Subject, embedded_subject
from safe_decode.bench.statistics import interval_of
from safe_decode.streaming.events import Released
from safe_decode.typing import Tokenizer

LOG = logging.getLogger("benchmarks.peers.nemo")
_ASKED = [{"role": "user", "content": "How do I keep the bread of the baker fresh?"}]
_COLANG = """
define bot refuse to respond
  "I cannot do that."

define subflow local guard
  $is_fine = execute local_guard
  if not $is_fine
    bot refuse to respond
    stop
"""
_YAML = f"""
models: []
rails:
  output:
    flows: [local guard]
    streaming:
      enabled: true
      chunk_size: {CHUNK_TOKENS}
      context_size: {OVERLAP_TOKENS}
      stream_first: false
"""

Stream = Callable[[], AsyncIterator[str]]


class Taken(NamedTuple):
    """One answer: seconds a token, and to the first text."""

    token_s: float
    first_s: float


class _Pieces(BaseStreamer):
    """Hands each token's text to an event loop."""

    def __init__(self, tokenizer: Tokenizer, loop: asyncio.AbstractEventLoop) -> None:
        self.queue: asyncio.Queue[str | None] = asyncio.Queue()
        self._tokenizer, self._loop, self._is_prompt = tokenizer, loop, True

    def put(self, value: torch.Tensor) -> None:
        if self._is_prompt:
            self._is_prompt = False
            return
        text = self._tokenizer.decode(value.tolist())
        self._loop.call_soon_threadsafe(self.queue.put_nowait, text)

    def end(self) -> None:
        self._loop.call_soon_threadsafe(self.queue.put_nowait, None)


def bare_stream(subject: Subject, tokenizer: Tokenizer, options: dict[str, Any]) -> Stream:
    """Stream as the documentation of transformers does: a thread, a streamer, a queue."""

    async def stream() -> AsyncIterator[str]:
        pieces = _Pieces(tokenizer, asyncio.get_running_loop())
        encoded = tokenizer.apply_chat_template(
            _ASKED, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        thread = threading.Thread(
            target=subject.model.generate, kwargs={**encoded, **options, "streamer": pieces}
        )
        thread.start()
        while (text := await pieces.queue.get()) is not None:
            yield text
        thread.join()

    return stream


def nemo_stream(subject: Subject, tokenizer: Tokenizer, source: Stream) -> Stream:
    """Put the package's streaming output rail behind a bare stream."""
    from nemoguardrails import LLMRails, RailsConfig
    from nemoguardrails.actions import action
    from nemoguardrails.actions.rail_outcome import RailOutcome

    guard = guard_model(subject, 1.0)
    base = guard.get_decoder()  # type: ignore[no-untyped-call]  # transformers states no types
    head = torch.nn.Linear(guard.config.hidden_size, 2)
    encode: Any = tokenizer

    async def local_guard(context: dict[str, Any], **_: object) -> RailOutcome:
        ids = encode(context["bot_message"], return_tensors="pt").input_ids
        with torch.no_grad():
            hidden = base(ids[:, -CHUNK_TOKENS:], use_cache=False).last_hidden_state
            if not bool(head(hidden[:, -1]).isfinite().all()):
                raise RuntimeError("the guard model's verdict is not finite.")
        return RailOutcome.allow()  # read, and never blocked: what is measured is the time

    rails = LLMRails(RailsConfig.from_content(colang_content=_COLANG, yaml_content=_YAML))
    rails.register_action(action(name="local_guard")(local_guard), "local_guard")

    def stream() -> AsyncIterator[str]:
        found: AsyncIterator[str] = rails.stream_async(messages=_ASKED, generator=source())
        return found

    return stream


def our_stream(decoder: SafeDecoder, options: dict[str, Any]) -> Stream:
    """Stream under the guard, which flags and changes nothing."""

    async def stream() -> AsyncIterator[str]:
        async with decoder.astream(_ASKED, **options) as events:
            async for event in events:
                if isinstance(event, Released) and event.text:
                    yield event.text

    return stream


async def _take(stream: Stream, n_tokens: int) -> Taken:
    began, first = time.perf_counter(), None
    async for text in stream():
        if text.startswith('{"error"'):
            raise RuntimeError(f"a rail failed: {text}")
        if text and first is None:
            first = time.perf_counter() - began
    if first is None:
        raise RuntimeError("a stream ended without any text.")
    return Taken((time.perf_counter() - began) / n_tokens, first)


async def _interleaved(
    arms: dict[str, Stream], n_tokens: int, rounds: int
) -> dict[str, list[Taken]]:
    taken: dict[str, list[Taken]] = {name: [] for name in arms}
    names = list(arms)
    for name in names:
        await _take(arms[name], n_tokens)
    for number in range(rounds):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            taken[name].append(await _take(arms[name], n_tokens))
    return taken


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, write, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--new-tokens", type=int, default=600)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument(
        "--threads", type=int, default=1, help="of torch; more of them contend between threads"
    )
    parser.add_argument("--dry", action="store_true", help="write nothing")
    given = parser.parse_args(argv)
    torch.set_num_threads(given.threads)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    LOG.setLevel(logging.INFO)
    from importlib.metadata import version

    from safe_decode.demo.embedded_pair import embedded

    loaded, subject = embedded(), embedded_subject()
    options: dict[str, Any] = {
        "max_new_tokens": given.new_tokens,
        "min_new_tokens": given.new_tokens,
        "do_sample": False,
    }
    decoder = SafeDecoder(subject.model, loaded.tokenizer, loaded.bundle, redirect="flag")
    bare = bare_stream(subject, loaded.tokenizer, options)
    arms = {
        "bare stream": bare,
        "safe-decode": our_stream(decoder, options),
        "NeMo Guardrails, equal guard": nemo_stream(subject, loaded.tokenizer, bare),
    }
    taken = asyncio.run(_interleaved(arms, given.new_tokens, given.rounds))
    rows = []
    for name, laps in taken.items():
        ratio = interval_of(
            [
                mine.token_s / one.token_s
                for mine, one in zip(laps, taken["bare stream"], strict=True)
            ]
        )
        rows.append(
            {
                "what": name,
                "us a token": round(1e6 * median(lap.token_s for lap in laps), 1),
                "ratio to bare": round(ratio.point, 4),
                "95 % interval": ratio.as_list(4),
                "first text, ms": round(1e3 * median(lap.first_s for lap in laps), 1),
                "n": given.rounds,
            }
        )
        LOG.info("%s", json.dumps(rows[-1]))
    if not given.dry:
        facts = card(
            new_tokens=given.new_tokens,
            threads=torch.get_num_threads(),
            nemoguardrails=version("nemoguardrails"),
        )
        write_results("peers-nemo", rows, facts)


if __name__ == "__main__":
    main()
