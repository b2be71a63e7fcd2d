"""The scenes of the demo and the prompts that play them.

Knows the scenes, in the order they are shown, and the file format of the prompts.
Does not know models, responses or how anything is judged.

The file has one JSON object a line:

    {"scene": "framed", "messages": [{"role": "user", "content": "..."}],
     "prefill": null, "showcase": false}

`"counted": false` may stand beside these: a prompt that was searched for is shown and not counted.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from safe_decode.errors import DataError

__all__ = ["SCENES", "DemoPrompt", "Scene", "SceneText", "read_prompts", "showcases"]

Scene = Literal["benign", "hard_negative", "long", "harmful", "framed", "prefilled", "turn", "own"]
"""What a prompt plays; `own` is a prompt that the user typed."""

FIELDS = frozenset({"scene", "messages", "prefill", "showcase"})
OPTIONAL_FIELDS = frozenset({"counted"})


@dataclass(frozen=True, slots=True)
class SceneText:
    """What a reader is told about a scene: its title and what is being tried."""

    title: str
    about: str


SCENES: Mapping[Scene, SceneText] = {
    "benign": SceneText("A benign request", "Nothing is wrong; nothing may change."),
    "hard_negative": SceneText(
        "A hard negative", "It shares its words with harm and is harmless; nothing may change."
    ),
    "long": SceneText(
        "A long harmless answer", "Every token is another chance to be wrong; nothing may change."
    ),
    "harmful": SceneText(
        "A plain harmful request", "Alignment refuses it unaided; the guard must not be in the way."
    ),
    "framed": SceneText("A framed request", "The harm is wrapped into a role or a pretext."),
    "prefilled": SceneText(
        "A prefilled response", "The attacker wrote the first words of the answer."
    ),
    "turn": SceneText(
        "A benign start that turns harmful", "The first sentences are harmless; then it turns."
    ),
    "own": SceneText("Your prompt", "Bare and guarded, as you typed it."),
}
"""The scenes in the order in which they are shown."""


@dataclass(frozen=True, slots=True)
class DemoPrompt:
    """A conversation to answer.

    Attributes:
        scene: What it plays.
        messages: The conversation, each message with `role` and `content`.
        prefill: The first words of the answer, written by someone else; None for none.
        showcase: Whether it is shown in full rather than only counted.
        counted: Whether it stands in the figures; not where it was picked for its outcome.
    """

    scene: Scene
    messages: tuple[Mapping[str, str], ...]
    prefill: str | None = None
    showcase: bool = False
    counted: bool = True

    @property
    def request(self) -> str:
        """The last message of the user."""
        return next(m["content"] for m in reversed(self.messages) if m["role"] == "user")

    @classmethod
    def own(cls, text: str, *, prefill: str | None = None) -> DemoPrompt:
        """Make the prompt that a user typed into one to be shown."""
        return cls("own", ({"role": "user", "content": text},), prefill, showcase=True)


def read_prompts(path: Path) -> tuple[DemoPrompt, ...]:
    """Read prompts from a file of JSON lines.

    Raises:
        DataError: The file is missing or empty, or a line is not a prompt; the message
            names the file, the line and what is wrong with it.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"prompts file {path} cannot be read: {error}.") from error
    prompts = tuple(
        _prompt(line, f"{path}, line {number}") for number, line in enumerate(lines, 1) if line
    )
    if not prompts:
        raise DataError(f"prompts file {path} holds no prompt; write one JSON object a line.")
    return prompts


def showcases(prompts: Iterable[DemoPrompt]) -> tuple[DemoPrompt, ...]:
    """Pick the first prompt of each scene that is marked as a showcase, in scene order."""
    first: dict[Scene, DemoPrompt] = {}
    for prompt in prompts:
        if prompt.showcase:
            first.setdefault(prompt.scene, prompt)
    return tuple(first[scene] for scene in SCENES if scene in first)


def _prompt(line: str, where: str) -> DemoPrompt:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{where} is not JSON: {error}.") from error
    if not isinstance(record, dict) or set(record) - OPTIONAL_FIELDS != FIELDS:
        got = sorted(record) if isinstance(record, dict) else type(record).__name__
        raise DataError(f"{where} must be an object with {sorted(FIELDS)}, got {got}.")
    if record["scene"] not in get_args(Scene):
        raise DataError(f"{where}: scene={record['scene']!r} is not one of {get_args(Scene)}.")
    if not isinstance(record["prefill"], str | None):
        raise DataError(f"{where}: prefill={record['prefill']!r} is neither text nor null.")
    messages = record["messages"]
    if not _is_conversation(messages):
        raise DataError(
            f"{where}: messages must be a list of role and content that ends with the user's, "
            f"got {str(messages)[:80]!r}."
        )
    return DemoPrompt(
        record["scene"],
        tuple(messages),
        record["prefill"],
        bool(record["showcase"]),
        bool(record.get("counted", True)),
    )


def _is_conversation(messages: object) -> bool:
    if not isinstance(messages, list) or not messages:
        return False
    for message in messages:
        if not isinstance(message, dict) or set(message) != {"role", "content"}:
            return False
        if not all(isinstance(value, str) for value in message.values()):
            return False
    return bool(messages[-1]["role"] == "user")
