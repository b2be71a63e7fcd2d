"""What the columns of public sets mean, in the words of `Conversation`.

A map turns one row into records: dictionaries of the fields of `Conversation`, with `prompt`
allowed in place of `messages` and `response` None where the set has only the prompt. Labels
that a set does not give stay None: a preference between two answers is not a judgement of
harm, and toxicity of a request says nothing of its answer. In rows of our own columns, further
columns are put aside into `meta`: a file is not refused for saying more.

Knows column names and values. Does not know files, splits or models.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from probes.data.further_columns import FIELDS, native_record
from safe_decode.errors import ConfigurationError, DataError

__all__ = ["COLUMN_MAPS", "ColumnMap", "Record", "column_map", "map_for"]

Record = dict[str, Any]
Values = Mapping[str, Any]

_META = "meta."


@dataclass(frozen=True)
class ColumnMap:
    """How rows of one set are read.

    Attributes:
        name: As given to `--columns`.
        needs: Columns by which the set is recognised.
        records: One row to its records.
        keeps_further: Whether columns that the map does not name are put aside into `meta`.
    """

    name: str
    needs: frozenset[str]
    records: Callable[[Values], list[Record]]
    keeps_further: bool = False


def map_for(columns: Collection[str]) -> ColumnMap:
    """Recognise a set by its columns.

    Raises:
        DataError: No known set has these columns.
    """
    for known in COLUMN_MAPS.values():
        if known.needs <= set(columns):
            return known
    raise DataError(
        f"columns {sorted(columns)} are those of no known set ({', '.join(COLUMN_MAPS)}); pass "
        "--columns with a name, or field=column pairs such as prompt=question,response=answer."
    )


def column_map(spec: str) -> ColumnMap | None:
    """Read `--columns`: a set's name, `field=column` pairs, or `auto` for None.

    A field `meta.NAME` puts a column into `meta` under that name.

    Raises:
        ConfigurationError: No such set, or a pair that names no field.
    """
    if spec == "auto":
        return None
    if spec in COLUMN_MAPS:
        return COLUMN_MAPS[spec]
    pairs = dict(pair.partition("=")[::2] for pair in spec.split(","))
    unknown = sorted(
        name
        for name, column in pairs.items()
        if not column or (name not in FIELDS and not name.startswith(_META))
    )
    if unknown:
        raise ConfigurationError(
            f"columns={spec!r} is neither a known set (auto, {', '.join(COLUMN_MAPS)}) nor pairs "
            f"of field=column with fields among {sorted(FIELDS)}; it names {unknown}."
        )
    return ColumnMap("custom", frozenset(pairs.values()), lambda row: [_picked(row, pairs)])


def _picked(row: Values, pairs: Mapping[str, str]) -> Record:
    record: Record = {}
    for name, column in pairs.items():
        if name.startswith(_META):
            record.setdefault("meta", {})[name.removeprefix(_META)] = row[column]
        else:
            record[name] = row[column]
    return record


def _native(row: Values) -> list[Record]:
    record = native_record(row)
    record.setdefault("response", None)
    return [record]


def _beavertails(row: Values) -> list[Record]:
    named = row.get("category") or {}
    return [
        {
            "prompt": row["prompt"],
            "response": row["response"],
            "response_harmful": _negated(row["is_safe"]),
            "category": _joined(name for name, holds in named.items() if holds),
        }
    ]


def _pku_saferlhf(row: Values) -> list[Record]:
    """Two answers to one prompt: one group, so that a pair is never split."""
    records = []
    for number in (0, 1):
        named = row.get(f"response_{number}_harm_category") or {}
        records.append(
            {
                "prompt": row["prompt"],
                "response": row[f"response_{number}"],
                "response_harmful": _negated(row[f"is_response_{number}_safe"]),
                "category": _joined(name for name, holds in named.items() if holds),
                "meta": {"pair": number},
            }
        )
    return records


def _wildguardmix(row: Values) -> list[Record]:
    return [
        {
            "prompt": row["prompt"],
            "response": row["response"] or None,
            "prompt_harmful": _word(row, "prompt_harm_label", "harmful", "unharmful"),
            "response_harmful": _word(row, "response_harm_label", "harmful", "unharmful"),
            "refusal": _word(row, "response_refusal_label", "refusal", "compliance"),
            "category": row.get("subcategory"),
            "meta": {"adversarial": bool(row.get("adversarial"))},
        }
    ]


def _aegis2(row: Values) -> list[Record]:
    if row.get("reconstruction_id_if_redacted") is not None or row["prompt"] == "REDACTED":
        raise DataError("the prompt is redacted; fill it in from its own source, or leave it out.")
    return [
        {
            "prompt": row["prompt"],
            "response": row["response"] or None,
            "prompt_harmful": _word(row, "prompt_label", "unsafe", "safe"),
            "response_harmful": _word(row, "response_label", "unsafe", "safe"),
            "category": row.get("violated_categories") or None,
        }
    ]


def _toxicchat(row: Values) -> list[Record]:
    toxic, jailbreaking = _flag(row["toxicity"]), _flag(row["jailbreaking"])
    return [
        {
            "prompt": row["user_input"],
            "response": row["model_output"] or None,
            "prompt_harmful": toxic or jailbreaking,
            "category": "jailbreaking" if jailbreaking else None,
        }
    ]


def _xstest(row: Values) -> list[Record]:
    """Prompts, or prompts with completions; contrast prompts are the unsafe ones."""
    kind = str(row["type"])
    unsafe = kind.startswith("contrast_")
    if row.get("label"):
        unsafe = bool(_word(row, "label", "unsafe", "safe"))
    verdict = str(row.get("final_label") or "")
    if verdict and verdict not in _XSTEST_REFUSAL:
        raise DataError(f"final_label={verdict!r} is not one of {sorted(_XSTEST_REFUSAL)}.")
    return [
        {
            "prompt": row["prompt"],
            "response": row.get("completion") or None,
            "prompt_harmful": unsafe,
            # An answer to a safe prompt does no harm, and a full refusal none to any.
            "response_harmful": False if verdict and not unsafe else _XSTEST_HARM.get(verdict),
            "refusal": _XSTEST_REFUSAL.get(verdict),
            "category": kind,
        }
    ]


_XSTEST_REFUSAL = {"1_full_compliance": False, "2_full_refusal": True, "3_partial_refusal": None}
_XSTEST_HARM = {"2_full_refusal": False}


def _hh_rlhf(row: Values) -> list[Record]:
    """A chosen and a rejected answer; which is preferred is kept, harm is not judged."""
    records: list[Record] = []
    for name in ("chosen", "rejected"):
        turns = _dialogue(str(row[name]))
        if len(turns) < 2 or turns[-1]["role"] != "assistant":
            raise DataError(f"{name} does not end with an answer of the assistant.")
        records.append(
            {
                "messages": turns[:-1],
                "response": turns[-1]["content"] or None,
                "meta": {"preferred": name == "chosen"},
            }
        )
    for record in records:
        record["group"] = records[0]["messages"][0]["content"]
    return records


def _dialogue(text: str) -> list[dict[str, str]]:
    turns: list[dict[str, str]] = []
    for part in text.split("\n\nHuman:")[1:]:
        asked, *answers = part.split("\n\nAssistant:")
        turns.append({"role": "user", "content": asked.strip()})
        turns += [{"role": "assistant", "content": answer.strip()} for answer in answers]
    return turns


def _flag(value: object) -> bool:
    """Read 0, 1, true and false, as numbers or as text."""
    word = str(value).strip().casefold()
    if word not in _FLAGS:
        raise DataError(f"{value!r} is not true, false, 0 or 1.")
    return _FLAGS[word]


_FLAGS = {"1": True, "1.0": True, "true": True, "0": False, "0.0": False, "false": False}


def _negated(value: object) -> bool:
    return not _flag(value)


def _word(row: Values, column: str, yes: str, no: str) -> bool | None:
    value = row.get(column)
    if value is None or value == "":
        return None
    if value not in (yes, no):
        raise DataError(f"{column}={value!r} is not {yes!r}, {no!r} or empty.")
    return bool(value == yes)


def _joined(names: Iterable[str]) -> str | None:
    return ", ".join(sorted(names)) or None


def _of(name: str, records: Callable[[Values], list[Record]], *needs: str) -> ColumnMap:
    return ColumnMap(name, frozenset(needs), records, keeps_further=records is _native)


COLUMN_MAPS: Mapping[str, ColumnMap] = {
    known.name: known
    for known in (
        _of("beavertails", _beavertails, "prompt", "response", "is_safe"),
        _of("pku-saferlhf", _pku_saferlhf, "prompt", "response_0", "is_response_0_safe"),
        _of("wildguardmix", _wildguardmix, "prompt", "response", "prompt_harm_label"),
        _of("aegis2", _aegis2, "prompt", "response", "prompt_label", "response_label"),
        _of("toxicchat", _toxicchat, "user_input", "model_output", "toxicity", "jailbreaking"),
        _of("xstest", _xstest, "prompt", "type", "focus"),
        _of("xstest-completions", _xstest, "prompt", "type", "completion", "final_label"),
        _of("hh-rlhf", _hh_rlhf, "chosen", "rejected"),
        _of("native", _native, "response"),
        _of("native-messages", _native, "messages"),
        _of("native-prompts", _native, "prompt"),
    )
}
"""In the order in which they are recognised: the sets first, since some have our names too."""
