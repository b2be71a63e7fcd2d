"""What the operator sees at start: what is guarded, and which settings are in effect.

Knows settings, where they come from, and the facts of an engine. Does not know terminals.
"""

from __future__ import annotations

from safe_decode.engines.interface import GuardFacts
from safe_decode.serving.middleware.hosts import AllowedHosts
from safe_decode.serving.sources import Origin, SettingsGiven

__all__ = ["first_screen"]

_ORIGINS: dict[Origin, str] = {
    "flag": "set by flags",
    "--set": "set by --set",
    "environment": "environment",
    "file": "set by --config",
    "demo": "for the demo",
    "default": "by default",
}


def first_screen(given: SettingsGiven, facts: GuardFacts) -> list[tuple[str, str]]:
    """Say what is guarded, by which certificate, what is refused, and how it is set.

    Args:
        given: The settings in effect, and where they come from.
        facts: Of the engine, for what the settings leave to the bundle.

    Returns:
        Names and texts. Every setting stands in one of the last rows, keys as their number.
    """
    settings = given.settings
    certificate, envelope = facts.certificate, facts.certificate.envelope
    n_keys = len(settings.api_keys) + len(settings.shadow_keys)
    how = f"temperature {envelope.temperature:g}" if envelope.do_sample else "greedy"
    rows = [
        ("model", settings.name),
        ("bundle", facts.bundle[:16]),
        ("probe reads for", ", ".join(facts.heads)),
        (
            "certificate",
            f"at most {certificate.alpha:.3g} of {certificate.population} responses alarm, with "
            f"confidence {1 - certificate.delta:g}, from {certificate.n} responses",
        ),
        *(() if facts.summary is None else [("catches", facts.summary.catches)]),
        ("calibrated on", f"{certificate.evidence.source}: {certificate.evidence.in_words}"),
        ("it speaks of", f"{how}, up to {envelope.max_new_tokens} tokens; else it is void"),
        ("a trip", f"{facts.redirect}, hold-back {facts.holdback_tokens} tokens"),
        (
            "refused",
            "tools, pictures, audio, echo, suffix, unknown parameters"
            + ("" if settings.allow_json else ", JSON formats"),
        ),
        ("keys", f"{n_keys}" if n_keys else "none: anybody may ask"),
        ("audit", str(settings.audit or "none")),
        *((("pages of", ", ".join(settings.cors_origins)),) if settings.cors_origins else ()),
    ]
    if facts.summary is not None:
        rows += [("warning", warning) for warning in facts.summary.warnings]
    shadowed: list[str] = [*settings.shadow_endpoints]
    if settings.shadow_keys:
        shadowed.append(f"{len(settings.shadow_keys)} of the keys")
    if shadowed:
        rows.append(("not guarded", f"{', '.join(shadowed)}: trips are told, nothing is turned"))
    if settings.expose_scores:
        rows.append(("exposed", "statistics and threshold: an oracle for attackers"))
    if settings.expose_bare:
        rows.append(("exposed", "the bare model, unguarded, on the page"))
    return rows + _settings_rows(given, facts)


def _settings_rows(given: SettingsGiven, facts: GuardFacts) -> list[tuple[str, str]]:
    effective = {
        **given.settings.model_dump(),
        "served_name": given.settings.name,
        "allowed_hosts": AllowedHosts(given.settings.host, given.settings.allowed_hosts),
        "cors_origins": ", ".join(given.settings.cors_origins) or None,
        "shadow_endpoints": ", ".join(given.settings.shadow_endpoints) or None,
        "alpha": facts.alpha,
        "holdback_tokens": facts.holdback_tokens,
        "max_new_tokens": given.settings.max_new_tokens or facts.certified_cap,
    }
    texts: dict[Origin, list[str]] = {}
    for name, origin in given.origins.items():
        texts.setdefault(origin, []).append(f"{name}={_shown(effective[name])}")
    return [(_ORIGINS[origin], "  ".join(texts[origin])) for origin in _ORIGINS if origin in texts]


def _shown(value: object) -> str:
    if isinstance(value, tuple):  # of keys, which are nobody's to see
        return str(len(value))
    if isinstance(value, bool):
        return "true" if value else "false"
    return "none" if value is None else str(value)
