"""Puts the guard on one tiny model and looks whether the laws hold.

Knows what a guarded family has to do: nothing trips and the ids are those of bare `generate`; each
score is the teacher-forced one; a trip ends in the refusal, or in a new answer after a rewind; what
somebody else cuts off is judged with unseen tokens behind it. Does not know families by name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from safe_decode.activations.architecture import Architecture, anatomy_of
from safe_decode.activations.families import why_alone, why_unpadded
from safe_decode.activations.site import Site, SiteKind, sorted_sites
from safe_decode.activations.tap import ActivationTap
from safe_decode.decision import Redirect
from safe_decode.engines.transformers.decoder import SafeDecoder
from safe_decode.engines.transformers.output import GuardedOutput
from safe_decode.errors import UnsupportedError
from safe_decode.probe.linear import LinearProbe
from safe_decode.testing.bundles import (
    OPENER,
    REFUSAL,
    bundle_for,
    peaks,
    random_probe,
    threshold_between,
)
from safe_decode.typing import CausalLM, Tokenizer

__all__ = ["Laws", "Rows", "readable", "rows_of"]

Rows = Literal["any", "of one length", "one at a time"]
"""Which rows a family takes into one batch."""

PROMPTS: Mapping[Rows, Sequence[str]] = {
    "any": ("hello", "what is it?", "abc"),
    "of one length": ("hello", "abcde", "12 34"),
    "one at a time": ("hello",),
}
CAP = 7
TOLERANCE, RECURRENT_TOLERANCE = 2e-2, 0.15
"""Of a logit against the teacher-forced one, whose spread is about 1: float32, wide weights.
A recurrence that steps rounds otherwise than one that scans."""


def rows_of(model: CausalLM) -> Rows:
    """Say which rows the family of a model takes into one batch."""
    if why_alone(model.config) is not None:
        return "one at a time"
    return "any" if why_unpadded(model.config) is None else "of one length"


def readable(anatomy: Architecture) -> tuple[Site, ...]:
    """Choose a site of each kind that some layer has, the last of the residual stream.

    Raises:
        UnsupportedError: No site can be read.
    """
    layers = range(len(anatomy.blocks))
    orders: Mapping[SiteKind, Sequence[int]] = {
        "resid": layers[::-1],
        "attn": layers,
        "mlp": layers,
    }
    found: list[Site] = []
    refusal: UnsupportedError | None = None
    for kind in get_args(SiteKind):
        for layer in orders[kind]:
            try:
                width = anatomy.width(layer, kind)
            except UnsupportedError as error:
                refusal = refusal or error
                continue
            found.append(Site(layer, kind, tuple(range(0, width, 3))))
            break
    if not found:
        assert refusal is not None, "a model without layers is refused before"
        raise refusal
    return sorted_sites(found)


@dataclass(frozen=True)
class Laws:
    """One model, and the laws that it has to keep.

    Attributes:
        model: Tiny, in eval mode.
        tokenizer: For it.
    """

    model: CausalLM
    tokenizer: Tokenizer

    def check(self) -> tuple[SiteKind, ...]:
        """Guard the model and check all laws; return the kinds of sites that were read.

        Raises:
            UnsupportedError: The guard refuses the model by name.
            AssertionError: A law does not hold; the message says which.
        """
        sites = readable(anatomy_of(self.model))
        probe = random_probe(sites=sites)
        ids, mask = self._prompts()
        with torch.no_grad():
            greedy = self._bare(ids, mask)
            drawn = self._bare(ids, mask, do_sample=True)
            _require_bare(self._guarded(probe, ids, mask), greedy, ids, mask)
            calm = self._guarded(probe, ids, mask, do_sample=True)
            _require_bare(calm, drawn, ids, mask)
            self._require_teacher_forced(probe, calm)
            tops = peaks(calm)
            between = threshold_between(tops) if len(tops) > 1 else tops[0] - 1e-3
            ways: tuple[Redirect, ...] = ("refuse", "rewind")
            for redirect in ways:
                output = self._guarded(
                    probe, ids, mask, threshold=between, redirect=redirect, do_sample=True
                )
                _require_redirected(output, drawn, redirect, [top > between for top in tops])
        return tuple(kind for kind in get_args(SiteKind) if any(s.kind == kind for s in sites))

    def _prompts(self) -> tuple[Tensor, Tensor]:
        rows = [self.tokenizer.encode(text) for text in PROMPTS[rows_of(self.model)]]
        width, pad = max(map(len, rows)), self.tokenizer.pad_token_id or 0
        ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
        return ids, mask

    def _bare(self, ids: Tensor, mask: Tensor, *, do_sample: bool = False) -> Tensor:
        torch.manual_seed(0)
        sequences: Tensor = self.model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=CAP, do_sample=do_sample
        )
        return sequences

    def _guarded(
        self,
        probe: LinearProbe,
        ids: Tensor,
        mask: Tensor,
        *,
        threshold: float = 1e9,
        redirect: Redirect = "refuse",
        do_sample: bool = False,
    ) -> GuardedOutput:
        bundle = bundle_for(self.model, self.tokenizer, threshold=threshold, probe=probe)
        decoder = SafeDecoder(self.model, self.tokenizer, bundle, redirect=redirect)
        torch.manual_seed(0)
        return decoder.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=CAP, do_sample=do_sample
        )

    def _require_teacher_forced(self, probe: LinearProbe, output: GuardedOutput) -> None:
        tap = ActivationTap(self.model, probe.sites)
        steps = bool(getattr(self.model, "_is_stateful", False))
        tolerance = RECURRENT_TOLERANCE if steps else TOLERANCE
        for trace in output.traces:
            whole = torch.tensor([[step.token for step in trace.steps]])
            with tap.listening() as beats:
                beats.keep_last(None)
                self.model(input_ids=whole, use_cache=False)
                logits = probe(beats.take())[0, :, 0]
            own = torch.tensor([step.logits[0] for step in trace.steps])
            off = float((own - logits).abs().max())
            assert off < tolerance, f"scores are off by {off:.2g}"
            assert float(own.std()) > 2 * TOLERANCE, "scores do not move, so they show nothing"


def _require_bare(output: GuardedOutput, bare: Tensor, ids: Tensor, mask: Tensor) -> None:
    assert torch.equal(output.sequences, bare), "an untripped row is not the bare model's"
    for row, trace in enumerate(output.traces):
        end, read = trace.end, [step.token for step in trace.steps]
        prompt = ids[row][mask[row].bool()].tolist()
        said = bare[row, ids.shape[1] :].tolist()[: end.released_tokens]
        assert end.error is None, end.error
        assert read[: len(prompt + said)] == prompt + said, "a token has no score of its own"
        assert len(read) == len(prompt + said) + end.lookahead_tokens, "a score has no token"
        assert end.unscored_tail == 0 and end.withheld_tokens == 0, "a tail was not judged"
    assert any(trace.end.lookahead_tokens for trace in output.traces), "no tail was looked behind"


def _require_redirected(
    output: GuardedOutput, bare: Tensor, redirect: str, wanted: list[bool]
) -> None:
    assert [trace.tripped for trace in output.traces] == wanted, "other rows have tripped"
    assert any(wanted), "no row trips, so a trip shows nothing"
    for row, trace in enumerate(output.traces):
        assert trace.end.error is None, trace.end.error
        if not trace.tripped:
            n = min(output.sequences.shape[1], bare.shape[1])
            assert torch.equal(output.sequences[row, :n], bare[row, :n]), "a neighbour moved"
            continue
        text, tries = output.texts[row], trace.end.tries
        assert REFUSAL in text or (redirect == "rewind" and tries and OPENER in text), (
            "a trip forced nothing"
        )
