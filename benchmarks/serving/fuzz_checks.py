"""A check of ours within schemathesis, which loads this by SCHEMATHESIS_HOOKS."""

from __future__ import annotations

import schemathesis


@schemathesis.check  # type: ignore[untyped-decorator, unused-ignore]
def no_traceback(_context: object, response: schemathesis.Response, _case: object) -> None:
    """Fail where an answer tells of our insides."""
    text = response.text
    assert "Traceback (most recent" not in text and 'File "' not in text, "a traceback"
