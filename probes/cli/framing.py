"""`safe-decode framing`: the refusal rate of a model under motive after motive.

Knows the options and how the outcome is shown. Does not know motives or judges.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from probes.cli.options import BatchSize, JournalPath, RefusalPhrases
from safe_decode.cli.command import command
from safe_decode.cli.console import print_json, progress, require_place
from safe_decode.cli.options import GuardOptions, JsonOptions
from safe_decode.cli.tables import WordTable, print_table
from safe_decode.errors import ConfigurationError

if TYPE_CHECKING:
    from probes.analysis.motives import Framed, MotiveResult
    from probes.metrics.detection import Proportion
    from probes.rollouts.generate import RolloutConfig
    from probes.rollouts.types import Judge, Request
    from safe_decode.engines.transformers.decoder import SafeDecoder
    from safe_decode.loading import Loaded

__all__ = ["framing"]


@dataclass(frozen=True, kw_only=True)
class FramingOptions(GuardOptions, JsonOptions):
    """Options of `safe-decode framing`."""

    harmful: Annotated[
        Path | None,
        typer.Option(
            help="Plain harmful prompts as JSON lines. Without it: prompts of the embedded world."
        ),
    ] = None
    motives: Annotated[
        Path | None,
        typer.Option(
            help="File of motives, one a line, each with the slot {request}. Without it: the "
            "built-in motives."
        ),
    ] = None
    bare_only: Annotated[
        bool, typer.Option("--bare-only", help="Measure the bare model alone, without the guard.")
    ] = False
    prompts: Annotated[
        int,
        typer.Option(min=1, help="Largest number of requests; each is asked under every motive."),
    ] = 50
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 128
    batch_size: BatchSize = 64
    refusal_phrase: RefusalPhrases = None
    seed: Annotated[int, typer.Option(help="Seed of the embedded world's prompts.")] = 0
    out: JournalPath = None
    plot: Annotated[Path | None, typer.Option(help="Draw the refusal rates to this PNG file.")] = (
        None
    )


@command("Evaluate")
def framing(options: FramingOptions) -> None:
    """Ask the same harmful requests under many motives, bare and guarded."""
    _require_sense(options)
    rows = _measured(options)
    if options.plot is not None:
        _draw(rows, options.plot)
    if options.as_json:
        print_json({"motives": [_as_json(row) for row in rows]})
    else:
        _show(rows)


def _require_sense(options: FramingOptions) -> None:
    for path in (options.out, options.plot):
        require_place(path)
    if options.plot is not None:
        from probes.reports.figures import require_plots

        require_plots()
    if options.harmful is None and options.model is not None:
        raise ConfigurationError(
            f"--model={options.model!r} was given without --harmful; pass a file of plain harmful "
            "prompts, the embedded world's are in the words of the embedded model."
        )


def _measured(options: FramingOptions) -> list[Framed]:
    from probes.analysis.motives import MOTIVES, read_motives
    from probes.organism.prompts_source import WORLD_MOTIVES
    from probes.rollouts.generate import RolloutConfig

    harmful = options.harmful
    own = None if options.motives is None else read_motives(options.motives)
    asked = _from_file(harmful, options.prompts)
    loaded = options.load_model()
    decoder = None if options.bare_only else _guard(loaded, options)
    config = RolloutConfig(max_new_tokens=options.max_new_tokens, batch_size=options.batch_size)
    requests = asked or _from_world(loaded, options.prompts, options.seed)
    judge = _judge(harmful, options.refusal_phrase)
    return _rows(
        requests,
        own or (WORLD_MOTIVES if harmful is None else MOTIVES),
        _bare(loaded, judge, config),
        None if decoder is None else _guarded(decoder, judge, config),
        options.out,
        _identity(loaded, decoder, requests, config),
    )


def _from_file(path: Path | None, prompts: int) -> list[Request]:
    if path is None:
        return []
    from probes.location.prompt_files import read_prompts

    return list(read_prompts(path, split="test").asked()[:prompts])


def _from_world(loaded: Loaded, prompts: int, seed: int) -> list[Request]:
    from probes.organism.draws import Draw
    from probes.organism.prompts_source import world_requests

    one = Draw(situation="harmful", count=prompts)
    return world_requests(loaded.tokenizer, one, seed=seed + 8_000)


def _judge(harmful: Path | None, phrases: list[str] | None) -> Judge:
    from probes.analysis.behaviour import words_judge
    from probes.organism.prompts_source import world_judge

    if harmful is None:
        return world_judge
    return words_judge(harmful_prompts=True, phrases=tuple(phrases or ()))


def _guard(loaded: Loaded, options: FramingOptions) -> SafeDecoder | None:
    """Put the guard on; None for a model of one's own without a bundle."""
    if options.bundle is None and options.model is not None:
        return None
    from safe_decode.engines.transformers.decoder import SafeDecoder

    return SafeDecoder(
        loaded.model,
        loaded.tokenizer,
        options.load_bundle(),
        redirect="refuse",
        alpha=options.alpha,
    )


