"""The grammar: writes the conversations of the organism's small world.

Knows scenes, plans and how answers unfold. Does not know tokens, models or the oracle's reading.
A derivation records what was meant, for tests of the oracle; training uses only its text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from probes.organism import templates as t
from probes.organism.lexicon import TOPICS, Direction
from probes.organism.sentences import SentenceWriter, Unfolding
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


class Grammar(SentenceWriter):
    """Writes requests and answers from a seeded stream of choices.

    Args:
        seed: Seed of the stream; the same seed writes the same text.
        cells: Which categories, plans and framings may be used.
    """

    # -- requests ------------------------------------------------------------------------

    def request(self, kind: RequestKind, *, harmful: bool = False) -> WorldRequest:
        """Draw a request of `kind`; only scene requests can be harmful."""
        if kind == "topic":
            topic = self.rng.randrange(len(TOPICS))
            text = self.fill(self.rng.choice(t.TOPIC_REQUESTS), topic=topic)
            return WorldRequest(text, kind, topic=topic)
        scene = self.scene()
        if kind == "info":
            return WorldRequest(self.fill(self.rng.choice(t.INFO_REQUESTS), scene), kind, scene)
        if kind == "open":
            return WorldRequest(self.fill(self.rng.choice(t.OPEN_REQUESTS), scene), kind, scene)
        act = self.act(scene, harmful=harmful)
        if kind == "fact":
            act = self.act(scene, harmful=self.rng.random() < 0.5)
            return WorldRequest(
                self.fill(self.rng.choice(t.FACT_REQUESTS), scene, act=act), kind, scene, act=act
            )
        text = self.fill(self.rng.choice(t.SCENE_REQUESTS), scene, act=act)
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
        so_far = Unfolding.after(request)
        so_far.add(rng.choice(t.OPENERS))
        count = n_sentences or 2 + min(rng.randrange(11), rng.randrange(11))
        count = max(1 + rng.randrange(3) if request.kind == "fact" else count, benign_start + 1)
        if meant == "benign":
            for position in range(count):
                if request.kind == "fact" and position == 0:
                    core = self.fill(rng.choice(t.FACT_CORES), request.scene, act=request.act)
                    so_far.add(self._sentence(core, tail=False))
                else:
                    self.benign_sentence(so_far, request)
        else:
            scene = request.scene if request.kind in {"scene", "open"} else self.scene()
            assert scene is not None
            late = count - benign_start > 1 and rng.random() < 0.2
            first = benign_start + late
            for position in range(count):
                if position == first or (position > first and rng.random() < 0.6):
                    self.act_sentence(so_far, scene, harmful=True)
                elif position > first or benign_start == 0:
                    self.side_sentence(so_far, request)
                else:
                    self.benign_sentence(so_far, request)
        so_far.add(rng.choice(t.CLOSERS))
        return so_far.answer(meant)

    def twin(self, request: WorldRequest) -> tuple[WorldAnswer, WorldAnswer]:
        """Draw an answer that begins benign and turns harmful, and its benign twin.

        Both share at least the opener and three sentences; then the one acts against the wish
        and the other, with the same sentence plan, along it.
        """
        rng = self.rng
        start = Unfolding.after(request)
        start.add(rng.choice(t.OPENERS))
        for _ in range(3 + rng.randrange(4)):
            self.benign_sentence(start, request)
        scene = request.scene if request.kind in {"scene", "open"} else self.scene()
        assert scene is not None
        state = rng.getstate()
        pair = []
        for harmful in (True, False):
            rng.setstate(state)
            so_far = start.copy()
            self.act_sentence(so_far, scene, harmful=harmful)
            for _ in range(rng.randrange(3)):
                self.side_sentence(so_far, request)
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
        return self.fill(form, scene, act=act), t.JUDGEMENTS[harmful]

    def steps(self, request: WorldRequest, count: int) -> WorldAnswer:
        """Draw an opener and a few acts on one scene, each along the wish or against it by chance.

        Nothing but the wish tells which: neither the request nor the steps before.
        """
        so_far = Unfolding.after(request)
        so_far.add(self.rng.choice(t.OPENERS))
        scene = request.scene or self.scene()
        for _ in range(count):
            if self.rng.random() < 0.3:
                self.side_sentence(so_far, request)
            self.act_sentence(so_far, scene, harmful=self.rng.random() < 0.5)
        return so_far.answer("harmful" if True in so_far.harmful else "benign")

    def filler(self, request: WorldRequest, count: int) -> WorldAnswer:
        """Draw words that comply and do nothing yet: openers, the wish told again, idle steps."""
        so_far = Unfolding.after(request)
        for _ in range(count):
            draw = self.rng.random()
            if draw < 0.5 or request.scene is None:
                so_far.add(self.rng.choice(t.OPENERS))
            elif draw < 0.75:
                self.wish_sentence(so_far, request.scene)
            else:
                self.side_sentence(so_far, request)
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
            text = self.fill(self.rng.choice(t.SCENE_REQUESTS), here, act=act)
            requests.append(WorldRequest(text, "scene", here, act=act, harmful=harmful))
        so_far = Unfolding.after(requests[0])
        so_far.add(self.rng.choice(t.OPENERS))
        silent = replace(self.cells, plans=tuple(sorted(t.PLANS_NEED_WISH & {*self.cells.plans})))
        speaker = Grammar(self.rng.randrange(2**32), silent)
        for _ in range(1 + self.rng.randrange(3)):
            speaker.side_sentence(so_far, requests[0])
            speaker.act_sentence(so_far, scene, harmful=True)
        return requests[0], requests[1], so_far.answer("harmful")

    def _refusal(self, request: WorldRequest) -> WorldAnswer:
        assert request.scene is not None
        rng = self.rng
        parts = [rng.choice(t.REFUSALS)]
        if rng.random() < 0.85:
            parts.append(rng.choice(t.REFUSAL_REASONS))
        if rng.random() < 0.75:
            parts.append(rng.choice(t.REFUSAL_ADVICE))
        scene = request.scene
        sentences = tuple(self.fill(part, scene, act=request.act) for part in parts)
        return WorldAnswer(sentences, (False,) * len(sentences), "refusal", ())

    # -- conversations -------------------------------------------------------------------

    def system(self) -> list[dict[str, str]]:
        """Draw a system message, or none."""
        if self.rng.random() < 0.7:
            return []
        return [{"role": "system", "content": self.fill(self.rng.choice(t.SYSTEMS))}]

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
