"""The arms of the ladder: one more part of the guard on each rung, all in `model.generate`.

Knows how each rung is called and where its clock ticks. Does not know rounds or statistics.
Every arm generates the same number of tokens from the same prompt ids, greedily, and takes a
stamp when each token is chosen, by a stopping criterion that all arms have. So the time to the
first token, that of each further one, and the rest (the closing forward, traces) come apart. On
a CUDA device the criterion records an event too: what the device did between two of them is
told apart from what the host did. Where graphs are compiled, taps are installed before the
clock runs, and taken out for arms without.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

import torch
from torch import Tensor
from transformers import StoppingCriteria

from safe_decode.activations.tap import ActivationTap, ForwardRecorder
from safe_decode.bench.compile_modes import Mode, mode_options
from safe_decode.bench.models import Subject
from safe_decode.engines.transformers.decoder import SafeDecoder
from safe_decode.monitor.monitor import RiskMonitor
from safe_decode.policy.policy import Policy
from safe_decode.probe.interface import Probe
from safe_decode.session.trip_detector import TripDetector
from safe_decode.typing import CausalLM

__all__ = [
    "ARMS",
    "Arm",
    "Clock",
    "Lap",
    "Load",
    "ArmCall",
    "arms_of",
    "called_last",
    "options_of",
    "threshold_for_share",
]

ArmName = Literal["bare", "hooks", "capture", "probe", "monitor", "guard", "tripping"]
"""bare: `generate`. hooks: with hooks to which no session listens. capture: with features
taken each step. probe: and a logit made of them. monitor: and watched. guard:
`SafeDecoder.generate`, the policy and the redirect included, no row tripping. tripping: the same
with a share of the rows tripping, so that some rows end early."""

ARMS: tuple[ArmName, ...] = ("bare", "hooks", "capture", "probe", "monitor", "guard", "tripping")


Clock = Literal["wall", "cpu"]
_NOW: dict[Clock, Callable[[], int]] = {"wall": time.perf_counter_ns, "cpu": time.process_time_ns}


@dataclass(frozen=True)
class Load:
    """What each arm is asked for.

    Attributes:
        batch: Rows.
        context: Prompt tokens of each row.
        new_tokens: Tokens generated, at least 2.
        clock: wall, or cpu: the time this process computed, which a busy machine disturbs less
            and which says nothing about accelerators.
        mode: How the model runs.
        backend: Of torch.compile, in compiled modes.
    """

    batch: int = 1
    context: int = 128
    new_tokens: int = 64
    clock: Clock = "wall"
    mode: Mode = "eager"
    backend: str = "inductor"


@dataclass(frozen=True)
class Lap:
    """What one call took, in nanoseconds.

    Attributes:
        first: Until the first token was chosen.
        steps: Between one token and the next.
        rest: From the last token to the end of the call.
        device_steps: As `steps`, by the device's clock; empty where it has none.
    """

    first: int
    steps: tuple[int, ...]
    rest: int
    device_steps: tuple[int, ...] = ()


class _Stamps(StoppingCriteria):
    """Notes when a token was chosen; ends nothing."""

    def __init__(self, nobody: torch.BoolTensor, now: Callable[[], int]) -> None:
        self.taken: list[int] = []
        self._events: list[Any] = []
        self._now = now
        self._nobody = nobody

    def __call__(self, input_ids: object, scores: object, **kwargs: object) -> torch.BoolTensor:  # noqa: ARG002
        self.taken.append(self._now())
        if self._nobody.is_cuda:
            event: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            event.record()
            self._events.append(event)
        return self._nobody

    def device_steps(self) -> tuple[int, ...]:
        """Nanoseconds between events, once the device has been waited for."""
        pairs = zip(self._events, self._events[1:], strict=False)
        return tuple(round(1e6 * a.elapsed_time(b)) for a, b in pairs)


ArmCall = Callable[..., object]
"""Takes the keyword arguments of `generate`."""


@dataclass
class Arm:
    """One rung.

    Attributes:
        name: Of the rung.
        run: What is timed.
        within: What it runs in, entered before the clock runs.
    """

    name: str
    run: ArmCall
    within: Callable[[], AbstractContextManager[Any]] = nullcontext

    def call(self, **options: object) -> object:
        """Run once, untimed."""
        with self.within():
            return self.run(**options)

    def lap(self, options: dict[str, Any], clock: Clock = "wall") -> Lap:
        """Run once and say what it took; accelerators are waited for at both ends."""
        ids, now = options["input_ids"], _NOW[clock]
        nobody = torch.zeros(ids.shape[0], dtype=torch.bool, device=ids.device)
        stamps = _Stamps(cast("torch.BoolTensor", nobody), now)
        with self.within():
            _wait(ids.device)
            began = now()
            self.run(**options, stopping_criteria=[stamps])
            _wait(ids.device)
            ended = now()
        taken = stamps.taken
        steps = tuple(b - a for a, b in zip(taken, taken[1:], strict=False))
        return Lap(taken[0] - began, steps, ended - taken[-1], stamps.device_steps())


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def options_of(subject: Subject, load: Load, *, seed: int = 0) -> dict[str, Any]:
    """Draw prompt ids and fix the length; the same for every arm."""
    generator = torch.Generator().manual_seed(seed)
    vocab = subject.model.config.get_text_config().vocab_size
    ids = torch.randint(3, vocab, (load.batch, load.context), generator=generator)
    ids = ids.to(subject.model.device)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "max_new_tokens": load.new_tokens,
        "min_new_tokens": load.new_tokens,
        "do_sample": False,
        **mode_options(load.mode, load.backend),
    }


def arms_of(subject: Subject, load: Load, *, tripping_share: float = 0.1) -> dict[str, Arm]:
    """Build every rung for a subject.

    Args:
        subject: The model and its bundle.
        load: Batch, context, length.
        tripping_share: Of the rows, in the last arm; left out where the batch is too small.
    """
    model, is_eager = subject.model, load.mode == "eager"
    tap = ActivationTap(model, subject.bundle.probe.sites)
    probe = subject.bundle.probe.to(model.device)
    built_in = nullcontext if is_eager else tap.built_in

    def hooks(**options: object) -> None:
        with tap.installed():
            model.generate(**options)

    arms = [Arm("bare", model.generate), Arm("hooks", hooks, built_in)]
    for depth in ("capture", "probe", "monitor"):
        arms.append(Arm(depth, _partial(subject, tap, probe, depth), built_in))
    arms.append(_guarded("guard", subject.decoder(), load))
    if load.batch * tripping_share >= 1:
        threshold = threshold_for_share(subject, load, tripping_share)
        arms.append(_guarded("tripping", subject.decoder(threshold, redirect="refuse"), load))
    return {arm.name: arm for arm in arms}


def _guarded(name: str, decoder: SafeDecoder, load: Load) -> Arm:
    def run(**options: Any) -> object:  # noqa: ANN401 - those of generate
        return decoder.generate(**options)

    return Arm(name, run, nullcontext if load.mode == "eager" else decoder.installed)


def threshold_for_share(subject: Subject, load: Load, share: float) -> float:
    """Find, eagerly, the threshold that this share of the rows exceeds."""
    options = options_of(subject, replace(load, mode="eager"))
    # Under protection, since unseen tokens behind the cap may trip a row too.
    output = subject.decoder(redirect="refuse").generate(**options)
    peaks = sorted(max(step.statistic for step in trace.steps) for trace in output.traces)
    n_tripping = max(1, round(share * load.batch))
    return (peaks[-n_tripping - 1] + peaks[-n_tripping]) / 2


def _partial(subject: Subject, tap: ActivationTap, probe: Probe, depth: str) -> ArmCall:
    """Build a rung between hooks and guard: a processor that does a part of the guard's step."""

    def run(**options: Any) -> None:  # noqa: ANN401 - those of generate
        with tap.listening() as beats, torch.no_grad():
            step = _parts(subject, beats, probe, depth, options["input_ids"])

            def processor(_ids: Tensor, scores: Tensor) -> Tensor:
                step()
                return scores

            with called_last(subject.model, processor):
                subject.model.generate(**options)

    return run


def _parts(
    subject: Subject, beats: ForwardRecorder, probe: Probe, depth: str, ids: Tensor
) -> Callable[[], object]:
    monitor = RiskMonitor(subject.bundle.monitor, torch.inf)
    watch = TripDetector(monitor, Policy(), monitor.start(ids.shape[0], ids.device))

    def features() -> Tensor:
        return beats.take()[:, -1]

    def logits() -> Tensor:
        return probe(features())

    def watched() -> Tensor:
        watch.step(logits())
        return watch.trips()

    return {"capture": features, "probe": logits, "monitor": watched}[depth]


@contextmanager
def called_last(model: CausalLM, processor: Callable[[Tensor, Tensor], Tensor]) -> Iterator[None]:
    """Have `generate` call a processor as the guard does: outside the list, which inspects."""
    patched: Any = model  # a private method of transformers
    build = patched._get_logits_processor

    def with_ours(*args: object, **kwargs: object) -> object:
        built = build(*args, **kwargs)
        return lambda ids, scores: processor(ids, built(ids, scores))

    patched._get_logits_processor = with_ours
    try:
        yield
    finally:
        del patched._get_logits_processor
