"""The guard in vLLM's first model runner, which CPUs run: rows join, move and leave by index.

The runner tells its processor which rows there are, but neither positions nor the cache; those
are left by the model's forward. Knows this interface and the forward's context. Does not know how
rows are judged.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from vllm.v1.sample.logits_processor.interface import LogitsProcessor, MoveDirectionality

from safe_decode.engines.vllm.rows.row_judge import JudgedRows
from safe_decode.engines.vllm.rows.row_terms import require_request
from safe_decode.engines.vllm.runtime import GuardRuntime, runtime_of
from safe_decode.engines.vllm.settings import settings_in_force
from safe_decode.errors import BeatError

if TYPE_CHECKING:
    from vllm import SamplingParams
    from vllm.config import VllmConfig
    from vllm.v1.sample.logits_processor.interface import BatchUpdate

__all__ = ["GuardProcessorV1"]


class _Row:
    """A request in a row. Two are the same if they have the same parameters, object for object."""

    __slots__ = ("output", "params", "prompt")

    def __init__(
        self, params: SamplingParams, prompt: Sequence[int] | None, output: list[int]
    ) -> None:
        self.params, self.prompt, self.output = params, prompt or [], output

    def __hash__(self) -> int:
        return id(self.params)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Row) and other.params is self.params

    @property
    def n_known(self) -> int:
        return len(self.prompt) + len(self.output)

    def tokens(self, start: int, end: int) -> list[int]:
        """Return the ids from one position to another."""
        n_prompt = len(self.prompt)
        if start >= n_prompt:
            return self.output[start - n_prompt : end - n_prompt]
        return [*self.prompt[start:end], *self.output[: max(0, end - n_prompt)]]


class GuardProcessorV1(LogitsProcessor):  # type: ignore[misc]  # vLLM is not there when types are checked
    """The guard's logits processor; the last one, since the others come before it in the list.

    Args:
        vllm_config: Of the engine.
        device: Of the logits.
        is_pin_memory: Not used.
    """

    def __init__(self, vllm_config: VllmConfig, device: torch.device, is_pin_memory: bool) -> None:
        del is_pin_memory
        self._runtime: GuardRuntime = runtime_of(vllm_config)
        self._device, self._config = device, vllm_config
        self._rows: dict[int, _Row] = {}
        self._seats: dict[_Row, int] = {}

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """Check what a request asks for, where requests come in; see `require_request`."""
        require_request(sampling_params, settings_in_force())

    def is_argmax_invariant(self) -> bool:
        """Say that greedy rows need it too."""
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Let rows leave, join and move."""
        if batch_update is None:
            return
        rows = self._rows
        for index in batch_update.removed:
            rows.pop(index, None)
        for index, params, prompt, output in batch_update.added:
            rows[index] = _Row(params, prompt, output)
        for source, target, direction in batch_update.moved:
            moved, displaced = rows.pop(source, None), rows.pop(target, None)
            if moved is not None:
                rows[target] = moved
            if displaced is not None and direction is MoveDirectionality.SWAP:
                rows[source] = displaced
        self._rows = {i: row for i, row in rows.items() if i < batch_update.batch_size}
        self._seat()

    def apply(self, logits: Tensor) -> Tensor:
        """Judge the forward that made the logits [rows, vocab], and force what rows must say.

        Raises:
            BeatError: No forward was scored since the last call, or another batch was.
            CanaryError: See `GuardRuntime.decide`.
        """
        forward = self._runtime.forward_v1
        self._runtime.forward_v1 = None
        n_rows = len(logits)
        if forward is None or sorted(self._rows) != list(range(n_rows)):
            raise BeatError(
                f"the engine chooses for {n_rows} rows, of which the guard knows "
                f"{len(self._rows)}, and the newest forward was "
                f"{'not scored' if forward is None else 'scored'}; each token has exactly one "
                "score."
            )
        rows = [self._rows[i] for i in range(n_rows)]
        starts = forward.starts[: n_rows + 1].cpu().numpy()
        judged = JudgedRows(
            seats=np.array([self._seats[row] for row in rows], dtype=np.int64),
            read=forward.read[:n_rows].cpu().numpy().astype(np.int64),
            in_forward=np.diff(starts).astype(np.int64),
            known=np.array([row.n_known for row in rows], dtype=np.int64),
            newest=torch.tensor([(row.output or row.prompt)[-1] for row in rows]),
            blocks=forward.blocks[:n_rows],
            block_size=self._runtime.block_size,
        )
        return self._runtime.decide(judged, self._tokens(rows, judged), logits)

    def _tokens(self, rows: Sequence[_Row], judged: JudgedRows) -> Tensor:
        """[rows, n] the ids at the positions that are due, with zeros behind them."""
        judge = self._runtime.judge
        assert judge is not None
        counts = judge.due_positions(judged)
        tokens = np.zeros((len(rows), int(counts.max(initial=0))), dtype=np.int64)
        for i in np.flatnonzero(counts).tolist():
            end = int(judged.read[i])
            tokens[i, : counts[i]] = rows[i].tokens(end - int(counts[i]), end)
        return torch.from_numpy(tokens)

    def _seat(self) -> None:
        present = set(self._rows.values())
        for row in [row for row in self._seats if row not in present]:
            del self._seats[row]
            self._runtime.leave(row)
        for row in present:
            if row not in self._seats:
                self._seats[row] = self._runtime.join(row, row.prompt, row.params, row.n_known)
