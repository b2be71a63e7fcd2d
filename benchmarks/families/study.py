"""The families that are put to the test, and what is found of each.

Knows where transformers lists its classes, and which cannot be built here. Does not know how a
model is made tiny, or the laws.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Literal, get_args

from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from benchmarks.families.check import Laws, rows_of
from benchmarks.families.overrides import OVERRIDES
from benchmarks.families.tiny import tiny_config, tiny_model
from safe_decode.activations.architecture import anatomy_of
from safe_decode.activations.families import why_refused
from safe_decode.errors import UnsupportedError
from safe_decode.testing.models import byte_tokenizer

__all__ = ["FAMILIES", "NOT_BUILT", "Family", "Finding", "Verdict", "examined"]

Verdict = Literal["guarded", "refused", "not built"]
"""not built: it needs a package that this project does not install."""

NOT_BUILT: Mapping[str, str] = {
    "gemma3n": "its vision tower needs the package timm; its text part is gemma3n_text",
}
"""Families that cannot be built tiny offline, and why."""

_IMAGES = (
    *("aria", "aya_vision", "cohere2_vision", "deepseek_vl", "idefics2", "idefics3", "internvl"),
    *("kimi_k25", "lfm2_vl", "llama4", "llava", "llava_next", "llava_onevision", "minimax_m3_vl"),
    *("mistral3", "mllama", "ovis2", "paligemma", "qwen2_5_vl", "qwen2_vl", "qwen3_5"),
    *("qwen3_5_moe", "qwen3_vl", "qwen3_vl_moe", "smolvlm", "t5gemma2", "video_llava", "vipllava"),
)


@dataclass(frozen=True)
class Family:
    """One class of models.

    Attributes:
        model_type: As transformers lists it.
        class_name: Of transformers.
    """

    model_type: str
    class_name: str


FAMILIES = (
    *(Family(name, str(of)) for name, of in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items()),
    *(
        Family(name, str(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES[name]))
        for name in _IMAGES
        if name in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    ),
)
"""Every class for causal language modelling, and some for images and text, read as text."""


@dataclass(frozen=True)
class Finding:
    """What was found of one family.

    Attributes:
        family: Which.
        verdict: What becomes of it.
        sites: Kinds of sites that can be read in some layer.
        rows: Which rows run in one batch; empty where it is not guarded.
        note: Why it is refused or was not built; or under which condition it is guarded.
    """

    family: Family
    verdict: Verdict
    sites: tuple[str, ...] = ()
    rows: str = ""
    note: str = ""

    @property
    def order(self) -> int:
        """Place of the verdict in the table."""
        return get_args(Verdict).index(self.verdict)

    def row(self) -> dict[str, str]:
        """Return it as a row of results."""
        return {
            "verdict": self.verdict,
            "family": self.family.model_type,
            "class": self.family.class_name,
            "sites": ", ".join(self.sites),
            "rows": self.rows,
            "note": self.note,
        }


def examined(family: Family) -> Finding:
    """Build a family tiny, guard it and check the laws.

    Raises:
        AssertionError: A law does not hold.
        Exception: What building, the model or the guard raises, but for a refusal by name.
    """
    if family.model_type in NOT_BUILT:
        return Finding(family, "not built", note=NOT_BUILT[family.model_type])
    try:
        _require_by_configuration(family, SimpleNamespace(model_type=family.model_type))
        config = tiny_config(family.model_type, family.class_name)
        _require_by_configuration(family, config)
        model = tiny_model(config, family.class_name)
        sites = Laws(model, byte_tokenizer()).check()
    except UnsupportedError as error:
        return Finding(family, "refused", note=str(error))
    needs_switch = "is_decoder" in OVERRIDES.get(config.model_type, {})
    note = "with config.is_decoder=True; an encoder, refused, without" if needs_switch else ""
    return Finding(family, "guarded", sites, rows_of(model), note)


def _require_by_configuration(family: Family, config: object) -> None:
    """Refuse what its configuration gives away, before weights are drawn."""
    if why_refused(config) is not None:
        named: Any = type(family.class_name, (SimpleNamespace,), {})
        anatomy_of(named(config=config))
