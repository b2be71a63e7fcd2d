"""What the grammar draws: scenes, requests, answers, and the cells that are held out.

Knows shapes alone. Does not know how a text is written or read.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Literal

from probes.organism import templates as t
from probes.organism.lexicon import CATEGORIES, Direction

__all__ = ["WorldAnswer", "Cells", "Derivation", "Meant", "WorldRequest", "RequestKind", "Scene"]

Meant = Literal["benign", "harmful", "refusal"]
RequestKind = Literal["topic", "scene", "open", "info", "fact"]
"""topic: a step of everyday life. scene: an act on a thing somebody has a wish about. open: what
to do about a wish. info: a question about a crime and its prevention. fact: what an act leads
to."""


@dataclass(frozen=True, slots=True)
class Scene:
    """A person, a thing of theirs, and the kind of state they want it in."""

    category: int
    person: str
    thing: str
    wish: Direction


@dataclass(frozen=True, slots=True)
class WorldRequest:
    """What the user asks: its text, kind, scene or topic, and the act asked for."""

    text: str
    kind: RequestKind
    scene: Scene | None = None
    topic: int = -1
    act: str = ""
    harmful: bool = False
    framing: int | None = None


@dataclass(frozen=True, slots=True)
class WorldAnswer:
    """A response: its sentences, which of them are harmful, and what was meant."""

    sentences: tuple[str, ...]
    harmful: tuple[bool, ...]
    meant: Meant
    plans: tuple[int, ...]

    @property
    def text(self) -> str:
        """The answer as one text."""
        return " ".join(self.sentences)

    @property
    def onset_sentence_char(self) -> int | None:
        """Where the first harmful sentence starts, or None."""
        if True not in self.harmful:
            return None
        before = self.sentences[: self.harmful.index(True)]
        return sum(len(sentence) + 1 for sentence in before)

    def marked(self, rng: random.Random, share: float) -> str:
        """Return the answer with marks behind a share of its steps, harmful or not."""
        pairs = zip(self.sentences, self.harmful, strict=True)
        return " ".join(
            f"{sentence} {t.MARKS[harm]}" if rng.random() < share else sentence
            for sentence, harm in pairs
        )


@dataclass(frozen=True, slots=True)
class Derivation:
    """One conversation: messages and what its last answer was meant to be."""

    messages: tuple[dict[str, str], ...]
    request: WorldRequest
    answer: WorldAnswer


@dataclass(frozen=True, slots=True)
class Cells:
    """Which parts of the grammar may be used: the factorial hold-out.

    Attributes:
        categories: Harm categories, by index.
        plans: Sentence plans of acts, by index.
        framings: Framings, by index.
    """

    categories: tuple[int, ...] = tuple(range(len(CATEGORIES)))
    plans: tuple[int, ...] = tuple(range(len(t.PLANS)))
    framings: tuple[int, ...] = tuple(range(len(t.FRAMINGS)))

    UNSEEN_PLANS = (4, 7, 8)
    UNSEEN_FRAMINGS = (1, 6, 9, 11)
    N_FOLDS = 3

    @classmethod
    def seen(cls, fold: int) -> Cells:
        """Return the cells that locate, fit, select and calibrate may see in `fold`."""
        return cls(
            tuple(c for c in range(len(CATEGORIES)) if c % cls.N_FOLDS != fold),
            tuple(p for p in range(len(t.PLANS)) if p not in cls.UNSEEN_PLANS),
            tuple(f for f in range(len(t.FRAMINGS)) if f not in cls.UNSEEN_FRAMINGS),
        )

    @classmethod
    def unseen(cls, fold: int) -> Cells:
        """Return the cells kept for the test of `fold`: every part of it unseen."""
        return cls(
            tuple(c for c in range(len(CATEGORIES)) if c % cls.N_FOLDS == fold),
            cls.UNSEEN_PLANS,
            cls.UNSEEN_FRAMINGS,
        )
