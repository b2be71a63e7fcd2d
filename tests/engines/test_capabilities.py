import pytest
import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from safe_decode.engines.transformers.capabilities import TABLE, as_markdown, require_supported
from safe_decode.errors import UnsupportedError


@pytest.fixture(scope="module")
def model():
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    return LlamaForCausalLM(config).eval()


REFUSED_CALLS = {
    "num_beam_groups": 2,
    "diversity_penalty": 0.5,
    "constraints": [object()],
    "force_words_ids": [[1]],
    "assistant_early_exit": 2,
    "assistant_ensemble_weight": 0.5,
    "use_mtp": True,
    "cache_implementation": "paged",
    "guidance_scale": 1.5,
    "penalty_alpha": 0.6,
    "dola_layers": "high",
    "custom_generate": lambda: None,
    "compile_config": object(),
    "position_ids": torch.zeros(1, 1),
    "token_healing": True,
    "remove_invalid_values": True,
    "watermarking_config": object(),
    "encoder_repetition_penalty": 1.2,
    "synced_gpus": True,
}


@pytest.mark.parametrize("name", REFUSED_CALLS)
def test_each_refused_option_is_refused_by_name_with_a_remedy(model, name):
    instead = {row.feature: row.instead for row in TABLE}[name]
    with pytest.raises(UnsupportedError, match=name) as caught:
        require_supported(model, {name: REFUSED_CALLS[name]})
    assert instead and instead in str(caught.value)


@pytest.mark.parametrize("kind", ["paged", "sliding_window", "of_a_later_version"])
def test_caches_that_are_not_known_to_be_heard_are_refused(model, kind):
    with pytest.raises(UnsupportedError, match="cache_implementation"):
        require_supported(model, {"cache_implementation": kind})


def test_an_option_inside_a_generation_config_is_refused_as_well(model):
    with pytest.raises(UnsupportedError, match="num_beam_groups=3"):
        require_supported(model, {"generation_config": GenerationConfig(num_beam_groups=3)})


def test_an_option_in_the_models_own_configuration_is_refused_unless_overridden(model, monkeypatch):
    monkeypatch.setattr(model.generation_config, "guidance_scale", 2.0)
    with pytest.raises(UnsupportedError, match="guidance_scale=2.0"):
        require_supported(model, {})
    require_supported(model, {"guidance_scale": 1.0})
    require_supported(model, {"generation_config": GenerationConfig(guidance_scale=1.0)})


def test_unknown_options_are_refused_unless_they_have_their_default(model, monkeypatch):
    with pytest.raises(UnsupportedError, match="warp_drive=9"):
        require_supported(model, {"warp_drive": 9})
    monkeypatch.setattr(model.generation_config, "warp_drive", 9, raising=False)
    with pytest.raises(UnsupportedError, match="warp_drive=9"):
        require_supported(model, {"max_new_tokens": 4})


def test_every_key_of_the_installed_generation_config_is_in_the_table():
    public = {key for key in vars(GenerationConfig()) if not key.startswith("_")}
    assert public - {row.feature for row in TABLE} == {"transformers_version"}


def test_every_argument_of_the_installed_generate_is_in_the_table(model):
    import inspect

    arguments = set(inspect.signature(model.generate).parameters) - {"kwargs"}
    assert arguments <= {row.feature for row in TABLE}


def test_supported_calls_pass(model):
    require_supported(
        model,
        {
            "max_new_tokens": 4,
            "do_sample": True,
            "temperature": 0.7,
            "top_k": 5,
            "top_p": 0.9,
            "num_return_sequences": 2,
            "num_beams": 1,
            "repetition_penalty": 1.1,
            "stop_strings": ["x"],
            "guidance_scale": 1.0,
            "cache_implementation": "dynamic",
        },
    )


def test_training_mode_is_refused(model):
    model.train()
    try:
        with pytest.raises(UnsupportedError, match="training=True"):
            require_supported(model, {})
    finally:
        model.eval()


def test_no_feature_stands_twice_and_refusals_have_reason_and_remedy():
    features = [row.feature for row in TABLE]
    assert len(features) == len(set(features))
    for row in TABLE:
        assert row.status != "refused" or (row.reason and row.instead)


def test_the_rendered_table_names_every_feature():
    text = as_markdown()
    assert all(f"`{row.feature}`" in text for row in TABLE)
    assert {line.count("|") for line in text.splitlines()} == {6}


def test_what_needs_installed_taps_is_refused_without_them_alone(model):
    options = {"compile_config": object()}
    with pytest.raises(UnsupportedError, match=r"compile_config=.* `with decoder.installed\(\):`"):
        require_supported(model, options)
    require_supported(model, options, is_installed=True)
    with pytest.raises(UnsupportedError, match="prefill_chunk_size=4 is refused inside"):
        require_supported(model, {"prefill_chunk_size": 4}, is_installed=True)
    require_supported(model, {"prefill_chunk_size": 4})
    with pytest.raises(UnsupportedError, match="num_beam_groups=2"):
        require_supported(model, {"num_beam_groups": 2}, is_installed=True)


def test_the_rendered_table_says_what_installed_taps_change():
    lines = as_markdown().splitlines()
    assert any("`torch.compile`" in line and "| installed |" in line for line in lines)
    assert any("`prefill_chunk_size`" in line and "not installed:" in line for line in lines)
