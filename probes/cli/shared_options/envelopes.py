"""How responses were generated, from what rows record and what the options say.

Knows options of the commands that certify. Does not know how caps are supported; that is
`probes.calibration.reach` and `safe_decode.evidence`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from safe_decode.errors import ConfigurationError

if TYPE_CHECKING:
    from probes.data.conversations import Conversation
    from probes.data.generation import Generation
    from safe_decode.certificate import Certificate, Envelope
    from safe_decode.loading import Loaded

__all__ = ["EnvelopeOptions", "certificate_facts", "envelope_of", "foreign_note", "require_delta"]


@dataclass(frozen=True, kw_only=True)
class EnvelopeOptions:
    """How the certified responses were generated; None where the command line does not say."""

    delta: Annotated[
        float, typer.Option(help="Largest chance that the bounds of a population do not hold.")
    ] = 0.05
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Longest response to certify, in tokens. Without it: the longest that the "
            "responses support.",
        ),
    ] = None
    cap: Annotated[
        list[int] | None,
        typer.Option(
            min=1,
            help="A smaller length to certify too, in tokens; a call takes the smallest that "
            "covers it, whose threshold finds more. May be given several times.",
        ),
    ] = None
    temperature: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            help="Temperature at which the responses were sampled; 0 stands for greedy decoding. "
            "Without it: what the responses record, else what the bundle that is calibrated "
            "states, else 0.",
        ),
    ] = None
    top_p: Annotated[
        float | None,
        typer.Option(
            help="Probability mass (top-p) that the responses were sampled from. Without it: what "
            "the responses record, else what the bundle that is calibrated states, else 1."
        ),
    ] = None
    top_k: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Most probable tokens (top-k) that the responses were sampled from; 0 stands for "
            "all. Without it: what the responses record, else what the bundle that is calibrated "
            "states, else 0.",
        ),
    ] = None


def envelope_of(
    own: Loaded,
    rows: Sequence[Conversation],
    asked: EnvelopeOptions,
    *,
    before: Envelope | None = None,
) -> Envelope:
    """Gather an envelope: options first, then what the rows record, then what was certified.

    Without an option the cap is the largest that any row could speak of; how much of it the
    responses support is for calibration to say.

    Args:
        own: The model, whose own options rows without a record are taken to have had, and its
            tokenizer, which counts their tokens.
        rows: Those that are certified on.
        asked: The options.
        before: Of the bundle that is certified anew.

    Raises:
        ConfigurationError: top_p outside (0, 1].
    """
    from probes.activations.teacher_forcing import encode_response
    from safe_decode.certificate import Envelope
    from safe_decode.engines.transformers.coverage import record_of
    from safe_decode.prompts.chat import stop_ids

    start = before or Envelope(
        max_new_tokens=1, do_sample=False, temperature=1.0, top_p=1.0, top_k=0
    )
    options = record_of(own.model.generation_config, stop_ids(own.model, own.tokenizer))
    changes: dict[str, Any] = {"options": options}
    if (recorded := _recorded(rows)) is not None:
        names = ("do_sample", "temperature", "top_p", "top_k")
        changes |= {name: getattr(recorded, name) for name in names}
        changes["options"] = recorded.options or options
    if asked.temperature is not None:
        changes |= {"do_sample": asked.temperature > 0, "temperature": asked.temperature or 1.0}
    changes |= {
        name: value for name in ("top_p", "top_k") if (value := getattr(asked, name)) is not None
    }
    cap = asked.max_new_tokens
    if cap is None:
        generated = [r.prefill_tokens + r.generation.max_new_tokens for r in rows if r.generation]
        written = [encode_response(own.tokenizer, r).n_scores - 1 for r in rows if not r.generation]
        cap = max([*generated, *written, 1])
    found = replace(start, max_new_tokens=cap, **changes)
    if not 0.0 < found.top_p <= 1.0:
        raise ConfigurationError(f"--top-p={found.top_p:g} is outside (0, 1]; pass 1 for all.")
    return found


def certificate_facts(certificate: Certificate) -> dict[str, object]:
    """Return what a command prints of a new certificate, for programs and for tables."""
    names = ("population", "alpha", "delta", "n", "j", "threshold")
    return {
        **{name: getattr(certificate, name) for name in names},
        "dtype": certificate.dtype,
        "source": certificate.evidence.source,
        "max_new_tokens": certificate.envelope.max_new_tokens,
    }


def foreign_note(foreign: dict[str, int], rows: int) -> str | None:
    """Say why certificates are off-policy; None where every response is the model's own."""
    if not foreign:
        return None
    reasons = "; ".join(f"{count:,}: {why}" for why, count in foreign.items())
    return (
        f"{sum(foreign.values()):,} of {rows:,} calibration responses are not this model's own "
        f"({reasons}); the certificates are off-policy: they speak of such text, not of what the "
        "model will say. Make responses with `safe-decode rollout`."
    )


def require_delta(delta: float) -> None:
    """Refuse, before any work, a confidence that no bundle may have.

    Raises:
        ConfigurationError: It lies outside (0, 0.2].
    """
    from safe_decode.bundle.plausible import MOST_DELTA

    if not 0.0 < delta <= MOST_DELTA:
        raise ConfigurationError(
            f"--delta={delta:g} is outside (0, {MOST_DELTA:g}]: a bound that fails more often is "
            "no promise; pass 0.05."
        )


def _recorded(rows: Sequence[Conversation]) -> Generation | None:
    """Return the one way of sampling that the rows record; None where there is not one."""
    ways = {
        replace(row.generation, weights="", max_new_tokens=1)
        for row in rows
        if row.generation is not None
    }
    return ways.pop() if len(ways) == 1 else None
