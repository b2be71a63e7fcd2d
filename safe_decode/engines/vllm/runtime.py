"""What the guard keeps for one engine in one process.

A worker's model, processor and runner find it through the engine's configuration, the one thing
that all of them have; nothing is kept on a class or a module. Knows the bundle, the tokenizer, the
slots and the seats. Does not know which of vLLM's two model runners drives it.
"""

from __future__ import annotations

import logging
from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from safe_decode.bundle.fingerprint import Fingerprint
from safe_decode.certificate_choice import CertificateChoice
from safe_decode.engines.vllm.checkpoint_weights import named_weights, weights_folder
from safe_decode.engines.vllm.forward_v1 import ForwardV1
from safe_decode.engines.vllm.rows.canary_rows import canary_difference
from safe_decode.engines.vllm.rows.row_judge import Counts, JudgedRows, RowJudge
from safe_decode.engines.vllm.rows.row_seats import RowSeats
from safe_decode.engines.vllm.rows.row_terms import CANARY, CAP, RowTerms, terms_of
from safe_decode.engines.vllm.rows.score_slots import ScoreSlots
from safe_decode.engines.vllm.rows.signals import SignalIds
from safe_decode.engines.vllm.settings import EngineSettings, settings_in_force
from safe_decode.errors import BeatError, CanaryError, UnsupportedError
from safe_decode.policy.canned_texts import texts_of

if TYPE_CHECKING:
    from vllm import SamplingParams
    from vllm.config import VllmConfig

__all__ = ["GuardRuntime", "runtime_of"]

_LOG = logging.getLogger("vllm.safe_decode")
_KEY = "safe_decode.guard"


def runtime_of(config: VllmConfig) -> GuardRuntime:
    """Return the guard of an engine in this process; the first who asks makes it."""
    held: dict[str, object] = config.compilation_config.static_forward_context
    if _KEY not in held:
        held[_KEY] = GuardRuntime(config, settings_in_force())
    found = held[_KEY]
    assert isinstance(found, GuardRuntime)
    return found


