"""What follows one trip, run beside the batch it came from.

Knows one row's release, its cut and the rewinder. Does not know batches or queues. Whatever
fails here, the row's reader gets a proper end.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from safe_decode.engines.interface import GuardFacts
from safe_decode.engines.rows import Row
from safe_decode.engines.transformers.batch.served_row import ServedRow
from safe_decode.engines.transformers.call_spec import GuardedModel
from safe_decode.engines.transformers.guarded_rows import GuardedRows
from safe_decode.engines.transformers.loops.settings import CallSettings
from safe_decode.policy.redirect import REDIRECTS, CannedTexts
from safe_decode.session.records import Redirected
from safe_decode.session.session import Trip
from safe_decode.streaming.events import Finished, Tripped
from safe_decode.streaming.release import Cancelled

__all__ = ["Redirection", "RunGuard", "close_row"]

_LOG = logging.getLogger("safe_decode.serving")


def close_row(row: Row, error: BaseException) -> None:
    """End a row whose engine failed; what was held back is never shown."""
    name = type(error).__name__
    row.emit(Tripped(0, row.request.policy.redirect, 0, 0, error=name))
    row.emit(Finished("content_filter", outcome="closed", error=f"{name}: {error}"))


@dataclass(frozen=True)
class RunGuard:
    """What every run of an engine shares.

    Attributes:
        protected: The model and its guard.
        facts: What the rows are guarded by.
        texts: Canned ids.
        tells_scores: Whether each token's statistic is said.
    """

    protected: GuardedModel
    facts: GuardFacts
    texts: CannedTexts
    tells_scores: bool = field(kw_only=True)


class Redirection:
    """One tripped row on its way to its end.

    Args:
        rows: Of the batch.
        index: Of the row.
        served: The row; its reader is told of the trip here.
        trip: The trip.
        settings: Of the row.
        statistic: Of the tripping score; None if the guard failed.
    """

    def __init__(
        self,
        rows: GuardedRows,
        index: int,
        served: ServedRow,
        trip: Trip,
        *,
        settings: CallSettings,
        statistic: float | None,
    ) -> None:
        self._rows, self._index, self._served = rows, index, served
        self._trip, self._settings = trip, settings
        self._trip_step = served.row.request.prompt.scanned + served.release.n_chosen - 1
        self._dropped = served.trip(trip, statistic)

    def __call__(self) -> Redirected:
        """Continue or refuse the row, and end it."""
        row, release = self._served.row, self._served.release
        try:
            with torch.no_grad():
                redirected = self._redirect(row)
        except Cancelled:
            self._served.leave()
            raise
        except Exception as error:
            _LOG.exception("a continuation failed")
            close_row(row, error)
            raise
        release.complete()
        failed = self._trip.error or next(
            (t.record.error for t in redirected.tries if t.record.error is not None), None
        )
        row.emit(
            Finished(
                "content_filter",
                outcome="closed" if failed else REDIRECTS[redirected.how].outcome,
                shown_tokens=release.shown_tokens,
                dropped_tokens=self._dropped,
                trip_step=self._trip_step,
                void=self._served.void,
                stop=release.stop_string,
                error=None if failed is None else f"{type(failed).__name__}: {failed}",
            )
        )
        return redirected

    def _redirect(self, row: Row) -> Redirected:
        prompt, sampling = row.request.prompt, row.request.sampling
        options: dict[str, Any] = {"do_sample": self._settings.do_sample}
        if self._settings.do_sample:
            options |= {
                "temperature": sampling.temperature,
                "top_p": sampling.top_p,
                "top_k": sampling.top_k,
                "min_p": sampling.min_p or None,
            }
        if sampling.repetition_penalty is not None:
            options["repetition_penalty"] = sampling.repetition_penalty
        stops = self._stops if sampling.stop else None
        rewinder = self._rows.rewinder(self._index, self._settings, options, stops)
        return rewinder.redirect(
            self._trip,
            row=0,  # the row's own seed decides
            prompt=prompt.ids,
            prefill_tokens=prompt.prefill_tokens,
            said=self._served.said_ids,
            reader=self._served.release,
        )

    def _stops(self, ids: Tensor) -> bool:
        """Say whether the words of a continuation [n] hold a stop string; its newest ids decide."""
        stops = self._served.row.request.sampling.stop
        # A character may be split over four ids of bytes.
        newest = ids[-4 * max(map(len, stops)) - 16 :].tolist()
        text = self._rows.protected.tokenizer.decode(newest, skip_special_tokens=True)
        return any(stop in text for stop in stops)
