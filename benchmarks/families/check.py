"""Puts the guard on one tiny model and looks whether the laws hold.

Knows what a guarded family has to do: nothing trips and the ids are those of bare `generate`; each
score is the teacher-forced one; a trip ends in the refusal, or in a new answer after a rewind; what
somebody else cuts off is judged with unseen tokens behind it. Does not know families by name.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from safe_decode.activations.architecture import Architecture, anatomy_of
from safe_decode.activations.families import why_alone, why_refused, why_unpadded
from safe_decode.activations.site import Site, SiteKind, sorted_sites
from safe_decode.activations.tap import ActivationTap
from safe_decode.bundle.bundle import ProbeBundle
from safe_decode.engines.transformers.decoder import SafeDecoder
from safe_decode.engines.transformers.output import GuardedOutput
from safe_decode.errors import UnsupportedError
from safe_decode.testing.bundles import OPENER, REFUSAL, bundle_for, peaks, random_probe, threshold_between
from safe_decode.typing import CausalLM, Tokenizer

__all__ = ["Finding", "Verdict", "examine", "readable"]

Verdict = Literal["guarded", "refused"]
"""What becomes of a family; there is no third."""

PROMPTS = ["hello", "what is it?", "abc"]
EVEN_PROMPTS = ["hello", "abcde", "12 34"]
CAP = 8
TOLERANCE, RECURRENT_TOLERANCE = 2e-2, 0.15
"""Of a logit against the teacher-forced one, whose spread is about 1: float32, wide weights.
A recurrence that steps rounds otherwise than one that scans."""


@dataclass(frozen=True)
class Finding:
    """What was found of one family.

    Attributes:
        verdict: Whether it is guarded or refused.
        sites: Kinds of sites that can be read in some layer; empty where it is refused.
        reason: Why it is refused, as users read it; empty where it is guarded.
    """

    verdict: Verdict
    sites: tuple[SiteKind, ...] = ()
    reason: str = ""


def examine(model: CausalLM, tokenizer: Tokenizer) -> Finding:
    """Guard a model and check the laws.

    Raises:
        AssertionError: A law does not hold.
        Exception: What the model or the guard raises, but for a refusal by name.
    """
    try:
        anatomy = anatomy_of(model)
        sites = readable(anatomy)
        ActivationTap(model, sites)
    except UnsupportedError as error:
        return Finding("refused", reason=str(error))
    _check(model, tokenizer, sites)
    return Finding("guarded", tuple(dict.fromkeys(site.kind for site in sites)))


def readable(anatomy: Architecture) -> tuple[Site, ...]:
    """Choose a site of each kind that some layer has, the last of the residual stream."""
    layers = range(len(anatomy.blocks))
    found: list[Site] = []
    orders: Mapping[SiteKind, Sequence[int]] = {"resid": layers[::-1], "attn": layers, "mlp": layers}
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
        assert refusal is not None
        raise refusal
    return sorted_sites(found)


def _check(model: CausalLM, tokenizer: Tokenizer, sites: Sequence[Site]) -> None:
    bundle = bundle_for(model, tokenizer, probe=random_probe(sites=tuple(sites)))
    ids, mask = _prompts(tokenizer, _prompts_for(model))

    def generate(threshold: float = 1e9, redirect: Any = "refuse", **options: Any) -> Any:
        own = bundle_for(model, tokenizer, probe=bundle.probe, threshold=threshold)
        decoder = SafeDecoder(model, tokenizer, own, redirect=redirect)
        torch.manual_seed(0)
        return decoder.generate(input_ids=ids, attention_mask=mask, max_new_tokens=CAP, **options)

    for options in ({}, {"do_sample": True}):
        torch.manual_seed(0)
        bare = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=CAP, **options)
        calm = generate(**options)
        _require_bare(calm, bare, ids, mask)
    _require_teacher_forced(model, bundle, calm)
    tops = peaks(calm)
    threshold = threshold_between(tops) if len(tops) > 1 else tops[0] - 1e-3
    for redirect in ("refuse", "rewind"):
        output = generate(threshold, redirect, do_sample=True)
        _require_redirected(output, bare, redirect, [top > threshold for top in tops])


def _prompts_for(model: CausalLM) -> list[str]:
    """Choose prompts that the family takes together."""
    if why_alone(model.config) is not None:
        return PROMPTS[:1]
    return EVEN_PROMPTS if why_unpadded(model.config) is not None else PROMPTS


def _prompts(tokenizer: Tokenizer, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
    rows = [tokenizer.encode(text) for text in prompts]
    width = max(map(len, rows))
    pad = tokenizer.pad_token_id or 0
    ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return ids, mask


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


def _require_teacher_forced(model: CausalLM, bundle: ProbeBundle, output: GuardedOutput) -> None:
    tap = ActivationTap(model, bundle.probe.sites)
    is_recurrent = bool(getattr(model, "_is_stateful", False))
    tolerance = RECURRENT_TOLERANCE if is_recurrent else TOLERANCE
    for trace in output.traces:
        whole = torch.tensor([[step.token for step in trace.steps]])
        with tap.listening() as beats, torch.no_grad():
            beats.keep_last(None)
            model(input_ids=whole, use_cache=False)
            logits = bundle.probe(beats.take())[0, :, 0]
        own = torch.tensor([step.logits[0] for step in trace.steps])
        off = float((own - logits).abs().max())
        assert off < tolerance, f"scores are off by {off:.2g}"


def _require_redirected(output: Any, bare: Tensor, redirect: str, wanted: list[bool]) -> None:
    assert [trace.tripped for trace in output.traces] == wanted, "other rows have tripped"
    for row, trace in enumerate(output.traces):
        assert trace.end.error is None, trace.end.error
        if not trace.tripped:
            n = min(output.sequences.shape[1], bare.shape[1])
            assert torch.equal(output.sequences[row, :n], bare[row, :n]), "a neighbour moved"
            continue
        said = OPENER if redirect == "rewind" else REFUSAL
        assert said in output.texts[row] or REFUSAL in output.texts[row], "a trip forced nothing"
