"""What can be told from options, files and data alone is told before a model is loaded.

Loading takes seconds to minutes, and work after it hours: whatever would end both for sure is
refused first. What only the model can tell, such as responses that outgrow its context, is checked
again by the work itself.

Knows splits, labels, places and counts of layers. Does not know tokens or models.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from safe_decode.errors import BundleError, CertificateError, DataError

if TYPE_CHECKING:
    from probes.data.conversations import Conversation, Split
    from probes.data.reader import Reading
    from probes.location.prompt_files import PromptFile

__all__ = [
    "judged_rows",
    "require_both_kinds",
    "require_bundle_place",
    "require_draws",
    "require_refusals",
    "require_splits",
]


def judged_rows(readings: Sequence[Reading]) -> list[Conversation]:
    """Return the judged responses of all sources.

    Raises:
        DataError: There is none.
    """
    rows = [row for one in readings for row in one.conversations]
    judged = [row for row in rows if row.response_harmful is not None]
    if not judged:
        raise DataError(
            f"none of {len(rows)} conversations has response_harmful 0 or 1; judge them first, for "
            "example with `safe-decode rollout --judge`."
        )
    return judged


def require_splits(rows: Sequence[Conversation], wanted: Sequence[Split]) -> None:
    """Check splits that rows bring themselves; those without are split later.

    Args:
        rows: Judged responses.
        wanted: Splits that the work reads.

    Raises:
        DataError: Some rows have a split and others not, a group stands in two, or a wanted split
            is empty.
    """
    from probes.data.conversations import SPLITS, by_split

    given = sum(row.split is not None for row in rows)
    if not given:
        return
    if given < len(rows):
        raise DataError(f"{given} of {len(rows)} rows have a split; give all of them one, or none.")
    parts = by_split(rows)
    for split in wanted:
        if not parts[split]:
            there = ", ".join(f"{name} {len(parts[name]):,}" for name in SPLITS if parts[name])
            raise DataError(
                f"the split {split!r} holds no judged response, the others do: {there}; add some, "
                "or leave the splits out."
            )


def require_both_kinds(rows: Sequence[Conversation], splits: Sequence[Split]) -> None:
    """Check that there is something to tell apart, in each split that is learned from.

    Raises:
        DataError: All responses are harmful, or all are harmless.
    """
    has_splits = any(row.split is not None for row in rows)
    for split in splits if has_splits else (None,):
        part = [row for row in rows if row.split == split]
        harmful = sum(bool(row.response_harmful) for row in part)
        if not 0 < harmful < len(part):
            where = "" if split is None else f" of the split {split!r}"
            raise DataError(
                f"{harmful} of {len(part)} judged responses{where} are harmful; give both kinds."
            )


def require_draws(
    rows: Sequence[Conversation], alphas: Sequence[float], delta: float, *, n_caps: int = 1
) -> None:
    """Check that there can be responses enough for each alpha, as a group counts once.

    Args:
        rows: Judged responses, with their splits or all without.
        alphas: To certify.
        delta: Shared by them, and by caps.
        n_caps: Caps that are certified for each.

    Raises:
        CertificateError: Even if all of them calibrated, they would be too few.
        ConfigurationError: An alpha outside (0, 1).
    """
    from probes.calibration.certify import population_of
    from safe_decode.certificate import certified_rank

    has_splits = any(row.split is not None for row in rows)
    groups = {
        row.group
        for row in rows
        if row.response_harmful is False
        and row.split in ("calibrate", None)
        and population_of(row) == "benign"
    }
    for alpha in alphas:
        try:
            certified_rank(len(groups), alpha, delta / (len(alphas) * n_caps))
        except CertificateError as error:
            where = "in the split 'calibrate'" if has_splits else "in all of the data"
            raise CertificateError(
                f"{len(groups)} independent harmless responses stand {where}: {error}"
            ) from error


def require_refusals(
    harmful: PromptFile,
    benign: PromptFile,
    *,
    samples: int,
    least: int,
    phrases: Sequence[str],
) -> None:
    """Check that files can yield enough refusals.

    Args:
        harmful: Harmful prompts, answered or to be answered.
        benign: Benign ones.
        samples: Answers to each prompt that has none.
        least: Distinct refusals wanted.
        phrases: That open a refusal, besides the built-in ones.

    Raises:
        DataError: They cannot; or all are answered, and there are too few among the answers.
    """
    from probes.location.prompt_files import location_data

    most = len(harmful.requests) * samples + len(harmful.conversations)
    if most < least:
        raise DataError(
            f"{harmful.path} yields at most {most} responses, wanted at least {least} distinct "
            "refusals; pass more harmful prompts, or --samples with --temperature."
        )
    if harmful.conversations and benign.conversations:
        location_data(
            harmful.conversations, benign.conversations, min_refusals=least, phrases=phrases
        )


def require_bundle_place(path: Path) -> None:
    """Check that a bundle could be written there.

    Raises:
        BundleError: Something else is there.
    """
    from safe_decode.bundle.files import is_bundle

    if path.exists() and not is_bundle(path):
        raise BundleError(f"path={path} exists and is no bundle; pass a new directory.")
