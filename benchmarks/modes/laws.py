"""Rows that do not trip are bare, in every mode and family; a row's scores are its own.

Knows modes as options of `generate`. Does not know clocks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.modes.subjects import CallPrompts, ModeSubject
from safe_decode.engines.transformers.output import GuardedOutput
from safe_decode.testing.bundles import peaks, threshold_between
from safe_decode.testing.models import tiny_model
from safe_decode.typing import CausalLM

__all__ = ["MODES", "TOLERANCE", "by_mode", "row_law", "untripped"]

_BEAMS = {"num_beams": 3}
MODES: Mapping[str, Mapping[str, Any]] = {
    "greedy": {"do_sample": False},
    "sampled": {"do_sample": True, "temperature": 0.9, "top_k": 40},
    "prefill in chunks": {"do_sample": False, "prefill_chunk_size": 5},
    "static cache": {"do_sample": False, "cache_implementation": "static"},
    "quantised cache": {
        "do_sample": False,
        "cache_implementation": "quantized",
        "cache_config": {"backend": "fp8"},
    },
    "no cache": {"do_sample": False, "use_cache": False},
    "several sequences": {"do_sample": True, "num_return_sequences": 2},
    "beams": {"do_sample": False, **_BEAMS},
    "beam sampling": {"do_sample": True, **_BEAMS, "num_return_sequences": 2},
    "recorded steps": {
        "do_sample": False,
        "return_dict_in_generate": True,
        "output_scores": True,
    },
    "draft model": {"do_sample": False, "assistant_model": None},
    "prompt lookup": {"do_sample": False, "prompt_lookup_num_tokens": 3},
}
_ALONE = frozenset({"draft model", "prompt lookup"})
"""One prompt a call: the neighbour that trips is the call before."""
TOLERANCE = 2e-4
"""Of a statistic in float32: padding and batch size change the order of sums."""


def untripped(measured: ModeSubject, mode: str) -> dict[str, Any]:
    """Count untripped rows whose ids are those of bare `generate`, beside tripping ones."""
    options = {**MODES[mode], "max_new_tokens": measured.new_tokens}
    if "assistant_model" in options:
        options["assistant_model"] = _draft(measured)
    calls = [[row] for row in range(len(measured.asked.prompts))]
    if mode not in _ALONE:
        calls = [[row for call in calls for row in call]]
    found = {"what": "untripped rows identical to bare", "model": measured.name, "mode": mode}
    try:
        bare = [_bare(measured, measured.asked.of(rows), options) for rows in calls]
    except (ValueError, NotImplementedError, AttributeError, TypeError) as error:
        note = f"transformers itself refuses: {type(error).__name__}"
        return {**found, "tripped": None, "n": 0, "identical": None, "met": note}
    flagged = [_guarded(measured, rows, options, redirect="flag") for rows in calls]
    threshold = threshold_between([peak for output in flagged for peak in peaks(output)])
    tripped = total = same = 0
    for rows, (theirs, width) in zip(calls, bare, strict=True):
        output = _guarded(measured, rows, options, redirect="rewind", threshold=threshold)
        for row, trace in enumerate(output.traces):
            tripped += trace.tripped or trace.end.pruned_beams > 0
            if trace.tripped or trace.end.pruned_beams:
                continue
            total += 1
            same += _same(output.sequences[row, width:], theirs[row, width:])
    is_met = same == total and total and tripped
    return {
        **found,
        "tripped": tripped,
        "n": total,
        "identical": same,
        "met": "yes" if is_met else "no",
    }


def by_mode(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Sum the rows of `untripped` over models, a row a mode."""
    found = []
    for mode in dict.fromkeys(row["mode"] for row in rows):
        mine = [row for row in rows if row["mode"] == mode]
        ran = [row for row in mine if row["identical"] is not None]
        is_met = bool(ran) and all(row["met"] == "yes" for row in ran)
        refused = ", ".join(row["model"] for row in mine if row["identical"] is None)
        found.append(
            {
                "mode": mode,
                "models": len(ran),
                "tripped": sum(row["tripped"] for row in ran),
                "untripped": sum(row["n"] for row in ran),
                "identical to bare": sum(row["identical"] for row in ran),
                "refused by transformers itself": refused or None,
                "target": "all",
                "met": "yes" if is_met else "no",
            }
        )
    return found


