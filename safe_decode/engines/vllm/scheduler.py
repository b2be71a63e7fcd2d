"""The scheduler of a guarded engine: vLLM's own, and three things more.

It reserves room for the refusal when a request is admitted; it ends rows by the guard's signals
and takes these out of what readers get; and it schedules the canary before any request. Knows
requests. Does not know scores.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, TypeAlias

from vllm import SamplingParams
from vllm.utils.hashing import get_hash_fn_by_name
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request, RequestStatus

from safe_decode.engines.vllm.rows.row_terms import CANARY, CAP
from safe_decode.engines.vllm.runtime import GuardRuntime, runtime_of
from safe_decode.errors import UnsupportedError

if TYPE_CHECKING:
    from vllm.config import VllmConfig

__all__ = ["CANARY_ID", "STOP_REASON", "guarded_scheduler"]

_LOG = logging.getLogger("vllm.safe_decode")  # among the engine's own lines

STOP_REASON = "content_filter"
"""`stop_reason` of a row that has tripped."""
CANARY_ID = "safe-decode-canary"
"""The id of the canary's request; nobody waits for its answer."""


class _Guarded:
    """What is added; stands before one of vLLM's schedulers in the order of bases."""

    def __init__(self, vllm_config: VllmConfig, **given: object) -> None:
        super().__init__(vllm_config=vllm_config, **given)  # type: ignore[call-arg]  # vLLM's
        self._runtime: GuardRuntime = runtime_of(vllm_config)
        self._most_tokens = int(vllm_config.model_config.max_model_len)
        self.add_request(self._canary(vllm_config, given.get("hash_block_size")))
        settings = self._runtime.settings
        _LOG.warning(
            "guarded by bundle %s, alpha %g, redirect %s; streams show each token when it is "
            "chosen: nothing is held back, tokens before a trip stand, and the last token before a "
            "stop string is not judged",
            settings.bundle.digest[:16],
            settings.alpha,
            settings.redirect,
        )

    def add_request(self, request: Request) -> None:
        """Admit a request: its cap leaves room for the refusal, and the signals end it.

        Raises:
            UnsupportedError: It comes in parts.
        """
        if request.resumable:
            raise UnsupportedError(
                f"request {request.request_id} comes in parts, which are not guarded; send its "
                "prompt whole."
            )
        if request.sampling_params is not None:
            # Answers to one prompt may share their parameters.
            request.sampling_params = request.sampling_params.clone()
            self._admit(request, request.sampling_params)
        super().add_request(request)  # type: ignore[misc]  # vLLM's

    def _admit(self, request: Request, params: SamplingParams) -> None:
        extra = dict(params.extra_args or {})
        reserve = self._runtime.reserve
        # One token more is chosen behind the cap, so that the last one is judged.
        room = self._most_tokens - int(request.num_prompt_tokens) - reserve - 1
        extra[CAP] = max(0, min(int(request.max_tokens), room))
        params.extra_args = extra
        request.max_tokens = params.max_tokens = extra[CAP] + reserve + 1
        signals = self._runtime.signals
        params.stop_token_ids = [
            *(params.stop_token_ids or ()),
            signals.redirected,
            signals.capped,
        ]

    def _update_request_with_output(
        self, request: Request, new_token_ids: list[int], is_stale: bool = False
    ) -> tuple[list[int], bool]:
        """Append what a row has said; the guard's signals end it and are not handed on."""
        ids, is_over = super()._update_request_with_output(  # type: ignore[misc]  # vLLM's
            request, new_token_ids, is_stale
        )
        last = ids[-1] if ids else None
        signals = self._runtime.signals
        if last == signals.redirected:
            request.status, request.stop_reason = RequestStatus.FINISHED_STOPPED, STOP_REASON
            del ids[-1:]
        elif last == signals.capped:
            request.status, request.stop_reason = RequestStatus.FINISHED_LENGTH_CAPPED, None
            del ids[-1:]
        return ids, is_over

    def _canary(self, config: VllmConfig, block_size: object) -> Request:
        canary = self._runtime.measured.canary
        assert canary is not None, "settings refuse a bundle without one"
        hasher = None
        if config.cache_config.enable_prefix_caching and isinstance(block_size, int):
            digest = get_hash_fn_by_name(config.cache_config.prefix_caching_hash_algo)
            init_none_hash(digest)
            hasher = get_request_block_hasher(block_size, digest)
        params = SamplingParams(
            temperature=0.0, max_tokens=1, detokenize=False, extra_args={CANARY: True}
        )
        return Request(
            request_id=CANARY_ID,
            prompt_token_ids=list(canary.ids),
            sampling_params=params,
            pooling_params=None,
            arrival_time=0.0,
            priority=-(2**31),
            block_hasher=hasher,
        )


class _GuardedScheduler(_Guarded, Scheduler):  # type: ignore[misc]  # vLLM's
    """For engines that schedule a step when the one before has ended."""


class _GuardedAsyncScheduler(_Guarded, AsyncScheduler):  # type: ignore[misc]  # vLLM's
    """For engines that schedule ahead."""


GuardedScheduler: TypeAlias = _GuardedScheduler | _GuardedAsyncScheduler


def guarded_scheduler(vllm_config: VllmConfig, **given: object) -> GuardedScheduler:
    """Make the scheduler of an engine; vLLM calls this in the place of a class.

    Whether it schedules ahead is known only when the configuration is complete.

    Args:
        vllm_config: Of the engine.
        **given: Further arguments of vLLM's own scheduler.
    """
    ahead = bool(vllm_config.scheduler_config.async_scheduling)
    kind = _GuardedAsyncScheduler if ahead else _GuardedScheduler
    return kind(vllm_config, **given)
