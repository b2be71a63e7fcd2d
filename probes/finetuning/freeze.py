"""Train a model while some of its units stay bit for bit what they were.

Masking gradients alone does not hold a weight still: decoupled weight decay and momentum
move it all the same. Here the gradient of frozen weights is taken away as soon as it is
accumulated, so that clipping norms and moments never see it, and after every step of the
optimizer the frozen weights are written back from a copy made when training began.

What is frozen are the unit's weights (`unit_weights` says which), not what the unit computes:
its inputs change as the rest is trained, and so do norms, embeddings and output biases,
which belong to no unit. How weights are held is in `frozen_weights`.

Knows training loops and `transformers.Trainer`. Does not know how units are located, and
takes no model with sharded or quantised weights; LoRA is held through `lora`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from probes.finetuning.frozen_weights import HeldWeights
from probes.finetuning.unit_weights import WeightSlice
from safe_decode.errors import ConfigurationError, UnsupportedError
from safe_decode.typing import CausalLM

__all__ = ["UnitFreeze"]


class UnitFreeze(TrainerCallback, ABC):
    """Holds weights still while a model is trained; a subclass says which.

    As a callback: `Trainer(..., callbacks=[freeze])`. Around any other loop:
    `with freeze.applied(model, optimizer): ...`. One object holds one model at a time. A
    trainer's run that raises does not say that it ended; `release` takes the hooks off.

    Args:
        offload: Keep the copy of the frozen weights in CPU memory. It costs a transfer a
            step and saves the device as much memory as the frozen weights take.
    """

    def __init__(self, *, offload: bool = False) -> None:
        self._offload = offload
        self._hold: HeldWeights | None = None

    @abstractmethod
    def frozen_weights(self, model: CausalLM) -> tuple[WeightSlice, ...]:
        """Name the weights of a model that are held.

        Raises:
            ConfigurationError: A unit is outside the model.
            UnsupportedError: See `unit_weights.owned_weights`.
        """

    def n_frozen(self, model: CausalLM) -> int:
        """Count the entries of the weights that are held."""
        parameters = dict(model.named_parameters())
        return sum(part.count(parameters[part.name]) for part in self.frozen_weights(model))

    @contextmanager
    def applied(self, model: CausalLM, *optimizers: torch.optim.Optimizer) -> Iterator[None]:
        """Hold the weights while the block runs, whatever it raises.

        Args:
            model: Trained by the block; changed in place by its optimizers alone.
            optimizers: All that step on the model; accelerate's wrapper is looked into.

        Raises:
            ConfigurationError: No optimizer, one without parameters of the model, or this
                object holds a model already.
        """
        # accelerate's wrapper steps through the optimizer inside it, whose hooks run.
        inner = [getattr(optimizer, "optimizer", optimizer) for optimizer in optimizers]
        _require_optimizers(model, inner)
        self._engage(model)
        try:
            handles = [
                optimizer.register_step_post_hook(lambda *_: self._restore()) for optimizer in inner
            ]
            try:
                yield
            finally:
                for handle in handles:
                    handle.remove()
                self._restore()  # whatever else wrote to the model since the last step
        finally:
            self.release()

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **given: Any,  # noqa: ANN401 - what a trainer hands to callbacks
    ) -> None:
        """Take the copy; a checkpoint to resume from has been loaded by now.

        Raises:
            ConfigurationError: The checkpoint's frozen weights are not those that the run
                began with.
            UnsupportedError: The trainer runs several processes or shards the model.
        """
        del control
        if args.world_size > 1 or args.fsdp or args.deepspeed:
            raise UnsupportedError(
                f"the trainer runs {args.world_size} processes, or shards the model (fsdp, "
                "deepspeed); holding weights still is not tested there; train in one process."
            )
        self.release()  # a run that raised never said that it ended
        self._engage(given["model"])
        try:
            self._recall(state)
        except ConfigurationError:
            self.release()
            raise

    def on_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **given: object,
    ) -> None:
        """Write the frozen weights back."""
        del args, state, control, given
        self._restore()

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **given: object,
    ) -> None:
        """Restore the frozen weights once more and remove the hooks."""
        del args, state, control, given
        self._restore()  # whatever else wrote to the model since the last step
        self.release()

    def release(self) -> None:
        """Take the hooks off: needed by hand only after a trainer's run that raised."""
        if self._hold is not None:
            self._hold.release()
            self._hold = None

    def _engage(self, model: CausalLM) -> None:
        if self._hold is not None:
            raise ConfigurationError(
                f"this {type(self).__name__} holds a model already; make one for each run."
            )
        self._hold = HeldWeights(model, self.frozen_weights(model), offload=self._offload)

    def _restore(self) -> None:
        if self._hold is None:
            raise ConfigurationError(
                f"this {type(self).__name__} was added after training began; pass it to the "
                "trainer's callbacks."
            )
        self._hold.restore()

    def _recall(self, state: TrainerState) -> None:
        """Compare with what the run began with; the trainer's log travels in checkpoints."""
        assert self._hold is not None
        name, digest = type(self).__name__, self._hold.digest()
        log: list[dict[str, Any]] = state.log_history
        begun = [entry[name] for entry in log if name in entry]
        if begun and begun[0] != digest:
            raise ConfigurationError(
                f"the checkpoint's run began with frozen weights {begun[0]}, these are {digest}; "
                "resume with the units and options it began with, from an untouched checkpoint."
            )
        if not begun:
            log.append({name: digest, "step": state.global_step})


def _require_optimizers(model: CausalLM, optimizers: Sequence[torch.optim.Optimizer]) -> None:
    own = {id(parameter) for parameter in model.parameters()}
    for optimizer in optimizers:
        stepped = (id(p) for group in optimizer.param_groups for p in group["params"])
        if own.isdisjoint(stepped):
            raise ConfigurationError(
                "an optimizer steps on no parameter of the model, so nothing would be held "
                "still; make it from model.parameters() of this very model."
            )
    if not optimizers:
        raise ConfigurationError("no optimizer was given; pass all that step on the model.")
