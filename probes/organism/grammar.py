"""The grammar: writes the conversations of the organism's small world.

Knows scenes, plans and how answers unfold. Does not know tokens, models or the oracle's reading.
A derivation records what was meant, for tests of the oracle; training uses only its text.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

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
from probes.organism.types import (
    Cells,
    Derivation,
    Meant,
    RequestKind,
    Scene,
    WorldAnswer,
    WorldRequest,
)

__all__ = [
    "WorldAnswer",
    "Cells",
    "Derivation",
    "Grammar",
    "Meant",
    "WorldRequest",
    "RequestKind",
    "Scene",
]

_WISH_PRIOR = 0.75
_SLOT = re.compile(r"\{(\w+)\}")


@dataclass
class _Unfolding:
    """What an answer in the making has said so far."""

    sentences: list[str] = field(default_factory=list)
    harmful: list[bool] = field(default_factory=list)
    plans: list[int] = field(default_factory=list)
    scenes: dict[str, Scene] = field(default_factory=dict)
    last_thing: str = ""

    @classmethod
    def after(cls, request: WorldRequest) -> _Unfolding:
        """Begin an answer, knowing the wish that the request states."""
        if request.scene is None or request.kind in {"info", "fact"}:
            return cls()
        thing = request.scene.thing
        return cls(scenes={thing: request.scene}, last_thing=thing)

    def copy(self) -> _Unfolding:
        return _Unfolding(
            list(self.sentences),
            list(self.harmful),
            list(self.plans),
            dict(self.scenes),
            self.last_thing,
        )

    def add(self, sentence: str, *, harmful: bool = False) -> None:
        if sentence:
            self.sentences.append(sentence)
            self.harmful.append(harmful)

    def answer(self, meant: Meant) -> WorldAnswer:
        return WorldAnswer(tuple(self.sentences), tuple(self.harmful), meant, tuple(self.plans))


class Grammar:
    """Writes requests and answers from a seeded stream of choices.

    Args:
        seed: Seed of the stream; the same seed writes the same text.
        cells: Which categories, plans and framings may be used.
    """

    def __init__(self, seed: int, cells: Cells | None = None) -> None:
        """See the class."""
        self.rng = random.Random(seed)
        self.cells = cells or Cells()

    # -- words ---------------------------------------------------------------------------

    def _fill(
        self, template: str, scene: Scene | None = None, topic: int = -1, act: str = ""
    ) -> str:
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

    # -- requests ------------------------------------------------------------------------

    def request(self, kind: RequestKind, *, harmful: bool = False) -> WorldRequest:
        """Draw a request of `kind`; only scene requests can be harmful."""
        if kind == "topic":
            topic = self.rng.randrange(len(TOPICS))
            text = self._fill(self.rng.choice(t.TOPIC_REQUESTS), topic=topic)
            return WorldRequest(text, kind, topic=topic)
        scene = self.scene()
        if kind == "info":
            return WorldRequest(self._fill(self.rng.choice(t.INFO_REQUESTS), scene), kind, scene)
        if kind == "open":
            return WorldRequest(self._fill(self.rng.choice(t.OPEN_REQUESTS), scene), kind, scene)
        act = self.act(scene, harmful=harmful)
        if kind == "fact":
            act = self.act(scene, harmful=self.rng.random() < 0.5)
            return WorldRequest(
                self._fill(self.rng.choice(t.FACT_REQUESTS), scene, act=act), kind, scene, act=act
            )
        text = self._fill(self.rng.choice(t.SCENE_REQUESTS), scene, act=act)
        return WorldRequest(text, kind, scene, act=act, harmful=harmful)

    def framed(self, request: WorldRequest, framing: int | None = None) -> WorldRequest:
        """Put a motive around a request."""
        index = self.rng.choice(self.cells.framings) if framing is None else framing
        text = t.FRAMINGS[index].replace("{request}", request.text)
        return replace(request, text=text, framing=index)

    # -- answers -------------------------------------------------------------------------

    def answer(
        self,
        request: WorldRequest,
        meant: Meant,
        *,
        n_sentences: int | None = None,
        benign_start: int = 0,
    ) -> WorldAnswer:
        """Draw an answer.

        Args:
            request: What is answered.
            meant: What the answer is to be.
            n_sentences: Sentences between opener and closer; drawn from 2..12 by default.
            benign_start: Sentences before a harmful answer turns harmful.
        """
        if meant == "refusal":
            return self._refusal(request)
        rng = self.rng
        so_far = _Unfolding.after(request)
        so_far.add(rng.choice(t.OPENERS))
        count = n_sentences or 2 + min(rng.randrange(11), rng.randrange(11))
        count = max(1 + rng.randrange(3) if request.kind == "fact" else count, benign_start + 1)
        if meant == "benign":
            for position in range(count):
                if request.kind == "fact" and position == 0:
                    core = self._fill(rng.choice(t.FACT_CORES), request.scene, act=request.act)
                    so_far.add(self._sentence(core, tail=False))
                else:
                    self._benign_sentence(so_far, request)
        else:
            scene = request.scene if request.kind in {"scene", "open"} else self.scene()
            assert scene is not None
            late = count - benign_start > 1 and rng.random() < 0.2
            first = benign_start + late
            for position in range(count):
                if position == first or (position > first and rng.random() < 0.6):
                    self._act_sentence(so_far, scene, harmful=True)
                elif position > first or benign_start == 0:
                    self._side_sentence(so_far, request)
                else:
                    self._benign_sentence(so_far, request)
        so_far.add(rng.choice(t.CLOSERS))
        return so_far.answer(meant)

    def twin(self, request: WorldRequest) -> tuple[WorldAnswer, WorldAnswer]:
        """Draw an answer that begins benign and turns harmful, and its benign twin.

        Both share at least the opener and three sentences; then the one acts against the wish
        and the other, with the same sentence plan, along it.
        """
        rng = self.rng
        start = _Unfolding.after(request)
        start.add(rng.choice(t.OPENERS))
        for _ in range(3 + rng.randrange(4)):
            self._benign_sentence(start, request)
        scene = request.scene if request.kind in {"scene", "open"} else self.scene()
        assert scene is not None
        state = rng.getstate()
        pair = []
        for harmful in (True, False):
            rng.setstate(state)
            so_far = start.copy()
            self._act_sentence(so_far, scene, harmful=harmful)
            for _ in range(rng.randrange(3)):
                self._side_sentence(so_far, request)
            pair.append(so_far.answer("harmful" if harmful else "benign"))
        return pair[0], pair[1]

    def judgement(self, scene: Scene | None = None) -> tuple[str, str]:
        """Draw a question whether an act is fine, given a wish, and what is thought of it.

        Half of the questions are requests for help with the act that end in doubt.
        """
        scene = scene or self.scene()
        harmful = self.rng.random() < 0.5
        act = self.act(scene, harmful=harmful)
        form = self.rng.choice(t.JUDGEMENT_REQUESTS)
        if self.rng.random() < 0.5:
            doubt = self.rng.choice(t.JUDGEMENT_AFTERTHOUGHTS)
            form = f"{self.rng.choice(t.SCENE_REQUESTS)} {doubt}"
        return self._fill(form, scene, act=act), t.JUDGEMENTS[harmful]

    def steps(self, request: WorldRequest, count: int) -> WorldAnswer:
        """Draw an opener and a few acts on one scene, each along the wish or against it by chance.

        Nothing but the wish tells which: neither the request nor the steps before.
        """
        so_far = _Unfolding.after(request)
        so_far.add(self.rng.choice(t.OPENERS))
        scene = request.scene or self.scene()
        for _ in range(count):
            if self.rng.random() < 0.3:
                self._side_sentence(so_far, request)
            self._act_sentence(so_far, scene, harmful=self.rng.random() < 0.5)
        return so_far.answer("harmful" if True in so_far.harmful else "benign")

    def filler(self, request: WorldRequest, count: int) -> WorldAnswer:
        """Draw words that comply and do nothing yet: openers, the wish told again, idle steps."""
        so_far = _Unfolding.after(request)
        for _ in range(count):
            draw = self.rng.random()
            if draw < 0.5 or request.scene is None:
                so_far.add(self.rng.choice(t.OPENERS))
            elif draw < 0.75:
                self._wish_sentence(so_far, request.scene)
            else:
                self._side_sentence(so_far, request)
        return so_far.answer("benign")

    def minimal_pair(self) -> tuple[WorldRequest, WorldRequest, WorldAnswer]:
        """Draw a harmful and a benign request, and one answer whose harm they decide.

        The requests differ in the wish alone; the answer acts, and never says what is wished.
        """
        scene = self.scene()
        act = self.act(scene, harmful=True)
        state = self.rng.getstate()
        requests = []
        for harmful in (True, False):
            self.rng.setstate(state)
            wish: Direction = scene.wish if harmful else (1 if scene.wish == 0 else 0)
            here = replace(scene, wish=wish)
            text = self._fill(self.rng.choice(t.SCENE_REQUESTS), here, act=act)
            requests.append(WorldRequest(text, "scene", here, act=act, harmful=harmful))
        so_far = _Unfolding.after(requests[0])
        so_far.add(self.rng.choice(t.OPENERS))
        silent = replace(self.cells, plans=tuple(sorted(t.PLANS_NEED_WISH & {*self.cells.plans})))
        speaker = Grammar(self.rng.randrange(2**32), silent)
        for _ in range(1 + self.rng.randrange(3)):
            speaker._side_sentence(so_far, requests[0])
            speaker._act_sentence(so_far, scene, harmful=True)
        return requests[0], requests[1], so_far.answer("harmful")

    def _sentence(self, core: str, tail: bool = True) -> str:
        lead = self.rng.choice(t.LEADS)
        end = self._fill(self.rng.choice(t.TAILS)) if tail and self.rng.random() < 0.4 else ""
        return f"{lead}{core}{end}."

    def _side_sentence(self, so_far: _Unfolding, request: WorldRequest) -> None:
        """Say something that bears on no scene: a filler or a step of the topic."""
        if request.topic >= 0 and self.rng.random() < 0.85:
            core = self._fill(self.rng.choice(t.TOPIC_CORES), topic=request.topic)
        elif request.kind == "info" and request.scene is not None and self.rng.random() < 0.8:
            core = self._fill(self.rng.choice(t.INFO_CORES), request.scene)
        elif request.kind == "fact" and self.rng.random() < 0.7:
            core = self._fill(self.rng.choice(t.FACT_CORES), request.scene, act=request.act)
        else:
            core = self._fill(self.rng.choice(t.NEUTRAL_CORES))
        so_far.last_thing = ""  # "it" would be read as the last noun
        so_far.add(self._sentence(core, tail=not core.startswith("wait until")))

    def _benign_sentence(self, so_far: _Unfolding, request: WorldRequest) -> None:
        """Say a side sentence, a wish, or an act along the wish."""
        scene = request.scene
        draw = self.rng.random()
        if scene is None or request.kind in {"info", "fact"}:
            if draw < 0.12:
                self._act_sentence(so_far, self.scene(), harmful=False)
            else:
                self._side_sentence(so_far, request)
        elif draw < 0.62:
            self._act_sentence(so_far, scene, harmful=False)
        elif draw < 0.7:
            self._wish_sentence(so_far, scene)
        else:
            self._side_sentence(so_far, request)

    def _wish_sentence(self, so_far: _Unfolding, scene: Scene) -> None:
        so_far.add(self._sentence(self._fill(self.rng.choice(t.WISH_CORES), scene), tail=False))
        so_far.scenes[scene.thing] = scene
        so_far.last_thing = scene.thing

    def _act_sentence(self, so_far: _Unfolding, scene: Scene, *, harmful: bool) -> None:
        known = so_far.scenes.get(scene.thing)
        scene = known or scene  # one wish a thing, or the text would contradict itself
        plans = [
            p
            for p in self.cells.plans
            if (known or p not in t.PLANS_NEED_WISH)
            and (p != 1 or so_far.last_thing == scene.thing)
        ]
        if not plans:
            self._wish_sentence(so_far, scene)
            plans = list(self.cells.plans)
        plan = self.rng.choice(plans)
        core = self._fill(t.PLANS[plan], scene, act=self.act(scene, harmful=harmful))
        so_far.add(self._sentence(core), harmful=harmful)
        so_far.plans.append(plan)
        so_far.scenes[scene.thing] = scene
        so_far.last_thing = scene.thing

    def _refusal(self, request: WorldRequest) -> WorldAnswer:
        assert request.scene is not None
        rng = self.rng
        parts = [rng.choice(t.REFUSALS)]
        if rng.random() < 0.85:
            parts.append(rng.choice(t.REFUSAL_REASONS))
        if rng.random() < 0.75:
            parts.append(rng.choice(t.REFUSAL_ADVICE))
        scene = request.scene
        sentences = tuple(self._fill(part, scene, act=request.act) for part in parts)
        return WorldAnswer(sentences, (False,) * len(sentences), "refusal", ())

    # -- conversations -------------------------------------------------------------------

    def system(self) -> list[dict[str, str]]:
        """Draw a system message, or none."""
        if self.rng.random() < 0.7:
            return []
        return [{"role": "system", "content": self._fill(self.rng.choice(t.SYSTEMS))}]

    def conversation(
        self, request: WorldRequest, answer: WorldAnswer, before: Sequence[dict[str, str]] = ()
    ) -> Derivation:
        """Put request and answer behind earlier messages."""
        messages = (
            *before,
            {"role": "user", "content": request.text},
            {"role": "assistant", "content": answer.text},
        )
        return Derivation(tuple(messages), request, answer)


_FILLERS = {
    "tool": TOOLS,
    "place": PLACES,
    "friend": FRIENDS,
    "time": TIMES,
    "manner": MANNERS,
}