def row_law(measured: ModeSubject, *, compositions: int, seed: int = 0) -> dict[str, Any]:
    """Score the same rows, teacher-forced, in batches drawn at random, and compare with alone."""
    decoder = measured.subject.decoder(redirect="flag")
    rows = len(measured.asked.prompts)
    answers = decoder.generate(
        list(measured.asked.prompts),
        prefill=list(measured.asked.prefills),
        max_new_tokens=measured.new_tokens,
        do_sample=False,
    ).texts
    # What was said is supplied again: the same tokens, whatever the neighbours would draw.
    forced = CallPrompts(
        measured.asked.prompts,
        [(p or "") + text for p, text in zip(measured.asked.prefills, answers, strict=True)],
    )

    def score(which: Sequence[int]) -> list[list[float]]:
        asked = forced.of(which)
        output = decoder.generate(
            list(asked.prompts), prefill=list(asked.prefills), max_new_tokens=1, do_sample=False
        )
        return [
            [step.statistic for step in trace.steps[: trace.end.prefill_tokens + 1]]
            for trace in output.traces
        ]

    alone = [score([row])[0] for row in range(rows)]
    generator = torch.Generator().manual_seed(seed)
    worst = 0.0
    flips = scores = 0
    threshold = threshold_between([max(path) for path in alone])
    for _ in range(compositions):
        size = int(torch.randint(2, rows + 1, (1,), generator=generator))
        which = torch.randperm(rows, generator=generator)[:size].tolist()
        for row, path in zip(which, score(which), strict=True):
            gaps = [abs(a - b) for a, b in zip(path, alone[row], strict=True)]
            worst, scores = max(worst, *gaps), scores + len(gaps)
            flips += sum(
                (a > threshold) != (b > threshold) and abs(b - threshold) > TOLERANCE
                for a, b in zip(path, alone[row], strict=True)
            )
    return {
        "what": "random batch compositions, largest difference of the statistic",
        "model": measured.name,
        "n": compositions,
        "scores": scores,
        "largest difference": worst,
        "decisions that differ": flips,
        "target": f"<= {TOLERANCE:g}, 0",
        "met": "yes" if worst <= TOLERANCE and not flips else "no",
    }


def _draft(measured: ModeSubject) -> CausalLM:
    if measured.name.startswith("tiny"):
        return tiny_model("llama", seed=1)
    from safe_decode.demo.embedded_pair import artefact
    from safe_decode.loading import load_model

    return load_model(artefact("unaligned")).model


def _bare(
    measured: ModeSubject, asked: CallPrompts, options: Mapping[str, Any]
) -> tuple[Tensor, int]:
    inputs = measured.inputs(asked)
    torch.manual_seed(0)
    found = measured.subject.model.generate(
        input_ids=inputs.input_ids, attention_mask=inputs.attention_mask, **options
    )
    return getattr(found, "sequences", found), inputs.input_ids.shape[1]


def _guarded(
    measured: ModeSubject,
    rows: Sequence[int],
    options: Mapping[str, Any],
    **how: Any,  # noqa: ANN401 - options of SafeDecoder
) -> GuardedOutput:
    asked = measured.asked.of(rows)
    decoder = measured.subject.decoder(**how)
    torch.manual_seed(0)
    return decoder.generate(list(asked.prompts), prefill=list(asked.prefills), **options)


def _same(mine: Tensor, theirs: Tensor) -> bool:
    n = min(len(mine), len(theirs))
    longer = mine[n:] if len(mine) > n else theirs[n:]
    # Guarded text of a neighbour may be longer than the bare batch, or shorter: fill follows.
    return torch.equal(mine[:n], theirs[:n]) and len(set(longer.tolist())) <= 1
