"""A probe on real text, beside words alone.

Run: `python -m benchmarks.detection.reference MODEL TRAIN DEV`.

Both arms are fitted on TRAIN only and see the same first 32, 64 or 128 tokens of a response:
the probe the mean activation over the positions that judge them, TF-IDF their text (and, in a
second control, the prompt's too). Both get an offset for each source while they are fitted,
so that neither spends itself on telling sources apart; sites and penalties are chosen by
groups of TRAIN left out. Figures are AUROC within each source of DEV that holds both labels,
averaged over sources, and the share of pairs (two answers to one prompt, one of them harmful)
that are put in order. Differences have paired intervals from a bootstrap over prompts.

Every look at DEV is counted beside the results and printed: many looks are tuning.
These are teacher-forced figures on the text of others. They carry no certificate.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.card import RESULTS, card, write_results
from benchmarks.detection.paired import (
    SourcedRows,
    bootstrap,
    compared,
    pair_accuracy,
    pairs_of,
    source_auroc,
    two_class_sources,
    within_source,
)
from benchmarks.detection.reference_arms import (
    PREFIXES,
    Arms,
    chosen_on_train,
    pooled_features,
    scored,
)
from probes.activations.teacher_forcing import encode_response
from probes.data.conversations import Conversation
from probes.data.near_duplicates import merge_near_duplicates
from probes.data.reader import read_conversations
from safe_decode.loading import Loaded, load_model
from safe_decode.whole_files import write_whole

LOG = logging.getLogger("benchmarks.detection.reference")
COLUMNS = (
    "prompt=prompt,response=response,response_harmful=response_harmful,"
    "prompt_harmful=prompt_harmful,refusal=refusal,meta.source=source"
)
_LEAST_PAIRS = 20


def read_rows(
    path: str, loaded: Loaded, *, limit: int | None, columns: str, seed: int = 0
) -> SourcedRows:
    """Read judged rows whose prompt leaves room; a limit keeps a seeded sample of prompts."""
    found = [
        row
        for row in read_conversations(path, columns=columns, strict=True).conversations
        if row.response_harmful is not None and _has_room(loaded, row)
    ]
    if limit is not None and len(found) > limit:
        order = sorted(
            found, key=lambda row: hashlib.sha256(f"{seed}{row.group}".encode()).digest()
        )
        found = order[:limit]
    merged = merge_near_duplicates(found).conversations
    return SourcedRows(
        found,
        np.asarray([row.response_harmful is True for row in found]),
        np.asarray([str(row.meta["source"]) for row in found]),
        np.asarray([row.group for row in merged]),
        np.asarray([row.group for row in found]),
    )


def _has_room(loaded: Loaded, row: Conversation) -> bool:
    limit = getattr(loaded.model.config, "max_position_embeddings", None)
    if not isinstance(limit, int):
        return True
    whole = encode_response(loaded.tokenizer, row)
    return min(len(whole.ids), whole.turn_start + max(PREFIXES)) <= limit


def macro_rows(
    dev: SourcedRows, arms: Arms, prefix: int, *, draws: int
) -> Iterator[dict[str, Any]]:
    """Compare macro within-source AUROC of the probe with each control."""
    sources = two_class_sources(dev)
    samples = list(bootstrap(dev, sources, draws=draws))

    def macro(scores: NDArray[np.float64], at: NDArray[np.intp]) -> float:
        return float(
            np.nanmean([source_auroc(scores, dev, at[dev.sources[at] == name]) for name in sources])
        )

    for control in ("tfidf_response", "tfidf_prompt_response"):
        other = getattr(arms, control)
        differences = [macro(arms.probe, at) - macro(other, at) for at in samples]
        probe, theirs = (within_source(s, dev, sources) for s in (arms.probe, other))
        yield compared(
            f"macro within-source AUROC, first {prefix} tokens",
            control,
            probe,
            theirs,
            differences,
            {
                name: round(source_auroc(arms.probe, dev, dev.sources == name), 3)
                for name in sources
            },
        )


def pair_rows(dev: SourcedRows, arms: Arms, prefix: int, *, draws: int) -> Iterator[dict[str, Any]]:
    """Compare within-prompt pair accuracy, source by source that has pairs."""
    pairs = pairs_of(dev)
    for source in two_class_sources(dev):
        own = [pair for pair in pairs if dev.sources[pair[0]] == source == dev.sources[pair[1]]]
        if len(own) < _LEAST_PAIRS:
            continue
        clusters: dict[str, list[tuple[int, int]]] = {}
        for pair in own:
            clusters.setdefault(str(dev.groups[pair[0]]), []).append(pair)
        members = list(clusters.values())
        rng = np.random.default_rng(0)
        for control in ("tfidf_response", "tfidf_prompt_response"):
            other = getattr(arms, control)
            differences = []
            for _ in range(draws):
                chosen = rng.integers(0, len(members), size=len(members))
                drawn = [pair for i in chosen for pair in members[i]]
                differences.append(pair_accuracy(arms.probe, drawn) - pair_accuracy(other, drawn))
            yield compared(
                f"pair accuracy, {source} ({len(own)} pairs), first {prefix} tokens",
                control,
                pair_accuracy(arms.probe, own),
                pair_accuracy(other, own),
                differences,
                None,
            )


def count_look(dev: str) -> int:
    """Count one more look at a file, beside the results, and return how many there were."""
    path = RESULTS / "reference_looks.json"
    digest = hashlib.sha256(Path(dev).read_bytes()).hexdigest()[:12]
    looks = json.loads(path.read_text("utf-8")) if path.exists() else {}
    looks[digest] = looks.get(digest, 0) + 1
    write_whole(path, json.dumps(looks, indent=1, sort_keys=True) + "\n")
    return int(looks[digest])


def main(argv: Sequence[str] | None = None) -> None:
    """Fit on train, look at dev once, write `results/reference.jsonl`, print the rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("train")
    parser.add_argument("dev")
    parser.add_argument("--columns", default=COLUMNS)
    parser.add_argument("--limit", type=int, default=None, help="rows of train, for a quick try")
    parser.add_argument("--folds", type=int, default=3)
    parser.add_argument("--draws", type=int, default=1000)
    parser.add_argument("--tokens-per-batch", type=int, default=4096)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--name", default="reference")
    arguments = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    loaded = load_model(arguments.model, device=arguments.device, dtype="float32")
    train = read_rows(arguments.train, loaded, limit=arguments.limit, columns=arguments.columns)
    size = arguments.tokens_per_batch
    pooled = pooled_features(loaded, train.rows, tokens_per_batch=size)
    chosen = chosen_on_train(loaded, train, pooled, arguments.folds)
    LOG.info("chosen on train: %s", json.dumps(chosen._asdict()))
    looks = count_look(arguments.dev)
    LOG.info("look %d at %s", looks, Path(arguments.dev).name)
    dev = read_rows(arguments.dev, loaded, limit=None, columns=arguments.columns)
    pooled_dev = pooled_features(loaded, dev.rows, tokens_per_batch=size)
    facts = card(
        looks_at_dev=looks,
        chosen_on_train=chosen._asdict(),
        train_rows=len(train.rows),
        dev_rows=len(dev.rows),
        threads=torch.get_num_threads(),
    )
    rows: list[dict[str, Any]] = []
    for prefix in PREFIXES:
        arms = scored(loaded, train, dev, pooled, pooled_dev, chosen, prefix)
        found = [*macro_rows(dev, arms, prefix, draws=arguments.draws)]
        found += pair_rows(dev, arms, prefix, draws=arguments.draws)
        for row in found:
            LOG.info("%s", json.dumps(row))
        rows += found
        write_results(arguments.name, rows, facts)


if __name__ == "__main__":
    main()
