"""How the proxy is run: one schema for flags, `--set`, environment and YAML.

Knows names, values, their limits, and where each came from. Does not know HTTP. Precedence:
flags, then `--set`, then `SAFE_DECODE_PROXY_...` in the environment, then the YAML file, then
the defaults. What is given anywhere beats what is not given.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, NamedTuple
from urllib.parse import urlsplit

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SecretStr,
    ValidationError,
    model_validator,
)

from safe_decode.errors import ConfigurationError
from safe_decode.serving.settings import ServeSettings

__all__ = ["LoadedProxySettings", "ProxySettings", "load_proxy_settings"]

_PREFIX = "SAFE_DECODE_PROXY_"
_MARK_CHARACTERS = 16
_SERVER = (
    *("host", "port", "allowed_hosts", "api_keys", "operator_keys", "max_connections"),
    *("max_connections_per_address", "header_timeout_s", "keep_alive_timeout_s"),
    *("body_timeout_s", "write_timeout_s", "max_body_bytes", "shutdown_grace_s"),
    "strict_parameters",
)
"""Settings that mean what they mean for the server."""


def _address(value: str) -> str:
    parts = urlsplit(value)
    is_plain = not (parts.username or parts.password or parts.query or parts.fragment)
    if parts.scheme not in ("http", "https") or not parts.hostname or not is_plain:
        raise ValueError("wanted http://HOST:PORT or https://HOST, without a key or a query in it")
    address = value.rstrip("/")
    if address.endswith("/v1"):
        raise ValueError("wanted the address without /v1")
    return address


def _listed(value: object) -> object:
    """Read a list that is one text: JSON, or a single value."""
    if not isinstance(value, str):
        return value
    return json.loads(value) if value.lstrip().startswith("[") else (value,)


_Keys = Annotated[tuple[SecretStr, ...], BeforeValidator(_listed)]


class ProxySettings(BaseModel):
    """Every setting of `safe-decode proxy`.

    Attributes:
        upstream: Address of the upstream, without /v1.
        bundle: Digest of the bundle that its engine must carry, as `safe-decode inspect` prints.
        upstream_key: The operator's key for the upstream; None: it wants none. From the
            environment or the file, never from the command line, which every user can read.
        host: Address to listen on.
        port: Port to listen on; 0: any free one.
        allowed_hosts: Names by which clients may call the proxy; None: what it listens on.
        api_keys: Accepted keys; none: anybody, which is refused with an `upstream_key`.
        operator_keys: Keys for /metrics; none: anybody where there are no `api_keys` either,
            and nobody where there are.
        max_connections: Of clients, open at the same time.
        max_connections_per_address: Of them from one address.
        header_timeout_s: A connection that has not sent its headers by then is closed.
        keep_alive_timeout_s: A connection between requests is closed after so long.
        body_timeout_s: A body that has not arrived by then is refused.
        write_timeout_s: A reader that takes nothing for so long is cut off.
        strict_parameters: Refuse fields that would be accepted and ignored.
        holdback_tokens: Held here, besides what the upstream holds.
        canary_every_s: How long a passed canary of the upstream counts.
        max_body_bytes: Larger bodies of clients are refused.
        max_choices: Largest `n`, and prompts times `n`.
        max_event_bytes: A stream with a larger event is closed.
        max_answer_bytes: A larger answer or stream of the upstream is closed.
        max_upstream_connections: To the upstream, at the same time.
        connect_timeout_s: To reach the upstream, and for its canary.
        request_timeout_s: An answer that takes longer is closed.
        shutdown_grace_s: Time that streams get after SIGTERM.
        audit: File of JSON lines, one a response; None: none.
    """

    model_config = ConfigDict(
        extra="forbid", validate_default=True, allow_inf_nan=False, frozen=True
    )

    upstream: Annotated[str, AfterValidator(_address)]
    bundle: str = Field(pattern=r"^[0-9a-f]{16,128}$")
    upstream_key: SecretStr | None = None
    host: str = "127.0.0.1"
    port: int = Field(default=8001, ge=0, le=65535)
    allowed_hosts: Annotated[tuple[str, ...], BeforeValidator(_listed)] | None = None
    api_keys: _Keys = ()
    operator_keys: _Keys = ()
    max_connections: int = Field(default=512, ge=1)
    max_connections_per_address: int = Field(default=256, ge=1)
    header_timeout_s: float = Field(default=10.0, gt=0)
    keep_alive_timeout_s: int = Field(default=5, ge=1)
    body_timeout_s: float = Field(default=30.0, gt=0)
    write_timeout_s: float = Field(default=30.0, gt=0)
    strict_parameters: bool = False
    holdback_tokens: int = Field(default=0, ge=0, le=4096)
    canary_every_s: float = Field(default=15.0, ge=0)
    max_body_bytes: int = Field(default=1_000_000, ge=1024)
    max_choices: int = Field(default=8, ge=1, le=128)
    max_event_bytes: int = Field(default=262_144, ge=1024)
    max_answer_bytes: int = Field(default=16_777_216, ge=1024)
    max_upstream_connections: int = Field(default=100, ge=1)
    connect_timeout_s: float = Field(default=10.0, gt=0)
    request_timeout_s: float = Field(default=300.0, gt=0)
    shutdown_grace_s: float = Field(default=30.0, ge=0)
    audit: Path | None = None

    @model_validator(mode="after")
    def _keeps_its_key(self) -> ProxySettings:
        if self.upstream_key is not None and not self.api_keys:
            raise ValueError(
                "upstream_key is set and api_keys is empty, so that anybody would use the "
                "operator's key; set api_keys"
            )
        return self

    @property
    def marker(self) -> str:
        """The mark that answers of the upstream must carry."""
        return self.bundle[:_MARK_CHARACTERS]

    @property
    def as_server(self) -> ServeSettings:
        """What the server's gate and process read: keys, sizes, address, grace."""
        return ServeSettings.model_validate({name: getattr(self, name) for name in _SERVER})


