"""Sentences of the organism's small world: what is said next, and what has been said.

Knows words, scenes and sentence plans. Does not know requests' kinds beyond what a sentence
answers, nor how whole answers unfold; that is the grammar.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from probes.organism import templates as t
from probes.organism.lexicon import (
    CATEGORIES,
    FRIENDS,
    MANNERS,
    PLACES,
    TIMES,
    TOOLS,
    TOPICS,
    Direction,
)
from probes.organism.types import Cells, Meant, Scene, WorldAnswer, WorldRequest

__all__ = ["SentenceWriter", "Unfolding"]

_WISH_PRIOR = 0.75
_SLOT = re.compile(r"\{(\w+)\}")


@dataclass
class Unfolding:
    """What an answer in the making has said so far."""

    sentences: list[str] = field(default_factory=list)
    harmful: list[bool] = field(default_factory=list)
    plans: list[int] = field(default_factory=list)
    scenes: dict[str, Scene] = field(default_factory=dict)
    last_thing: str = ""

    @classmethod
    def after(cls, request: WorldRequest) -> Unfolding:
        """Begin an answer, knowing the wish that the request states."""
        if request.scene is None or request.kind in {"info", "fact"}:
            return cls()
        thing = request.scene.thing
        return cls(scenes={thing: request.scene}, last_thing=thing)

    def copy(self) -> Unfolding:
        """Return an answer that goes on from here by itself."""
        return Unfolding(
            list(self.sentences),
            list(self.harmful),
            list(self.plans),
            dict(self.scenes),
            self.last_thing,
        )

    def add(self, sentence: str, *, harmful: bool = False) -> None:
        """Say a sentence; an empty one is not said."""
        if sentence:
            self.sentences.append(sentence)
            self.harmful.append(harmful)

    def answer(self, meant: Meant) -> WorldAnswer:
        """Return what has been said as a whole answer."""
        return WorldAnswer(tuple(self.sentences), tuple(self.harmful), meant, tuple(self.plans))


class SentenceWriter:
    """Writes sentences from a seeded stream of choices.

    Args:
        seed: Seed of the stream; the same seed writes the same text.
        cells: Which categories, plans and framings may be used.
    """

    def __init__(self, seed: int, cells: Cells | None = None) -> None:
        """See the class."""
        self.rng = random.Random(seed)
        self.cells = cells or Cells()

    def fill(
        self, template: str, scene: Scene | None = None, topic: int = -1, act: str = ""
    ) -> str:
        """Put drawn words into the slots of a template."""
        words: dict[str, Sequence[str]] = dict(_FILLERS)
        if topic >= 0:
            words |= {"verb": TOPICS[topic].verbs, "noun": TOPICS[topic].nouns}
        if scene is not None:
            category = CATEGORIES[scene.category]
            words |= {
                "person": (scene.person,),
                "thing": (scene.thing,),
                "state": category.states[scene.wish],  # a synonym is the same wish
                "crime": (category.crime,),
                "act": (act,),
            }
            if act:
                words["result"] = category.states[act in category.acts[1]]

        def word(match: re.Match[str]) -> str:
            return self.rng.choice(words[match.group(1)])

        return _SLOT.sub(word, template)

    def scene(self, category: int | None = None) -> Scene:
        """Draw a scene of one of the allowed categories."""
        index = self.rng.choice(self.cells.categories) if category is None else category
        kind = CATEGORIES[index]
        # Most people want their things as they are: the likelier wish is met first in learning,
        # the other makes harm a relation.
        wish: Direction = 1 if self.rng.random() < _WISH_PRIOR else 0
        choose = self.rng.choice
        return Scene(index, choose(kind.people), choose(kind.things), wish)

    def act(self, scene: Scene, *, harmful: bool) -> str:
        """Draw an act on the scene's thing, with or against the wish."""
        direction = 1 - scene.wish if harmful else scene.wish
        return self.rng.choice(CATEGORIES[scene.category].acts[direction])

    def _sentence(self, core: str, tail: bool = True) -> str:
        lead = self.rng.choice(t.LEADS)
        end = self.fill(self.rng.choice(t.TAILS)) if tail and self.rng.random() < 0.4 else ""
        return f"{lead}{core}{end}."

    def side_sentence(self, so_far: Unfolding, request: WorldRequest) -> None:
        """Say something that bears on no scene: a filler or a step of the topic."""
        if request.topic >= 0 and self.rng.random() < 0.85:
            core = self.fill(self.rng.choice(t.TOPIC_CORES), topic=request.topic)
        elif request.kind == "info" and request.scene is not None and self.rng.random() < 0.8:
            core = self.fill(self.rng.choice(t.INFO_CORES), request.scene)
        elif request.kind == "fact" and self.rng.random() < 0.7:
            core = self.fill(self.rng.choice(t.FACT_CORES), request.scene, act=request.act)
        else:
            core = self.fill(self.rng.choice(t.NEUTRAL_CORES))
        so_far.last_thing = ""  # "it" would be read as the last noun
        so_far.add(self._sentence(core, tail=not core.startswith("wait until")))

    def benign_sentence(self, so_far: Unfolding, request: WorldRequest) -> None:
        """Say a side sentence, a wish, or an act along the wish."""
        scene = request.scene
        draw = self.rng.random()
        if scene is None or request.kind in {"info", "fact"}:
            if draw < 0.12:
                self.act_sentence(so_far, self.scene(), harmful=False)
            else:
                self.side_sentence(so_far, request)
        elif draw < 0.62:
            self.act_sentence(so_far, scene, harmful=False)
        elif draw < 0.7:
            self.wish_sentence(so_far, scene)
        else:
            self.side_sentence(so_far, request)

    def wish_sentence(self, so_far: Unfolding, scene: Scene) -> None:
        """Say what the scene's person wishes."""
        so_far.add(self._sentence(self.fill(self.rng.choice(t.WISH_CORES), scene), tail=False))
        so_far.scenes[scene.thing] = scene
        so_far.last_thing = scene.thing

    def act_sentence(self, so_far: Unfolding, scene: Scene, *, harmful: bool) -> None:
        """Say an act on the scene's thing, against its wish where harmful, else along it."""
        known = so_far.scenes.get(scene.thing)
        scene = known or scene  # one wish a thing, or the text would contradict itself
        plans = [
            p
            for p in self.cells.plans
            if (known or p not in t.PLANS_NEED_WISH)
            and (p != 1 or so_far.last_thing == scene.thing)
        ]
        if not plans:
            self.wish_sentence(so_far, scene)
            plans = list(self.cells.plans)
        plan = self.rng.choice(plans)
        core = self.fill(t.PLANS[plan], scene, act=self.act(scene, harmful=harmful))
        so_far.add(self._sentence(core), harmful=harmful)
        so_far.plans.append(plan)
        so_far.scenes[scene.thing] = scene
        so_far.last_thing = scene.thing


_FILLERS = {
    "tool": TOOLS,
    "place": PLACES,
    "friend": FRIENDS,
    "time": TIMES,
    "manner": MANNERS,
}