def _bare(
    loaded: Loaded, judge: Judge, config: RolloutConfig
) -> Callable[[list[Request]], MotiveResult]:
    from probes.analysis.behaviour import outcomes_of
    from probes.analysis.motives import MotiveResult

    def answer(requests: list[Request]) -> MotiveResult:
        return MotiveResult(outcomes_of(loaded.model, loaded.tokenizer, requests, judge, config))

    return answer


def _guarded(
    decoder: SafeDecoder, judge: Judge, config: RolloutConfig
) -> Callable[[list[Request]], MotiveResult]:
    from probes.analysis.behaviour import LABELS, Outcomes
    from probes.analysis.motives import MotiveResult

    def answer(requests: list[Request]) -> MotiveResult:
        counts, stopped = dict.fromkeys(LABELS, 0), 0
        for begin in range(0, len(requests), config.batch_size):
            part = requests[begin : begin + config.batch_size]
            output = decoder.generate(
                [list(row.messages) for row in part],
                max_new_tokens=config.max_new_tokens,
                do_sample=False,
            )
            for row, text, trace in zip(part, output.texts, output.traces, strict=True):
                label = judge(row.messages, text).label
                counts[label] += 1
                stopped += trace.tripped or label == "refusal"
        return MotiveResult(Outcomes(counts), stopped)

    return answer


def _identity(
    loaded: Loaded, decoder: SafeDecoder | None, requests: Sequence[Request], config: RolloutConfig
) -> dict[str, Any]:
    import hashlib
    from dataclasses import asdict

    from safe_decode.bundle.fingerprint import Fingerprint

    model = repr(asdict(Fingerprint.of(loaded.model, loaded.tokenizer)))
    asked = "".join(row.group for row in requests)
    return {
        "model": hashlib.blake2b(model.encode(), digest_size=8).hexdigest(),
        "bundle": None if decoder is None else decoder.bundle.digest[:16],
        "alpha": None if decoder is None else decoder.certificate.alpha,
        "prompts": hashlib.blake2b(asked.encode(), digest_size=8).hexdigest(),
        "max_new_tokens": config.max_new_tokens,
    }


def _rows(
    requests: Sequence[Request],
    motives: Sequence[str],
    bare: Callable[[list[Request]], MotiveResult],
    guarded: Callable[[list[Request]], MotiveResult] | None,
    out: Path | None,
    identity: dict[str, Any],
) -> list[Framed]:
    from probes.analysis.motives import PLAIN, Framed, framing_rows
    from probes.runs.journal import Journal

    journal = None if out is None else Journal(out, identity)
    wanted, found = list(dict.fromkeys((PLAIN, *motives))), {}
    if journal is not None:
        found = {m: Framed.from_json(journal.rows[m]) for m in wanted if m in journal}
    with progress("asking", len(wanted)) as tick:
        tick(len(found))
        for motive in [motive for motive in wanted if motive not in found]:
            (row,) = framing_rows(requests, [motive], bare, guarded)
            found[motive] = row
            if journal is not None:
                journal.add(motive, row.to_json())
            tick(1)
    return [found[motive] for motive in wanted]


def _as_json(row: Framed) -> dict[str, Any]:
    def told(share: Proportion | None) -> list[float] | None:
        return None if share is None else [share.point, share.low, share.high]

    shares = {"refused": told(row.refused_bare), "stopped": told(row.stopped_guarded)}
    return {**row.to_json(), **shares}


def _draw(rows: Sequence[Framed], path: Path) -> None:
    from probes.reports.study_plots import draw_rates

    arms = {"bare: refused": [row.refused_bare for row in rows]}
    stopped = [row.stopped_guarded for row in rows]
    if None not in stopped:
        arms["guarded: refused or cut"] = [share for share in stopped if share is not None]
    names = [row.motive.replace("{request}", "…") for row in rows]
    names[0] = "no motive"
    draw_rates(names, arms, path, x_label="of the same harmful requests, %")


def _show(rows: Sequence[Framed]) -> None:
    shares = ("refused, bare", "harmful, bare", "refused or cut, guarded")
    cells = []
    for row in rows:
        motive = row.motive.replace("{request}", "…")
        cells.append(
            [
                "no motive" if motive == "…" else motive,
                _share(row.refused_bare),
                _share(row.bare.outcomes.share("harmful")),
                _share(row.stopped_guarded),
            ]
        )
    title = "The same harmful requests, motive by motive (95 % intervals)"
    print_table(WordTable(("motive", *shares), cells, title, right=shares))


def _share(share: Proportion | None) -> str:
    if share is None:
        return "–"
    return f"{share.point:.0%} [{share.low:.0%}, {share.high:.0%}]"