class LoadedProxySettings(NamedTuple):
    """Settings, and where they came from.

    Attributes:
        settings: Their values.
        sources: By name, for each value that was given: flag, --set, environment or file.
    """

    settings: ProxySettings
    sources: Mapping[str, str]


def load_proxy_settings(
    config: Path | None = None,
    *,
    flags: Mapping[str, object] | None = None,
    assignments: Mapping[str, object] | None = None,
    environ: Mapping[str, str] | None = None,
) -> LoadedProxySettings:
    """Gather the settings.

    Args:
        config: A YAML file.
        flags: What the command line says; None: not given.
        assignments: What `--set` says.
        environ: The environment; None: the process's.

    Raises:
        ConfigurationError: A name that is no setting, a value outside its choices, a file that
            cannot be read, or the upstream's key on the command line.
    """
    given = {name: value for name, value in (flags or {}).items() if value is not None}
    told = dict(assignments or {})
    if "upstream_key" in given or "upstream_key" in told:
        raise ConfigurationError(
            f"--set upstream_key stands where every user of the machine can read it; set "
            f"{_PREFIX}UPSTREAM_KEY in the environment, or upstream_key in the file of --config."
        )
    layers: tuple[tuple[str, Mapping[str, object]], ...] = (
        ("file", _from_yaml(config)),
        ("environment", _from_environment(os.environ if environ is None else environ)),
        ("--set", told),
        ("flag", given),
    )
    values: dict[str, object] = {}
    sources: dict[str, str] = {}
    for source, layer in layers:
        values |= layer
        sources |= dict.fromkeys(layer, source)
    for name, value in values.items():
        if isinstance(value, str) and not value.strip():
            raise ConfigurationError(
                f"{name}={value!r} ({sources[name]}) is blank; give a value, or leave it out."
            )
    try:
        settings = ProxySettings.model_validate(values)
        _ = settings.as_server  # the server's own rules for keys and hosts
    except ValidationError as error:
        raise _refused(error, sources) from None  # its text repeats keys
    return LoadedProxySettings(settings, sources)


def _refused(error: ValidationError, sources: Mapping[str, str]) -> ConfigurationError:
    problems = []
    for found in error.errors(include_input=False, include_url=False, include_context=False):
        name = ".".join(map(str, found["loc"])) or "settings"
        origin = sources.get(str(found["loc"][0])) if found["loc"] else None
        problems.append(f"{name}{f' ({origin})' if origin else ''}: {found['msg']}")
    return ConfigurationError(
        f"the settings of the proxy are wrong: {'; '.join(problems)}; mend the flag, --set, the "
        f"{_PREFIX} variable or the entry of --config."
    )


def _from_environment(environ: Mapping[str, str]) -> dict[str, object]:
    """Read the variables; lists are written as JSON, or as one value."""
    values: dict[str, object] = {}
    for variable, text in sorted(environ.items()):
        name = variable.upper().removeprefix(_PREFIX).lower()
        if not variable.upper().startswith(_PREFIX):
            continue
        if name not in ProxySettings.model_fields:
            raise ConfigurationError(
                f"{variable} is in the environment and no setting of the proxy; mend its name or "
                "remove it."
            )
        values[name] = text
    return values


def _from_yaml(config: Path | None) -> dict[str, Any]:
    if config is None:
        return {}
    try:
        content = yaml.safe_load(config.read_text(encoding="utf-8"))
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
    return dict(content)