class GuardRuntime:
    """The guard of one engine.

    Args:
        config: Of the engine.
        settings: The operator's.

    Attributes:
        settings: The operator's.
        measured: Of the bundle, in the engine's numbers.
        probe: On the model's device, once a model is attached.
        signals: By which rows end.
        slots: Scores, once the cache is there.
        judge: Of the rows, once a model is attached.
        is_checked: Whether the canary's scores were compared.
        layer: Name of an attention layer that keeps every position.
        block_size: Positions of a block of the cache.
        forward_v1: Of the first model runner, the forward that is not judged yet.
        batch_v2: Of the second one, the rows of a forward that is not judged yet: positions read,
            those in this forward, tokens known, and blocks.
        buffer: Of the second one, [tokens] slots of the present forward, where graphs read them.
        seat_of_request: Of the second one, the seat of each of its own slots of requests.
    """

    def __init__(self, config: VllmConfig, settings: EngineSettings) -> None:
        from transformers import AutoTokenizer

        model = config.model_config
        self.settings, self._config = settings, config
        self.measured = settings.measured_in(model.dtype)
        self.tokenizer = AutoTokenizer.from_pretrained(
            model.tokenizer,
            revision=model.tokenizer_revision,
            trust_remote_code=model.trust_remote_code,
        )
        bundle = settings.bundle
        self.probe = bundle.probe
        self.texts = texts_of(self.tokenizer, bundle.refusal, bundle.opener)
        self.signals = SignalIds.of(self.tokenizer, model.get_vocab_size(), self._end_ids())
        self._choice = CertificateChoice(
            bundle.certificates, settings.population, self.measured.dtype
        )
        self._seats = RowSeats(2 * config.scheduler_config.max_num_seqs + 8)
        self._canary_seat: int | None = None
        self._unadmitted: set[int] = set()
        self._uses_v2 = bool(config.use_v2_model_runner)
        self.layer = ""
        self.block_size = int(config.cache_config.block_size)
        self.forward_v1: ForwardV1 | None = None
        self.batch_v2: tuple[Counts, Counts, Counts, Tensor] | None = None
        self.buffer: Tensor | None = None
        self.seat_of_request = np.zeros(config.scheduler_config.max_num_seqs, dtype=np.int64)
        self.slots: ScoreSlots | None = None
        self.judge: RowJudge | None = None
        self.is_checked = False

    @property
    def reserve(self) -> int:
        """Count the tokens for which a row needs room behind its cap: the refusal and its end."""
        return max(len(self.texts.refusal), len(self.texts.refusal_after)) + 1

    def attach(self, device: torch.device) -> None:
        """Make ready for a model on a device, whose layers are built.

        Raises:
            UnsupportedError: Every layer forgets positions behind a window.
        """
        self.layer = _keeping_layer(self._config)
        self.probe = self.settings.bundle.probe.to(device)
        self.judge = RowJudge(
            2 * self._config.scheduler_config.max_num_seqs + 8,
            monitor=self.settings.bundle.monitor,
            texts=self.texts,
            signals=self.signals,
            device=device,
        )

    def allocate(self, n_slots: int, device: torch.device) -> None:
        """Make the slots, as many as the cache has."""
        self.slots = ScoreSlots(n_slots, len(self.probe.heads), device)

    def require_fingerprint(self) -> None:
        """Check that the weights on the disk are those the bundle was made for.

        Raises:
            FingerprintMismatchError: Model, tokenizer, template or weights differ.
        """
        from transformers import AutoConfig

        model = self._config.model_config
        folder = weights_folder(model.model, model.revision)
        config = AutoConfig.from_pretrained(folder, trust_remote_code=model.trust_remote_code)
        text = config.get_text_config()
        named = named_weights(folder, is_tied=bool(getattr(text, "tie_word_embeddings", False)))
        found = Fingerprint.of_checkpoint(text, self.tokenizer, named, model.dtype)
        self.measured.fingerprint.require(found)

    def write(self, features: Tensor, ids: Tensor, positions: Tensor) -> None:
        """Score a forward and write its scores to their slots; nothing if it has no cache.

        Args:
            features: [n, F].
            ids: [n] that were read.
            positions: [n] where they stand.
        """
        slots = self._slots_now(len(features))
        if slots is not None and self.slots is not None:
            n = len(slots)
            self.slots.write(slots, self.probe(features[:n]), ids[:n], positions[:n])

    def _slots_now(self, n: int) -> Tensor | None:
        if self._uses_v2:
            return None if self.buffer is None else self.buffer[:n]
        forward = self.forward_v1 = ForwardV1.current(self.layer)
        if forward is None:
            return None
        if self.slots is None:
            n_blocks = int(self._config.cache_config.num_gpu_blocks)
            self.allocate(n_blocks * self.block_size, forward.slots.device)
        assert self.slots is not None
        self.slots.forward.add_(1)
        return forward.slots[:n]

    def join(
        self, key: Hashable, prompt: Sequence[int], params: SamplingParams, n_known: int
    ) -> int:
        """Seat a request; one that comes back goes on where it was.

        Args:
            key: Of the request, its own.
            prompt: Its ids.
            params: What it asks for, as the scheduler has admitted it.
            n_known: Tokens of it that are known, those that it has said included.

        Returns:
            Its seat.
        """
        assert self.judge is not None
        seat = self._seats.take(key)
        if not seat.is_new:
            return seat.number
        extra = params.extra_args or {}
        self._unadmitted.discard(seat.number)
        self.judge.seat(seat.number, self._terms(prompt, params))
        if CANARY in extra:
            self._canary_seat = seat.number
        elif CAP not in extra:
            # Not by our scheduler: vLLM's own warm-up, whose answers nobody reads.
            self._unadmitted.add(seat.number)
            self.judge.close(seat.number)
        elif n_known > len(prompt):
            _LOG.error("a request comes back and its seat is gone: it ends, closed")
            self.judge.close(seat.number)
        return seat.number

    def leave(self, key: Hashable) -> None:
        """Let a request go, perhaps to come back."""
        self._seats.leave(key)

    def decide(self, rows: JudgedRows, tokens: Tensor, logits: Tensor) -> Tensor:
        """Judge the newest forward and force what rows must say.

        Args:
            rows: Of the batch, in the order of `logits`.
            tokens: See `RowJudge.step`.
            logits: [rows, vocab] float32, changed in place.

        Raises:
            BeatError: No forward was scored since the last call, or another batch was.
            CanaryError: The canary's scores are not those of the bundle, or rows would be
                answered before they were compared.
        """
        assert self.judge is not None
        if self.slots is None or len(rows.seats) != len(logits):
            raise BeatError(
                f"the engine chooses for {len(logits)} rows and the guard knows "
                f"{len(rows.seats)}; each needs a score of this forward."
            )
        forced = self.judge.step(rows, self.slots, tokens)
        if not self.is_checked:
            self._check(rows)
        return self.judge.force(logits, forced)

    def _terms(self, prompt: Sequence[int], params: SamplingParams) -> RowTerms:
        canary = self.measured.canary
        if CANARY in (params.extra_args or {}) and canary is not None:
            return RowTerms(
                threshold=float("inf"),
                policy=self.settings.policy,
                watched_from=canary.turn_start - 1,
                prompt_tokens=len(prompt),
                cap=0,
            )
        return terms_of(prompt, params, self.settings, self._choice, self.tokenizer)

    def _check(self, rows: JudgedRows) -> None:
        """Compare the canary, if it is among these rows; nobody is answered before.

        Raises:
            CanaryError: See `decide`.
        """
        assert self.slots is not None and self.measured.canary is not None
        whole = rows.seats[rows.is_whole].tolist()
        if self._canary_seat in whole:
            row = rows.seats.tolist().index(self._canary_seat)
            difference = canary_difference(self.measured.canary, rows.only(row), self.slots)
            self.is_checked = True
            _LOG.info("the canary's scores differ by %.3g: this engine is guarded", difference)
        elif set(whole) - self._unadmitted:
            raise CanaryError(
                "a request would be answered before the canary's scores were compared, wanted the "
                "canary first; start the engine anew and report its configuration."
            )

    def _end_ids(self) -> frozenset[int]:
        config = self._config.model_config.try_get_generation_config()
        ends = config.get("eos_token_id", getattr(self.tokenizer, "eos_token_id", None))
        return frozenset([ends] if isinstance(ends, int) else ends or ())


def _keeping_layer(config: VllmConfig) -> str:
    from vllm.model_executor.layers.attention import Attention

    layers = config.compilation_config.static_forward_context
    keeping = (
        name
        for name, layer in layers.items()
        if isinstance(layer, Attention) and getattr(layer, "sliding_window", None) is None
    )
    found = next(keeping, None)
    if found is None:
        raise UnsupportedError(
            "every layer of the model has a sliding window, so that no part of the cache keeps "
            "every position that is to be judged; serve it with `safe-decode serve`."
        )
    return str(found)
