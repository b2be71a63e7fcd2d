"""The second stage of a bundle: a probe on the assistant's header, put behind what was said.

The runtime, when a row alarms, puts the header of the assistant once more behind the row's ids
and reads the last position (`safe_decode.policy.self_check`). Here the same reading is taken from
finished responses: a probe is fitted on it, the first stage's threshold is fixed on *select*,
and the largest logit over the looks that a response would have had is certified on
*calibrate*. Readings take the runtime's own way, one forward each.

Knows responses, looks and their schedule. Does not know text or how a response is generated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from probes.activations.features import ResponseFeatures
from probes.activations.harvest import score_responses
from probes.activations.teacher_forcing import EncodedResponse, encode_response, onset_token
from probes.calibration.certify import certify
from probes.calibration.reach import Responses
from probes.calibration.statistic import smoothed_paths
from probes.data.conversations import Conversation, by_split
from probes.fitting.interface import FitSettings
from probes.fitting.linear import FitConfig
from probes.fitting.registry import fitter_for
from probes.runs.identity import weights_digest
from safe_decode.activations.site import Site
from safe_decode.activations.tap import ActivationTap, unwatched
from safe_decode.bundle.bundle import Fingerprint, ProbeBundle
from safe_decode.bundle.measured import named
from safe_decode.errors import ConfigurationError, DataError
from safe_decode.monitor.monitor import MonitorConfig
from safe_decode.policy.self_check import HeaderCheck, SelfCheck, looks_due
from safe_decode.probe.interface import Probe
from safe_decode.prompts.chat import assistant_header
from safe_decode.typing import CausalLM, Tokenizer

__all__ = ["HeaderConfig", "HeaderReader", "fit_header_check", "looks_of", "response_scalars"]

NO_LOOK = float(np.finfo(np.float32).min)
"""The scalar of a response that never alarms: it has no look, and no threshold lies below."""
UNCLEARED = float(np.finfo(np.float32).max)
"""The scalar of a response whose looks are spent while it alarms: it trips whatever they said."""


@dataclass(frozen=True, kw_only=True)
class HeaderConfig:
    """What the second stage is made of.

    Attributes:
        first_share: Share of the harmless responses of *select* that the first stage alarms
            on: it is there to be sensitive, the second to be right.
        every_tokens: Scores from a look to the next.
        max_looks: Looks a response may have.
        cuts: Looks taken of a response of *fit*, evenly spaced.
        fit: Of the probe.
        alphas: Certified bounds on the share of harmless responses that trip.
        delta: Chance that they do not hold.
    """

    first_share: float = 0.05
    every_tokens: int = 16
    max_looks: int = 12
    cuts: int = 4
    fit: FitSettings = FitConfig(method="token", c=0.1)
    alphas: tuple[float, ...] = (0.01,)
    delta: float = 0.05

    def __post_init__(self) -> None:
        if not 0 < self.first_share < 1 or self.cuts < 1:
            raise ConfigurationError(
                f"first_share={self.first_share} must lie in (0, 1) and cuts={self.cuts} be at "
                "least 1."
            )


class HeaderReader:
    """Reads the header behind parts of responses.

    Args:
        model: The protected model, in eval mode.
        tokenizer: Its tokenizer.
        sites: Where to read.
    """

    def __init__(self, model: CausalLM, tokenizer: Tokenizer, sites: Sequence[Site]) -> None:
        self._model, self._tap = model, ActivationTap(model, sites)
        self._header = assistant_header(tokenizer)

    def read(self, response: EncodedResponse, score: int) -> Tensor:
        """Read after the token that a score judged, [F] float32 on the CPU."""
        ids = [*response.ids[: response.turn_start + score], *self._header]
        device = next(self._model.parameters()).device
        with unwatched(), self._tap.listening() as beats, torch.no_grad():
            beats.keep_last(1)
            self._model(input_ids=torch.tensor([ids], device=device), use_cache=False)
            return beats.take()[0, -1].cpu()


def looks_of(
    path: NDArray[np.float32],
    threshold: float,
    check: SelfCheck | HeaderCheck,
    *,
    prefill_tokens: int = 0,
) -> list[int] | None:
    """List the scores at which a response would be looked at, all of them cleared.

    Args:
        path: [T + 1] smoothed statistic.
        threshold: Of the first stage.
        check: When looks are due.
        prefill_tokens: Leading tokens that were supplied: they are judged together, and looked
            at once, at their end.

    Returns:
        Score indices; None where the looks are spent before the response ends.
    """
    above = np.flatnonzero(path > threshold)
    if not len(above):
        return []
    first = max(int(above[0]), prefill_tokens)
    return looks_due(first, len(path), check.every_tokens, check.max_looks)


def response_scalars(
    model: CausalLM,
    tokenizer: Tokenizer,
    responses: Sequence[Conversation],
    paths: Sequence[NDArray[np.float32]],
    threshold: float,
    check: SelfCheck | HeaderCheck,
) -> NDArray[np.float64]:
    """Take each response's largest header logit over its looks, [n]: what is certified."""
    reader = HeaderReader(model, tokenizer, check.probe.sites)
    found = []
    for response, path in zip(responses, paths, strict=True):
        looks = looks_of(path, threshold, check, prefill_tokens=response.prefill_tokens)
        if looks is None:
            found.append(UNCLEARED)
            continue
        encoded = encode_response(tokenizer, response)
        logits = [float(check.probe(reader.read(encoded, at)[None]).max()) for at in looks]
        found.append(max(logits, default=NO_LOOK))
    return np.asarray(found, dtype=np.float64)


