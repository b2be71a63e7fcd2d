"""Every family of transformers keeps the laws, or is refused by name, as the table says."""

from __future__ import annotations

from typing import get_args

import pytest
from transformers import BertConfig, BertLMHeadModel

from benchmarks.card import RESULTS
from benchmarks.families.check import Laws
from benchmarks.families.study import FAMILIES, NOT_BUILT, Family, Verdict, examined
from benchmarks.families.tiny import tiny_config, tiny_model
from safe_decode.activations.architecture import anatomy_of
from safe_decode.activations.families import REFUSED, ROWS_ALONE, UNPADDED
from safe_decode.bench.machine import read_lines
from safe_decode.errors import UnsupportedError
from safe_decode.testing.models import byte_tokenizer

ROWS, CARD = read_lines(RESULTS / "families.jsonl")
TABLE = {(row["family"], row["class"]): row for row in ROWS}

# One of each kind of mixer, of experts and of names; the whole table is in the slow test.
A_CUT = frozenset(
    {
        *("bert", "bloom", "deepseek_v2", "deepseek_v4", "dbrx", "falcon_h1", "gemma3n_text"),
        *("gemma4_text", "gpt_oss", "jamba", "lfm2", "longcat_flash", "mamba", "mamba2"),
        *("minimax", "modernbert-decoder", "nemotron_h", "openai-gpt", "qwen3_next", "rwkv"),
        *("recurrent_gemma", "whisper", "xlstm", "zamba2", "gemma3", "llava", "mistral3"),
        *("qwen2_5_vl", "qwen3_vl"),
    }
)


def is_quick(family: Family) -> bool:
    """What is refused is not built, so it costs nothing."""
    return family.model_type in A_CUT or TABLE[key(family)]["verdict"] != "guarded"


def key(family: Family) -> tuple[str, str]:
    return family.model_type, family.class_name


def check(family: Family) -> None:
    found = examined(family).row()
    assert found == TABLE[key(family)], "run `python -m benchmarks.families` if this is meant"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", [f for f in FAMILIES if is_quick(f)], ids=lambda f: f.model_type)
def test_a_family_keeps_the_laws_or_is_refused_as_the_table_says(family):
    check(family)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "family", [f for f in FAMILIES if not is_quick(f)], ids=lambda f: f.model_type
)
def test_every_other_family_keeps_the_laws(family):
    check(family)


def test_the_table_holds_every_class_for_causal_language_modelling():
    assert set(TABLE) == {key(family) for family in FAMILIES}
    assert len(TABLE) == len(ROWS) > 190
    assert {row["verdict"] for row in ROWS} == set(get_args(Verdict))


def test_most_families_are_guarded_and_few_cannot_be_built():
    verdicts = [row["verdict"] for row in ROWS]
    assert verdicts.count("guarded") > 170
    assert {row["family"] for row in ROWS if row["verdict"] == "not built"} == set(NOT_BUILT)


def test_what_is_refused_says_the_reason_that_the_code_has():
    for row in ROWS:
        if row["family"] in REFUSED:
            assert row["verdict"] == "refused" and REFUSED[row["family"]] in row["note"]
        elif row["verdict"] == "refused":
            assert "is an encoder-decoder" in row["note"]
    assert {row["family"] for row in ROWS if row["rows"] == "one at a time"} == set(ROWS_ALONE)
    told = {row["family"] for row in ROWS if row["rows"] == "of one length"}
    assert told == set(UNPADDED)


def test_an_encoder_is_refused_unless_it_is_a_decoder():
    encoder = BertLMHeadModel(BertConfig(num_hidden_layers=1, hidden_size=8, num_attention_heads=2))
    with pytest.raises(UnsupportedError, match="BertLMHeadModel is an encoder: its positions read"):
        anatomy_of(encoder)


def test_a_law_that_does_not_hold_is_noticed(monkeypatch):
    model = tiny_model(tiny_config("llama", "LlamaForCausalLM"), "LlamaForCausalLM")
    laws = Laws(model, byte_tokenizer())
    assert laws.check() == ("resid", "attn", "mlp")
    own = type(laws)._bare
    monkeypatch.setattr(Laws, "_bare", lambda *args, **how: own(*args, **how) + 1)
    with pytest.raises(AssertionError, match="not the bare model's"):
        laws.check()
