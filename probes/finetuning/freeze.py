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
from typing import Any, Literal

import numpy as np
import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from probes.finetuning.frozen_weights import HeldWeights
from probes.finetuning.lora import (
    carries_adapters,
    held_in_adapters,
    plain_architecture,
    trained_in_adapters,
)
from probes.finetuning.unit_weights import Shared, WeightSlice, complement, owned_weights
from probes.location.units import CATEGORIES, Category, UnitSet
from safe_decode.errors import ConfigurationError, UnsupportedError
from safe_decode.typing import CausalLM

__all__ = ["RedundantUnitBudget", "SafetyFreeze", "UnitFreeze", "safety_setting"]

_TOP_COMPLEX = 0.06  # the paper's setting (i)


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


class SafetyFreeze(UnitFreeze):
    """Holds safety-critical units still and trains the rest.

    Args:
        units: As located on the model, all of its units.
        categories: Frozen whole.
        complex_share: Share of the complex units that is frozen too, those of largest
            I_S - I_U, within each kind if they were located by separate rankings. The
            paper's "top 6 %" is read as a share of the complex units, not of all.
        shared: Whether key and value rows that several heads share are frozen with `any`
            of these heads, so that each frozen head is held whole, or with `all` of them.
        offload: See `UnitFreeze`.

    Raises:
        ConfigurationError: No unit is frozen, or the options contradict each other.
    """

    def __init__(
        self,
        units: UnitSet,
        categories: Sequence[Category] = ("SCU",),
        *,
        complex_share: float = 0.0,
        shared: Shared = "any",
        offload: bool = False,
    ) -> None:
        super().__init__(offload=offload)
        _require_categories(categories)
        if not 0 <= complex_share <= 1 or (complex_share and "CU" in categories):
            raise ConfigurationError(
                f"complex_share={complex_share} must be in 0..1, and 0 where categories holds CU."
            )
        self.units = _with_top_complex(units, categories, complex_share)
        self.shared: Shared = shared
        _require_some(self.units, categories)

    def frozen_weights(self, model: CausalLM) -> tuple[WeightSlice, ...]:
        """Name the weights of the frozen units; see `adapters` for models that carry LoRA."""
        if carries_adapters(model):
            plain = plain_architecture(model)
            return held_in_adapters(model, owned_weights(plain, self.units, shared=self.shared))
        return owned_weights(model, self.units, shared=self.shared)


class RedundantUnitBudget(UnitFreeze):
    """Trains redundant units and holds everything else still.

    Embeddings, norms, output biases and the output head are held too, and so are key and
    value rows that a redundant head shares with one that is not.

    Args:
        units: As located on the model.
        categories: Trained.
        offload: See `UnitFreeze`.

    Raises:
        ConfigurationError: No unit is trained.
    """

    def __init__(
        self, units: UnitSet, categories: Sequence[Category] = ("RU",), *, offload: bool = False
    ) -> None:
        super().__init__(offload=offload)
        _require_categories(categories)
        self.units = units.only(*categories)
        _require_some(self.units, categories)

    def frozen_weights(self, model: CausalLM) -> tuple[WeightSlice, ...]:
        """Name all weights but those of the trained units; with LoRA, all that is trained."""
        if carries_adapters(model):
            owned = owned_weights(plain_architecture(model), self.units, shared="all")
            return trained_in_adapters(model, owned)
        return complement(model, owned_weights(model, self.units, shared="all"))


def safety_setting(
    units: UnitSet, setting: Literal["i", "ii"], *, offload: bool = False
) -> SafetyFreeze:
    """Freeze as the paper does.

    Args:
        units: As located on the model.
        setting: i: the safety-critical and the top 6 % of the complex units. ii: the
            safety-critical and all complex units.
        offload: See `UnitFreeze`.

    Raises:
        ConfigurationError: Another setting.
    """
    if setting not in ("i", "ii"):
        raise ConfigurationError(f"setting={setting!r} is not 'i' or 'ii'; pass one of these.")
    if setting == "i":
        return SafetyFreeze(units, complex_share=_TOP_COMPLEX, offload=offload)
    return SafetyFreeze(units, ("SCU", "CU"), offload=offload)


def _with_top_complex(units: UnitSet, categories: Sequence[Category], share: float) -> UnitSet:
    """Keep the units of some categories and the most critical complex ones."""
    wanted = np.isin(units.category, [CATEGORIES.index(category) for category in categories])
    is_complex = units.category == CATEGORIES.index("CU")
    separate = units.provenance.get("ranking") == "separate"
    pools = [is_complex & (units.kind == kind) for kind in (0, 1)] if separate else [is_complex]
    excess = units.i_s.astype(np.float64) - units.i_u
    for pool in pools:
        ranked = np.flatnonzero(pool)
        ranked = ranked[np.argsort(-excess[ranked], kind="stable")]
        wanted[ranked[: round(share * len(ranked))]] = True
    return units.take(np.flatnonzero(wanted))


def _require_categories(categories: Sequence[Category]) -> None:
    if isinstance(categories, str) or not categories or set(categories) - set(CATEGORIES):
        raise ConfigurationError(
            f"categories={categories!r} is not a non-empty sequence of {CATEGORIES}; pass some."
        )


def _require_some(units: UnitSet, categories: Sequence[Category]) -> None:
    if not len(units):
        raise ConfigurationError(
            f"units hold none of categories={tuple(categories)}; locate again with larger ratios."
        )


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
