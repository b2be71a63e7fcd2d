"""Refusals of the server, in the shapes of the two interfaces.

Knows status codes and error bodies. Does not know why a request is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["ApiError", "anthropic_body", "openai_body", "unsupported"]

_ANTHROPIC = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}


class ApiError(Exception):
    """A request that is refused; the message is for the client.

    Args:
        status: HTTP status.
        message: What was wrong, wanted, and the remedy.
        param: The parameter at fault.
        code: OpenAI's code for it.
        retry_after_s: When to try again.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.retry_after_s = retry_after_s

    @property
    def headers(self) -> Mapping[str, str]:
        """Retry-After, in whole seconds, where it helps."""
        if self.retry_after_s is None:
            return {}
        return {"Retry-After": str(max(1, round(self.retry_after_s)))}


def openai_body(error: ApiError) -> dict[str, Any]:
    """Write an error as OpenAI does."""
    kind = "invalid_request_error" if error.status < 429 else "rate_limit_error"
    if error.status >= 500:
        kind = "server_error"
    return {
        "error": {
            "message": error.message,
            "type": kind,
            "param": error.param,
            "code": error.code,
        }
    }


def anthropic_body(error: ApiError) -> dict[str, Any]:
    """Write an error as Anthropic does."""
    kind = _ANTHROPIC.get(error.status, "api_error")
    return {"type": "error", "error": {"type": kind, "message": error.message}}


def unsupported(param: str, remedy: str) -> ApiError:
    """Return the refusal of a parameter that is known and not supported."""
    return ApiError(
        400,
        f"{param} is not supported: {remedy}",
        param=param,
        code="unsupported_parameter",
    )
