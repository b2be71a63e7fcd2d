"""A model's sizes and template are read from its small files, in a moment, before its weights."""

import pytest
import transformers

from safe_decode.cli.loading import decoder_of
from safe_decode.demo.embedded_pair import artefact
from safe_decode.errors import ConfigurationError, FingerprintMismatchError
from safe_decode.loading import LoadSettings, ModelSizes, sizes_of
from safe_decode.testing.models import byte_tokenizer, tiny_model


@pytest.fixture
def saved(tmp_path):
    def save(family="llama", *, template=True):
        tiny_model(family).save_pretrained(tmp_path / family)
        tokenizer = byte_tokenizer()
        if not template:
            tokenizer.chat_template = None
        tokenizer.save_pretrained(tmp_path / family)
        return tmp_path / family

    return save


@pytest.fixture
def no_config(monkeypatch):
    def fail(*_, **__):
        pytest.fail("transformers was asked")

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", fail)
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", fail)


@pytest.mark.usefixtures("no_config")
def test_a_plain_configuration_is_read_without_transformers(saved):
    assert sizes_of(saved(), needs_template=True) == ModelSizes(32, 3, 256)


def test_other_words_for_sizes_are_left_to_transformers(saved):
    config = tiny_model("gpt2").config
    assert sizes_of(saved("gpt2")) == ModelSizes(config.n_embd, config.n_layer, config.n_positions)


@pytest.mark.usefixtures("no_config")
def test_a_missing_template_is_told_only_where_one_is_needed(saved):
    place = saved(template=False)
    assert sizes_of(place).layers == 3
    with pytest.raises(ConfigurationError, match="has no chat template"):
        sizes_of(place, needs_template=True)


@pytest.mark.usefixtures("no_config")
def test_a_bundle_of_a_model_of_another_size_is_refused_before_the_weights(saved):
    with pytest.raises(FingerprintMismatchError, match="hidden_size is 32, wanted 192"):
        decoder_of(
            str(saved()), artefact("bundle"), redirect="refuse", alpha=None, how=LoadSettings()
        )
