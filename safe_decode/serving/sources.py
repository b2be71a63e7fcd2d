"""Where settings come from: one precedence for every setting and every way of giving it.

A flag comes before `--set`, that before `SAFE_DECODE_...` in the environment, that before the
YAML file, that before the default. What is given comes before what is absent, always; of
several ways the first one's value is read and the others' are not. Knows ways, texts and the
schema. Does not know what a setting does.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args, get_origin

import yaml
from pydantic import SecretStr, ValidationError

from safe_decode.catalogue import CACHE_VARIABLE, CATALOGUE_VARIABLE
from safe_decode.errors import ConfigurationError
from safe_decode.serving.settings import ServeSettings

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

__all__ = ["OTHER_VARIABLES", "PREFIX", "Origin", "SettingsGiven", "gather"]

Origin = Literal["flag", "--set", "environment", "file", "default", "demo"]
"""flag: of the command. demo: shown since the embedded model is served. Others as they say."""

PREFIX = "SAFE_DECODE_"
OTHER_VARIABLES = frozenset(
    PREFIX + name for name in ("CHROMIUM", "FUZZ", "PYTHON", "REFERENCE_MODEL", "SCREENSHOTS")
) | {CATALOGUE_VARIABLE, CACHE_VARIABLE}
"""Variables with our prefix that are no settings: of the catalogue, and of this project's tests."""
_OF_OTHER_COMMANDS = (PREFIX + "PROXY_",)
"""Beginnings of variables that other commands read, and check."""


@dataclass(frozen=True)
class SettingsGiven:
    """Settings and where each comes from.

    Attributes:
        settings: All of them, in effect.
        origins: Of every setting.
    """

    settings: ServeSettings
    origins: Mapping[str, Origin]

    def for_demo(self) -> SettingsGiven:
        """With the embedded model, what is meant to be seen is shown, unless said otherwise."""
        shown = ("expose_scores", "expose_bare")
        update = [name for name in shown if self.origins[name] == "default"]
        if not self.settings.is_demo or not update:
            return self
        settings = self.settings.model_copy(update=dict.fromkeys(update, True))
        origins: dict[str, Origin] = {**self.origins, **dict.fromkeys(update, "demo")}
        return replace(self, settings=settings, origins=origins)


@dataclass(frozen=True)
class _Value:
    """One setting as one way gives it.

    Attributes:
        origin: The way.
        place: The way as a message names it.
        value: What is given.
        is_text: Whether it is a text that stands for the value.
    """

    origin: Origin
    place: str
    value: object
    is_text: bool = False


def gather(
    config: Path | None = None,
    *,
    flags: Mapping[str, object],
    assigned: Sequence[str] = (),
    environ: Mapping[str, str],
) -> SettingsGiven:
    """Gather the settings.

    Args:
        config: A YAML file.
        flags: What the flags say, by the setting's name; None or an empty list: not given.
        assigned: NAME=VALUE each, of `--set`.
        environ: The environment's variables.

    Raises:
        ConfigurationError: A name that is no setting, a value that cannot be read or is outside
            its limits, or a file that cannot be read.
    """
    ways = (
        _from_flags(flags),
        _from_assignments(assigned),
        _from_environment(environ),
        _from_file(config),
    )
    given: dict[str, _Value] = {}
    for way in ways:
        given = {**way, **given}
    content = {name: _read(name, one) for name, one in given.items()}
    try:
        settings = ServeSettings.model_validate(content)
    except ValidationError as error:
        problems = "; ".join(_problem(found, given) for found in error.errors())
        raise ConfigurationError(f"the settings are wrong: {problems}.") from error
    origins = {
        name: given[name].origin if name in given else "default"
        for name in ServeSettings.model_fields
    }
    return SettingsGiven(settings, origins)


def _from_flags(flags: Mapping[str, object]) -> dict[str, _Value]:
    return {
        name: _Value("flag", "a flag", value)
        for name, value in flags.items()
        if value is not None and value != []
    }


