"""A check of ours within schemathesis, which loads this by SCHEMATHESIS_HOOKS."""

from __future__ import annotations

from typing import Any

import schemathesis


@schemathesis.check  # type: ignore[untyped-decorator, unused-ignore]
def no_traceback(_context: Any, response: Any, _case: Any) -> None:  # noqa: ANN401 - its types
    """Fail where an answer tells of our insides."""
    text = response.text
    assert "Traceback (most recent" not in text and 'File "' not in text, "a traceback"
