"""How the server is run: one schema for flags, environment and YAML.

Knows names, values and their limits. Does not know engines or HTTP. Precedence: flags, then
`SAFE_DECODE_...` in the environment, then the YAML file, then the defaults.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, SecretStr, ValidationError
from pydantic_settings import (
    BaseSettings,
    InitSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from safe_decode.errors import ConfigurationError

__all__ = ["GuardingRedirect", "ServeSettings", "load_settings"]

GuardingRedirect = Literal["refuse", "rewind", "stop"]
"""Redirects a server may use; `flag` protects nobody and is not among them."""


class ServeSettings(BaseSettings):
    """Every setting of `safe-decode serve`.

    Attributes:
        model: Name or directory; None: the embedded model.
        bundle: Directory of the bundle made for it.
        require_signature: File of the public key that must have signed the bundle; None: the
            signature is not looked at.
        device: Where the model goes.
        dtype: In what it computes.
        served_name: What clients call it; None: the last part of `model`.
        host: Address to listen on.
        port: Port to listen on; 0: any free one.
        alpha: A certified level; None: the bundle's default.
        population: Whose certificate it is: of the harmless responses that are mostly served.
        redirect: What a tripped answer becomes.
        holdback_tokens: None: the bundle's.
        refusal_as_content: The refusal also stands in `content`, since most clients show nothing
            else; false: in `refusal` alone.
        allow_json: Accept `response_format` of JSON. Nothing constrains the model to it; a
            trip stops such an answer.
        expose_scores: Clients see statistics, thresholds and colours: an attacker's oracle.
        expose_alternatives: Clients may ask for `top_logprobs`, and for log-probabilities of
            tokens that a bias or penalty chose: both name tokens that nobody judged.
        expose_bare: The page may show the bare model's answer and what was taken back: a way
            around the guard, for demonstrations.
        page: Serve the page at /.
        api_keys: Accepted keys; none: anybody.
        operator_keys: Keys for /metrics; none: anybody.
        max_body_bytes: Larger bodies are refused.
        max_choices: Largest `n`, and prompts times `n`.
        max_new_tokens: Cap of an answer; None: the certified one.
        max_batch: Rows of one run.
        workers: Runs at the same time.
        max_queue: Rows that wait; more are refused with 429.
        max_rows_per_key: Rows in flight for one key; None: no limit.
        queue_timeout_s: A row that waited longer is refused with 503.
        request_timeout_s: A request that takes longer is ended.
        shutdown_grace_s: Time that streams get after SIGTERM.
        audit: File of JSON lines, one a response; None: none.
        audit_text: Write prompts and texts into it too.
    """

    model_config = SettingsConfigDict(
        env_prefix="SAFE_DECODE_", extra="forbid", validate_default=True, allow_inf_nan=False
    )

    model: str | None = None
    bundle: Path | None = None
    require_signature: Path | None = None
    device: str = "cpu"
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    served_name: str | None = None
    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=0, le=65535)
    alpha: float | None = Field(default=None, gt=0, lt=1)
    population: str = "benign"
    redirect: GuardingRedirect = "rewind"
    holdback_tokens: int | None = Field(default=None, ge=0, le=4096)
    refusal_as_content: bool = True
    allow_json: bool = False
    expose_scores: bool = False
    expose_alternatives: bool = False
    expose_bare: bool = False
    page: bool = True
    api_keys: tuple[SecretStr, ...] = ()
    operator_keys: tuple[SecretStr, ...] = ()
    max_body_bytes: int = Field(default=1_000_000, ge=1024)
    max_choices: int = Field(default=8, ge=1, le=128)
    max_new_tokens: int | None = Field(default=None, ge=1)
    max_batch: int = Field(default=32, ge=1, le=1024)
    workers: int = Field(default=1, ge=1, le=64)
    max_queue: int = Field(default=256, ge=1)
    max_rows_per_key: int | None = Field(default=None, ge=1)
    queue_timeout_s: float = Field(default=60.0, gt=0)
    request_timeout_s: float = Field(default=300.0, gt=0)
    shutdown_grace_s: float = Field(default=30.0, ge=0)
    audit: Path | None = None
    audit_text: bool = False

    @property
    def is_demo(self) -> bool:
        """Whether the embedded model is served."""
        return self.model is None

    @property
    def name(self) -> str:
        """What clients call the model."""
        if self.served_name is not None:
            return self.served_name
        return "safe-decode-embedded" if self.model is None else Path(self.model).name


class _Sources(ServeSettings):
    """Adds the YAML file below the environment."""

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Order the sources; the first one wins."""
        del dotenv_settings, file_secret_settings
        assert isinstance(init_settings, InitSettingsSource)
        given = dict(init_settings.init_kwargs)
        below = given.pop("from_file", {})
        return (
            InitSettingsSource(settings_cls, given),
            env_settings,
            InitSettingsSource(settings_cls, below),
        )


def load_settings(config: Path | None = None, **flags: Any) -> ServeSettings:  # noqa: ANN401
    """Gather the settings.

    Args:
        config: A YAML file.
        **flags: What the command line says; None: not given.

    Raises:
        ConfigurationError: A name that is no setting, a value outside its choices, or a file
            that cannot be read.
    """
    given = {name: value for name, value in flags.items() if value is not None}
    try:
        return _Sources(**{"from_file": _from_yaml(config), **given})
    except ValidationError as error:
        problems = "; ".join(
            f"{'.'.join(map(str, found['loc']))}: {found['msg']}" for found in error.errors()
        )
        raise ConfigurationError(
            f"the settings are wrong: {problems}; mend the flag, the SAFE_DECODE_ variable or "
            "the entry of --config."
        ) from error


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