def fit_header_check(
    model: CausalLM,
    tokenizer: Tokenizer,
    conversations: Sequence[Conversation],
    bundle: ProbeBundle,
    config: HeaderConfig | None = None,
) -> ProbeBundle:
    """Add a second stage to a bundle.

    Args:
        model: The protected model, in eval mode.
        tokenizer: Its tokenizer.
        conversations: Judged, with splits; *fit*, *select* and *calibrate* are used.
        bundle: Made for the model; its probe and monitor are the first stage.
        config: See `HeaderConfig`.

    Raises:
        DataError: A split lacks harmful or harmless responses that its step needs.
        CertificateError: Too few harmless responses in *calibrate*.
    """
    config = config or HeaderConfig()
    dtype = bundle.measured_as(Fingerprint.of(model, tokenizer)).dtype
    parts = {
        split: [row for row in rows if row.response_harmful is not None]
        for split, rows in by_split(conversations).items()
    }
    probe = _fitted(model, tokenizer, parts["fit"], bundle.probe.sites, config)
    harmless = {
        split: [row for row in parts[split] if row.response_harmful is False]
        for split in ("select", "calibrate")
    }
    for split, rows in harmless.items():
        if not rows:
            raise DataError(f"the split {split!r} holds no harmless response; add some.")
    paths = {
        split: _paths(model, tokenizer, rows, bundle.probe, bundle.monitor)
        for split, rows in harmless.items()
    }
    tops = np.asarray([path.max() for path in paths["select"]], dtype=np.float64)
    # As the runtime compares it.
    first = float(np.float32(np.quantile(tops, 1 - config.first_share)))
    draft = SelfCheck(probe, 0.0, every_tokens=config.every_tokens, max_looks=config.max_looks)
    envelope, own = bundle.certificate(dtype=dtype).envelope, harmless["calibrate"]
    scalars = response_scalars(model, tokenizer, own, paths["calibrate"], first, draft)
    lengths = tuple(len(path) - 1 for path in paths["calibrate"])
    certificates = certify(
        scalars,
        [row.group for row in own],
        population="benign",
        alphas=config.alphas,
        delta=config.delta,
        envelope=envelope,
        reaches=Responses(lengths, weights_digest(model)).reaches(own, envelope),
    )
    rest = {"every_tokens": config.every_tokens, "max_looks": config.max_looks}
    check = HeaderCheck(probe, first, named(certificates, dtype), **rest)
    return replace(bundle, header_check=check)


def _fitted(
    model: CausalLM,
    tokenizer: Tokenizer,
    rows: Sequence[Conversation],
    sites: Sequence[Site],
    config: HeaderConfig,
) -> Probe:
    reader = HeaderReader(model, tokenizer, sites)
    values, labels, groups = [], [], []
    for row in rows:
        encoded = encode_response(tokenizer, row)
        onset = onset_token(tokenizer, row, encoded)
        # A harmful response of unknown onset is harmful at its end.
        harmful_from = encoded.n_scores - 1 if onset is None else onset + 1
        places = np.linspace(0, encoded.n_scores - 1, config.cuts + 1)[1:].round().astype(int)
        for at in sorted(set(places.tolist())):
            # Scores of a response begin before its first token: one that counts, one that not.
            values.append(np.repeat(reader.read(encoded, at).numpy()[None], 2, axis=0))
            labels.append(bool(row.response_harmful) and at >= harmful_from)
            groups.append(row.group)
    if len(set(labels)) < 2:
        raise DataError(
            "the looks at responses of the split 'fit' are all harmful or all harmless; add "
            "responses of the other kind."
        )
    features = ResponseFeatures(tuple(sites), tuple(values), (None,) * len(values))
    fit = replace(config.fit, before_onset="exclude")
    return fitter_for(fit).fit(features, labels, groups=groups).probe


def _paths(
    model: CausalLM,
    tokenizer: Tokenizer,
    rows: Sequence[Conversation],
    probe: Probe,
    monitor: MonitorConfig,
) -> list[NDArray[np.float32]]:
    device = next(model.parameters()).device
    return smoothed_paths(score_responses(model, tokenizer, rows, probe.to(device)), monitor)
