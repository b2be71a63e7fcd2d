"""The laws of annotations: few values of any type, and Protocols that real classes fit."""

import subprocess
import sys
from pathlib import Path

import pytest

from safe_decode.testing.models import FAMILIES, MORE_FAMILIES, byte_tokenizer, tiny_model
from safe_decode.typing import CausalLM, ModelConfig, Tokenizer

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("safe_decode", "probes", "benchmarks")
MOST_EXEMPT = 27


def exempt_lines():
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
                if "noqa: ANN401" in line:
                    yield f"{path.relative_to(ROOT)}:{number}"


def members(protocol):
    own = {**vars(protocol), **protocol.__annotations__}
    return {name for name in own if not name.startswith("_")}


def test_few_parameters_are_of_any_type():
    found = list(exempt_lines())
    assert len(found) <= MOST_EXEMPT, "\n".join(found)


def test_the_protocols_are_read_without_torch():
    code = "import sys, safe_decode.typing; print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize("family", [*FAMILIES, *MORE_FAMILIES])
def test_models_of_every_family_have_what_the_protocols_name(family):
    model = tiny_model(family)
    assert {name for name in members(CausalLM) if not hasattr(model, name)} == set()
    config = model.config.get_text_config()
    assert {name for name in members(ModelConfig) if not hasattr(config, name)} == set()


def test_tokenizers_have_what_the_protocol_names():
    tokenizer = byte_tokenizer()
    wanted = members(Tokenizer)
    assert len(wanted) > 10
    assert {name for name in wanted if not hasattr(tokenizer, name)} == set()
