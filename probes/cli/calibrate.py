"""`safe-decode calibrate`: new certificates for a bundle, from fresh harmless responses.

Knows the options and how certificates are shown. Does not know how they are computed.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from probes.cli.options import DataOptions, whole
from probes.cli.shared_options.envelopes import (
    EnvelopeOptions,
    certificate_facts,
    envelope_of,
    foreign_note,
    require_delta,
)
from probes.cli.tables.facts import show_facts, show_warnings
from probes.recipes.early_checks import require_bundle_place, require_draws
from safe_decode.cli.command import command
from safe_decode.cli.console import console, print_json, require_place
from safe_decode.cli.options import JsonOptions, ModelOptions, NamedBundle
from safe_decode.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from probes.calibration.certify import Calibration
    from probes.data.conversations import Conversation
    from probes.data.reader import Reading
    from safe_decode.bundle.bundle import ProbeBundle
    from safe_decode.certificate import Envelope
    from safe_decode.loading import Loaded

__all__ = ["calibrate"]


@dataclass(frozen=True, kw_only=True)
class CalibrateOptions(EnvelopeOptions, DataOptions, ModelOptions, NamedBundle, JsonOptions):
    """Options of `safe-decode calibrate`."""

    out: Annotated[
        Path, typer.Option(help="Directory that the bundle with new certificates is written to.")
    ]
    alpha: Annotated[
        list[float] | None,
        typer.Option(
            help="False-alarm rate to certify; the first becomes the default. May be given "
            "several times. Without it: the rates of the bundle."
        ),
    ] = None


@command("Make a probe")
def calibrate(options: CalibrateOptions) -> None:
    """Certify a bundle's thresholds anew on harmless responses that nothing was chosen on.

    Certificates are of the number format that the model is loaded in (--dtype). Those of other
    formats stay in the bundle, which then serves the model in each of them.
    """
    require_place(options.out.parent / "file")
    require_bundle_place(options.out)
    require_delta(options.delta)
    old = options.load_bundle()
    readings = options.read()
    given = _harmless([row for one in readings for row in one.conversations])
    n_caps = 1 + len(options.cap or ())
    require_draws(given, _alphas(old, options), options.delta, n_caps=n_caps)
    own = options.load_model()
    from probes.calibration.formats import measured_for, require_default, with_certificates

    measured = measured_for(old, own.model, own.tokenizer)
    before = old.certificate(dtype=measured.dtype if measured.dtype in old.dtypes else None)
    require_default(old, measured.dtype, options.alpha)
    harmless, too_long = whole(own, given)
    envelope = envelope_of(own, harmless, options, before=before.envelope)
    found = _certified(own, old, harmless, options, envelope)
    record = {
        "bundle_before": old.digest,
        "dtype": measured.dtype,
        "responses": len(harmless),
        "not_of_this_model": sum(found.foreign.values()),
        "not_of_this_model_because": found.foreign,
        "too_long_for_the_context": too_long,
        "delta": options.delta,
        "refused": found.refused,
    }
    sources = [one.to_json() for one in readings]
    new = with_certificates(
        old,
        measured,
        found.certificates,
        default_alpha=options.alpha[0] if options.alpha else old.default_alpha,
        provenance={**old.provenance, "calibrated_again": {"sources": sources, **record}},
    )
    new.save(options.out)
    facts = [certificate_facts(one) for one in new.certificates if one.dtype == measured.dtype]
    if options.as_json:
        print_json(
            {
                "out": str(options.out),
                "bundle": new.digest,
                "dtype": measured.dtype,
                "dtypes": list(new.dtypes),
                "responses": len(harmless),
                "too_long_for_the_context": too_long,
                "certificates": facts,
                "refused": found.refused,
                "envelope": asdict(envelope),
            }
        )
    else:
        _show(readings, found, len(harmless), facts, options.out)
        console().print(f"The bundle is certified in {', '.join(new.dtypes)}.")


def _show(
    readings: Sequence[Reading],
    found: Calibration,
    responses: int,
    facts: Sequence[Mapping[str, object]],
    out: Path,
) -> None:
    warnings = [f"{name}: {why}" for name, why in found.refused.items()]
    if note := foreign_note(found.foreign, responses):
        warnings.append(note)
    show_warnings(readings, warnings)
    shown = {
        f"{one['population']} at {one['alpha']:g}, up to {one['max_new_tokens']} tokens": one
        for one in facts
    }
    show_facts("Certificates", shown, out)


def _alphas(bundle: ProbeBundle, options: CalibrateOptions) -> tuple[float, ...]:
    """Return the rates to certify: those asked for, else those of the bundle."""
    old = sorted({one.alpha for one in bundle.certificates}, reverse=True)
    return tuple(options.alpha or old)


def _harmless(rows: Sequence[Conversation]) -> list[Conversation]:
    """Take the harmless rows of the calibrate split, or all where there are no splits."""
    splits = any(row.split is not None for row in rows)
    kept = [
        row
        for row in rows
        if row.response_harmful is False and (not splits or row.split == "calibrate")
    ]
    if not kept:
        where = " in the split 'calibrate'" if splits else ""
        raise DataError(
            f"none of {len(rows)} conversations{where} is judged harmless (response_harmful 0); "
            "pass such responses."
        )
    return kept


def _certified(
    own: Loaded,
    bundle: ProbeBundle,
    rows: Sequence[Conversation],
    options: CalibrateOptions,
    envelope: Envelope,
) -> Calibration:
    from probes.activations.harvest import score_responses
    from probes.calibration.certify import certify_populations
    from probes.calibration.reach import Responses
    from probes.calibration.statistic import smoothed_paths
    from probes.data.near_duplicates import merge_near_duplicates

    # Near duplicates are one draw, not several.
    drawn = merge_near_duplicates(rows).conversations
    probe = bundle.probe.to(next(own.model.parameters()).device)
    logits = score_responses(own.model, own.tokenizer, drawn, probe)
    return certify_populations(
        drawn,
        smoothed_paths(logits, bundle.monitor),
        alphas=_alphas(bundle, options),
        delta=options.delta,
        envelope=envelope,
        responses=Responses.scored(own.model, logits),
        caps=options.cap or (),
        lower_caps=options.max_new_tokens is None,
    )
