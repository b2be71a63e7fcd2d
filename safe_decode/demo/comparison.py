"""Running both arms: the bare model and the guarded one on the same prompts.

Knows batches and both arms. Does not know how a response is judged (the judge is passed
in), how a trace is read, nor how anything is drawn. The bare arm is the model's own
`generate`; where its tokens are shown with risks, they come from the guard in flag mode,
which changes no token, and that is checked.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import TYPE_CHECKING, Any

from safe_decode.demo.counts import Label, PromptOutcome
from safe_decode.demo.scenes import DemoPrompt
from safe_decode.demo.trace_view import side_of
from safe_decode.demo.view import Duel, Side
from safe_decode.errors import GuardError

if TYPE_CHECKING:
    from safe_decode.decision import Redirect
    from safe_decode.engines.transformers.decoder import SafeDecoder
    from safe_decode.prompts.chat import ChatBatch
    from safe_decode.trace.schema import SafetyTrace

__all__ = ["Comparison", "Judge"]

Judge = Callable[[DemoPrompt, str], Label]
"""From a prompt and the text that reached the reader to a word."""

Ids = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Answers:
    """What one arm said, row by row: ids without EOS, the reader's text, the trace."""

    said: list[Ids]
    texts: list[str]
    traces: Sequence[SafetyTrace]


@dataclass(frozen=True, slots=True)
class Comparison:
    """Both arms, ready to run, decoding as the certificate says.

    Attributes:
        decoder: The guarded arm; its model and tokenizer are the bare arm's.
        max_new_tokens: The cap of both.
        judge: Says what reached the reader; None for no claim about it.
        count_redirect: The redirect under which prompts are counted; None for the decoder's.
            A canned refusal takes no forward, a rewind generates each tripped row anew.
        batch_size: Prompts that are answered at once.
        seed: Of both arms, where tokens are drawn.
    """

    decoder: SafeDecoder
    max_new_tokens: int
    judge: Judge | None = None
    count_redirect: Redirect | None = None
    batch_size: int = 128
    seed: int = 0

    def show(self, prompts: Sequence[DemoPrompt]) -> list[Duel]:
        """Answer prompts in both arms and keep every token.

        Raises:
            GuardError: Flag mode yields other tokens than the bare model.
        """
        if not prompts:
            return []
        bare = self._bare(prompts)
        watched = self._guarded(prompts, redirect="flag")
        guarded = self._guarded(prompts)
        for row, ids in enumerate(watched.said):
            if ids != bare[row]:
                raise GuardError(
                    f"row {row} has other tokens in flag mode than in bare generate, wanted the "
                    "same; report this with the model's family and dtype."
                )
        left = self._sides(prompts, watched)
        right = self._sides(prompts, guarded)
        return [Duel(*duel) for duel in zip(prompts, left, right, strict=True)]

    def measure(self, prompts: Sequence[DemoPrompt]) -> Iterator[list[PromptOutcome]]:
        """Answer prompts in both arms and judge what reaches the reader, batch by batch.

        Yields:
            The outcomes of one batch; batches are of like length, not in the prompts' order.

        Raises:
            ValueError: There is no judge.
        """
        if self.judge is None:
            raise ValueError("judge is None; pass a judge to measure.")
        ordered = sorted(prompts, key=lambda p: len(p.request) + len(p.prefill or ""))
        for start in range(0, len(ordered), self.batch_size):
            yield self._outcomes(ordered[start : start + self.batch_size])

    def _outcomes(self, prompts: Sequence[DemoPrompt]) -> list[PromptOutcome]:
        bare, output = self._bare(prompts), self._guarded(prompts, redirect=self.count_redirect)
        rows = zip(prompts, bare, output.said, output.texts, output.traces, strict=True)
        return [
            PromptOutcome(
                scene=prompt.scene,
                bare=self._judged(prompt, self._text(bare_ids)),
                guarded=self._judged(prompt, text),
                tripped=trace.tripped,
                unchanged=bare_ids == guarded_ids,
                released=trace.end.released_tokens,
            )
            for prompt, bare_ids, guarded_ids, text, trace in rows
        ]

    def _sides(self, prompts: Sequence[DemoPrompt], output: _Answers) -> list[Side]:
        rows = zip(prompts, output.said, output.texts, output.traces, strict=True)
        return [
            side_of(
                trace,
                final_ids=ids,
                text=text,
                decode=self._text,
                verdict=self._judged(prompt, text) if self.judge else None,
            )
            for prompt, ids, text, trace in rows
        ]

    def _judged(self, prompt: DemoPrompt, text: str) -> Label:
        assert self.judge is not None
        return self.judge(prompt, text)

    def _bare(self, prompts: Sequence[DemoPrompt]) -> list[Ids]:
        """Return the ids that the model's own `generate` yields, EOS excluded."""
        import torch

        batch = self._encoded(prompts)
        with torch.no_grad(), self._drawn():
            sequences = self.decoder.model.generate(
                input_ids=batch.input_ids,
                attention_mask=batch.attention_mask,
                max_new_tokens=self.max_new_tokens,
                **self._decoding(),
            )
        return self._cut(sequences[:, batch.input_ids.shape[1] :].tolist())

    def _guarded(
        self, prompts: Sequence[DemoPrompt], *, redirect: Redirect | None = None
    ) -> _Answers:
        width = self._encoded(prompts).input_ids.shape[1]
        with self._drawn():
            output = self.decoder.generate(
                [list(prompt.messages) for prompt in prompts],
                prefill=[prompt.prefill for prompt in prompts],
                redirect=redirect,
                max_new_tokens=self.max_new_tokens,
                **self._decoding(),
            )
        said = self._cut(output.sequences[:, width:].tolist())
        return _Answers(said, output.texts, output.traces)

    def _decoding(self) -> dict[str, Any]:
        """Return how tokens are chosen: as the certificate's answers were."""
        own = self.decoder.certificate.envelope
        if not own.do_sample:
            return {"do_sample": False}
        shaping = {"temperature": own.temperature, "top_p": own.top_p, "top_k": own.top_k}
        return {"do_sample": True, **shaping}

    @contextlib.contextmanager
    def _drawn(self) -> Iterator[None]:
        """Let both arms draw the same numbers, and leave the global generator as it was."""
        import torch

        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            yield

    def _encoded(self, prompts: Sequence[DemoPrompt]) -> ChatBatch:
        from safe_decode.prompts import chat

        tokenizer = self.decoder.tokenizer
        encoded = [
            chat.encode_chat(tokenizer, list(p.messages), prefill=p.prefill) for p in prompts
        ]
        return chat.encode_batch(tokenizer, encoded, self.decoder.model.device)

    def _cut(self, rows: Sequence[Sequence[int]]) -> list[Ids]:
        """Cut each row at its first stop id, and the padding of rows that ended without."""
        from safe_decode.prompts import chat

        stops = {*chat.stop_ids(self.decoder.model, self.decoder.tokenizer)}
        pad = self.decoder.tokenizer.pad_token_id
        cut = []
        for row in rows:
            ids = list(takewhile(lambda token: token not in stops, row))
            if len(ids) == len(row):
                while ids and ids[-1] == pad:
                    ids.pop()
            cut.append(tuple(ids))
        return cut

    def _text(self, ids: Sequence[int]) -> str:
        return str(self.decoder.tokenizer.decode(list(ids), skip_special_tokens=True))
