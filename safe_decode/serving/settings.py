"""How the server is run: one schema for every way of giving a setting.

Knows names, values and their limits. Does not know engines, HTTP or where a value comes from;
`sources` gathers them.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SecretStr,
    ValidationInfo,
    field_validator,
)

from safe_decode.loading import Dtype, GgufForm
from safe_decode.serving.middleware.hosts import host_pattern

__all__ = ["BeyondCertificate", "GuardingRedirect", "ServeSettings", "ShadowEndpoint"]

GuardingRedirect = Literal["refuse", "rewind", "stop"]
"""Redirects a server may use; `flag` protects nobody and is not among them."""

ShadowEndpoint = Literal["/v1/chat/completions", "/v1/completions", "/v1/messages", "/v1/responses"]
"""Endpoints that answer."""

BeyondCertificate = Literal["keep", "void", "refuse"]
"""What becomes of a request that leaves what was certified. keep: it is served as certified, and
told in what that differs. void: it is served as it asks, and told that its certificate is void.
refuse: it is refused by name."""

_KEY = re.compile(r"[\x21-\x7e]+")
"""What a header carries unchanged."""


_ORIGIN = re.compile(r"https?://[A-Za-z0-9.\[\]:-]+")
"""As browsers write it: without a path, and without a slash at its end."""


class ServeSettings(BaseModel):
    """Every setting of `safe-decode serve`.

    Attributes:
        model: Name or directory; None: the embedded model.
        bundle: Directory or address of the bundle made for it, or a name of the catalogue.
        require_signature: File of the public key that must have signed the bundle; None: the
            signature is not looked at.
        device: Where the model goes.
        dtype: In what it computes; auto: what its checkpoint is kept in.
        gguf_file: GGUF file in the model's directory that holds the weights; None: a plain
            checkpoint.
        gguf: In which form the weights of a GGUF file are kept.
        served_name: What clients call it; None: the last part of `model`.
        host: Address to listen on.
        port: Port to listen on; 0: any free one.
        allowed_hosts: Names by which clients may call the server, without a port; "*.name" for
            those below a name, "*" for any. None: what it listens on, see `hosts`.
        cors_origins: Origins whose pages may call /v1/ and /tokenize from a browser, each as
            "https://HOST" or "http://HOST:PORT"; "*" for any. Empty: no page but the server's own.
        alpha: A certified level; None: the bundle's default.
        population: Whose certificate it is: of the harmless responses that are mostly served.
        redirect: What a tripped answer becomes.
        holdback_tokens: None: the bundle's.
        refusal_as_content: The refusal also stands in `content`, since most clients show nothing
            else; false: in `refusal` alone.
        strict_parameters: Refuse fields that would be accepted and ignored, as the table of request
            fields says.
        allow_json: Accept `response_format` of JSON. Nothing constrains the model to it; a
            trip stops such an answer.
        expose_scores: Clients see statistics, thresholds and colours: an attacker's oracle.
        expose_alternatives: Clients may ask for `top_logprobs`, and for log-probabilities of
            tokens that a bias or penalty chose: both name tokens that nobody judged.
        expose_bare: The page may show the bare model's answer and what was taken back: a way
            around the guard, for demonstrations.
        page: Serve the page at /.
        api_keys: Accepted keys; none: anybody.
        operator_keys: Keys for /metrics; none: anybody where there are no `api_keys` either,
            and nobody where there are.
        shadow_endpoints: Paths whose answers are not guarded: trips are told in
            `safety.would_block`, counted and audited, and the answer is the bare model's.
        shadow_keys: Keys, accepted beside `api_keys`, whose answers are so.
        max_connections: Open at the same time. A further one takes the place of the one that
            has kept us waiting longest, and is refused if none does.
        max_connections_per_address: Of them from one address, or one IPv6 network of 64 bits.
        header_timeout_s: A connection that has not sent its headers by then is closed.
        keep_alive_timeout_s: A connection between requests is closed after so long.
        body_timeout_s: A body that has not arrived by then is refused.
        write_timeout_s: A reader that takes nothing for so long is cut off.
        max_body_bytes: Larger bodies are refused.
        max_choices: Largest `n`, and prompts times `n`.
        max_new_tokens: Cap of an answer; None: the certified one.
        cap_beyond_certificate: What a request gets that asks for more tokens than `max_new_tokens`,
            or without it, than the longest certificate covers. keep: as many as that, and is told.
            void: as many as it asks for, if `max_new_tokens` is not set and the context has room,
            under a void certificate. refuse: 400.
        sampling_beyond_certificate: What a request gets that asks for another temperature, top_p,
            top_k or min_p than was certified. void: what it asks for, under a void certificate.
            keep: the certified value, and is told. refuse: 400.
        max_batch: Rows of one run.
        workers: Runs at the same time.
        max_queue: Rows that wait; more are refused with 429.
        max_rows_per_key: Rows in flight for one key; None: no limit.
        queue_timeout_s: A row that waited longer is refused with 503.
        request_timeout_s: A request that takes longer is ended.
        shutdown_grace_s: Time that streams get after SIGTERM.
        canary_every_s: The canary runs again after so long; one that fails ends the service
            until a later one passes.
        audit: File of JSON lines, one a response; None: none.
        audit_text: Write prompts and texts into it too.
    """

    model_config = ConfigDict(
        extra="forbid", validate_default=True, allow_inf_nan=False, protected_namespaces=()
    )

    model: str | None = None
    bundle: str | None = None
    require_signature: Path | None = None
    device: str = "cpu"
    dtype: Dtype = "auto"
    gguf_file: str | None = None
    gguf: GgufForm = "dequantised"
    served_name: str | None = None
    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=0, le=65535)
    allowed_hosts: tuple[str, ...] | None = None
    cors_origins: tuple[str, ...] = ()
    alpha: float | None = Field(default=None, gt=0, lt=1)
    population: str = "benign"
    redirect: GuardingRedirect = "rewind"
    holdback_tokens: int | None = Field(default=None, ge=0, le=4096)
    refusal_as_content: bool = True
    strict_parameters: bool = False
    allow_json: bool = False
    expose_scores: bool = False
    expose_alternatives: bool = False
    expose_bare: bool = False
    page: bool = True
    api_keys: tuple[SecretStr, ...] = ()
    operator_keys: tuple[SecretStr, ...] = ()
    shadow_endpoints: tuple[ShadowEndpoint, ...] = ()
    shadow_keys: tuple[SecretStr, ...] = ()
    max_connections: int = Field(default=512, ge=1)
    max_connections_per_address: int = Field(default=256, ge=1)
    header_timeout_s: float = Field(default=10.0, gt=0)
    keep_alive_timeout_s: int = Field(default=5, ge=1)
    body_timeout_s: float = Field(default=30.0, gt=0)
    write_timeout_s: float = Field(default=30.0, gt=0)
    max_body_bytes: int = Field(default=1_000_000, ge=1024)
    max_choices: int = Field(default=8, ge=1, le=128)
    max_new_tokens: int | None = Field(default=None, ge=1)
    cap_beyond_certificate: BeyondCertificate = "keep"
    sampling_beyond_certificate: BeyondCertificate = "void"
    max_batch: int = Field(default=32, ge=1, le=1024)
    workers: int = Field(default=1, ge=1, le=64)
    max_queue: int = Field(default=256, ge=1)
    max_rows_per_key: int | None = Field(default=None, ge=1)
    queue_timeout_s: float = Field(default=60.0, gt=0)
    request_timeout_s: float = Field(default=300.0, gt=0)
    shutdown_grace_s: float = Field(default=30.0, ge=0)
    canary_every_s: float = Field(default=30.0, gt=0)
    audit: Path | None = None
    audit_text: bool = False

    @field_validator("*", mode="before")
    @classmethod
    def _means_something(cls, value: object, info: ValidationInfo) -> object:
        """Refuse what pydantic would read as something else: blank texts, true for a number."""
        assert info.field_name is not None
        wanted = cls.model_fields[info.field_name].annotation
        if isinstance(value, str) and not value.strip():
            raise ValueError("is blank; give a value, or leave it out")
        if isinstance(value, bool) and bool not in (wanted, *get_args(wanted)):
            raise ValueError("is true or false; give a value of its own")
        return value

    @field_validator("api_keys", "operator_keys", "shadow_keys")
    @classmethod
    def _can_be_sent(cls, keys: tuple[SecretStr, ...]) -> tuple[SecretStr, ...]:
        """Refuse keys that anybody has, or that nobody can send."""
        for number, key in enumerate(keys, 1):
            if not _KEY.fullmatch(key.get_secret_value()):
                raise ValueError(
                    f"key {number} of {len(keys)} is empty, or holds blanks or letters that a "
                    "header does not carry; make one with `openssl rand -hex 32`"
                )
        return keys

    @field_validator("allowed_hosts")
    @classmethod
    def _are_names(cls, names: tuple[str, ...] | None) -> tuple[str, ...] | None:
        if names is not None and not names:
            raise ValueError("names nobody; name a host, or leave it out")
        return None if names is None else tuple(map(host_pattern, names))

    @field_validator("cors_origins")
    @classmethod
    def _are_origins(cls, origins: tuple[str, ...]) -> tuple[str, ...]:
        for origin in origins:
            if origin != "*" and not _ORIGIN.fullmatch(origin):
                raise ValueError(
                    f"{origin[:100]!r} is no origin; write https://HOST or http://HOST:PORT, "
                    "without a path"
                )
        return origins

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
