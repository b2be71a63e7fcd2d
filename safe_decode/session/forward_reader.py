"""From the forward that has just passed to the logits of every row.

Knows the recorder, the probe, and how many positions a forward may have. Does not know
statistics, thresholds or what a trip is.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from safe_decode.activations.tap import ForwardRecorder
from safe_decode.errors import BeatError
from safe_decode.probe.interface import Probe

__all__ = ["ForwardReader"]


class ForwardReader:
    """Reads the forwards of one session.

    Args:
        probe: On the device of the features.
        recorder: Of a tap that listens to this context.

    Attributes:
        is_prefilled: Whether the prompt has been read.
    """

    def __init__(self, probe: Probe, recorder: ForwardRecorder) -> None:
        self._probe, self._recorder = probe, recorder
        self.is_prefilled = False

    def prompt(self, positions: Sequence[int], batch: int) -> Tensor:
        """Return the logits [batch, seq, K] of the last positions of the prompt.

        Args:
            positions: How many positions the forward may have had.
            batch: Rows it must have had.

        Raises:
            BeatError: No such forward.
            ConfigurationError: Features do not fit the probe.
        """
        logits = self._probe(self._features(positions, batch))
        self._recorder.keep_last(1)
        self.is_prefilled = True
        return logits

    def token(self, positions: Sequence[int], batch: int) -> Tensor:
        """Return the logits [batch, K] of the newest token. Arguments and errors as `prompt`."""
        return self._probe(self._features(positions, batch)[:, -1])

    def whole(self, width: int, batch: int) -> Tensor:
        """Return the logits [batch, seq, K] of finished responses. Errors as `prompt`."""
        logits = self._probe(self._features((width,), batch))
        self.is_prefilled = True
        return logits

    def given(self, features: Tensor, batch: int) -> Tensor:
        """Return the logits [batch, K] of features that somebody else has read.

        Raises:
            BeatError: Another batch.
            ConfigurationError: Features do not fit the probe.
        """
        if features.shape[0] != batch:
            raise foreign_batch(features, batch)
        self.is_prefilled = True
        return self._probe(features)

    def keep_last(self, n_positions: int) -> None:
        """Keep so many of the last positions of the forwards to come."""
        self._recorder.keep_last(n_positions)

    def discard(self) -> None:
        """Forget the forwards since the last one that was read."""
        self._recorder.discard()

    def require_quiet(self) -> None:
        """Check that no forward passed since the last one that was read.

        Raises:
            BeatError: One did.
        """
        if self._recorder.positions or self._recorder.forwards:
            raise BeatError(
                f"{self._recorder.forwards} forwards over {self._recorder.positions} positions "
                "passed after the last choice, wanted none; mark your own with "
                "safe_decode.unwatched()."
            )

    def _features(self, positions: Sequence[int], batch: int) -> Tensor:
        heard, seen = self._recorder.forwards, self._recorder.positions
        # A prompt may pass in chunks; a token passes once.
        if (heard > 1 and self.is_prefilled) or (heard and seen not in positions):
            self._recorder.discard()
            raise BeatError(
                f"{heard} forwards over {seen} positions passed before one choice, wanted one "
                f"over {' or '.join(map(str, positions))}; each token has exactly one score."
            )
        features = self._recorder.take()
        if features.shape[0] != batch:
            raise foreign_batch(features, batch)
        return features


def foreign_batch(features: Tensor, batch: int) -> BeatError:
    """Say that a forward had another number of rows than its session."""
    return BeatError(
        f"a forward had {features.shape[0]} rows, the session {batch}; "
        "open a session for the batch that generate runs."
    )