def _from_assignments(texts: Iterable[str]) -> dict[str, _Value]:
    found: dict[str, _Value] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        name = name.strip().replace("-", "_")
        if not equals:
            raise ConfigurationError(
                f"--set {name[:40]!r} is not NAME=VALUE; pass for example --set port=0."
            )
        _require_known(name, f"--set {name[:40]}")
        if name in found:
            raise ConfigurationError(f"--set {name} is given twice; give it once.")
        found[name] = _Value("--set", f"--set {name}", value, is_text=True)
    return found


def _from_environment(environ: Mapping[str, str]) -> dict[str, _Value]:
    found = {}
    for variable, value in environ.items():
        is_ours = variable.upper().startswith(PREFIX) and variable not in OTHER_VARIABLES
        if not is_ours or variable.startswith(_OF_OTHER_COMMANDS):
            continue
        name = variable.removeprefix(PREFIX).lower()
        if variable != PREFIX + name.upper() or name not in ServeSettings.model_fields:
            stem = variable[len(PREFIX) :].lower()
            near = _nearest(stem)
            hint = f"did you mean {PREFIX}{near.upper()}? " if near else ""
            raise ConfigurationError(
                f"the variable {variable} in the environment is no setting; {hint}"
                "Unset it, or name a setting in capitals."
            )
        found[name] = _Value("environment", f"{variable} in the environment", value, is_text=True)
    return found


def _from_file(config: Path | None) -> dict[str, _Value]:
    if config is None:
        return {}
    try:
        text = config.read_text(encoding="utf-8")
        content = yaml.safe_load(text)
        _require_single(text)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigurationError(
            f"--config={config} cannot be read: {error}; pass a YAML file of settings."
        ) from error
    if content is None:
        return {}
    if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
        raise ConfigurationError(
            f"--config={config} holds a {type(content).__name__}, wanted a mapping of settings."
        )
    for name in content:
        _require_known(name, f"{name[:40]!r} in --config={config}")
    return {name: _Value("file", f"--config={config}", value) for name, value in content.items()}


def _require_single(text: str) -> None:
    """Refuse a name that stands twice, of which YAML's own readers drop one in silence."""
    tree = yaml.compose(text, yaml.SafeLoader)
    pairs = tree.value if isinstance(tree, yaml.MappingNode) else []
    names = [key.value for key, _ in pairs]
    twice = {name for name in names if names.count(name) > 1}
    if twice:
        raise ValueError(f"{', '.join(sorted(map(str, twice)))} stands in it twice")


def _require_known(name: str, place: str) -> None:
    if name in ServeSettings.model_fields:
        return
    near = _nearest(name.lower().replace("-", "_"))
    hint = f"did you mean {near}?" if near else "see safe_decode/serving/settings.py."
    raise ConfigurationError(f"{place} is no setting; {hint}")


def _nearest(name: str) -> str | None:
    return next(iter(get_close_matches(name, ServeSettings.model_fields, n=1)), None)


def _read(name: str, given: _Value) -> object:
    """Return the value that a text stands for: JSON for a list, `null` for None where it may be."""
    if not given.is_text:
        return given.value
    wanted = ServeSettings.model_fields[name].annotation
    kinds = (wanted, *get_args(wanted))
    if given.value == "null" and type(None) in kinds:
        return None
    if not any(get_origin(kind) in (tuple, list) for kind in kinds):
        return given.value
    try:
        value = json.loads(str(given.value))
    except ValueError:
        value = None
    if not isinstance(value, list):
        # The value is not repeated: it may be a key.
        raise ConfigurationError(
            f'{name} from {given.place} is no list in JSON; write it like \'["a", "b"]\'.'
        )
    return value


def _problem(found: ErrorDetails, given: Mapping[str, _Value]) -> str:
    name = str(found["loc"][0])
    place = ".".join(map(str, found["loc"]))
    origin = given[name].place if name in given else "the default"
    shown = "" if _is_secret(name) else f"={str(given[name].value)[:80]!r}" if name in given else ""
    return f"{place}{shown} from {origin}: {found['msg'].removeprefix('Value error, ')}"


def _is_secret(name: str) -> bool:
    wanted = ServeSettings.model_fields[name].annotation
    return SecretStr in get_args(wanted) or wanted is SecretStr
