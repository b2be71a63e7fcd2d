"""Fitters are found by the kind of their settings, and say early what they cannot do."""

from dataclasses import dataclass
from typing import ClassVar

import pytest

from probes.fitting.interface import FitSettings, Fitter
from probes.fitting.linear import FitConfig, LinearProbeFitter
from probes.fitting.registry import (
    FITTERS,
    fitter_class,
    fitter_for,
    require_abilities,
    settings_from,
    settings_record,
)
from probes.fitting.search import FeatureStore, fits_of
from probes.recipes.bundle import make_bundle
from safe_decode.errors import ConfigurationError
from safe_decode.probe.registry import KINDS
from tests.probes.recipes.test_bundle import CONFIG


@dataclass(frozen=True, kw_only=True)
class PlainSettings(FitSettings):
    kind: ClassVar[str] = "plain"


class PlainFitter(Fitter):
    """A fitter that does nothing beyond what a fitter must."""

    abilities = frozenset()

    def __init__(self, config=None):
        self.config = config or PlainSettings()


@pytest.fixture
def plain(monkeypatch):
    monkeypatch.setattr(
        "probes.fitting.registry.FITTERS", {**FITTERS, "plain": f"{__name__}:PlainFitter"}
    )
    return PlainSettings()


def test_every_kind_of_probe_has_a_fitter_whose_settings_name_it():
    assert set(FITTERS) == set(KINDS)
    for kind in FITTERS:
        assert fitter_class(kind)().config.kind == kind
        assert {way.kind for way in fits_of(None, None, kind)} == {kind}


def test_a_fitter_is_found_by_its_settings():
    fitter = fitter_for(FitConfig(c=3.0))
    assert isinstance(fitter, LinearProbeFitter) and fitter.config.c == 3.0
    with pytest.raises(ConfigurationError, match=r"probe='cubic' .* pass one of \['linear'"):
        fits_of(None, None, "cubic")


def test_settings_come_back_from_a_bundle_s_provenance():
    config = FitConfig(method="windowed", c=0.3, window=4, before_onset="exclude")
    record = settings_record(config)
    assert record["probe"] == "linear"
    assert settings_from(record) == config
    before = {name: value for name, value in record.items() if name != "probe"}
    assert settings_from({**before, "unheard_of": 1}) == config


def test_linear_ways_of_fitting_are_named():
    assert [way.label for way in fits_of(("token", "windowed"), 0.5, "linear")] == [
        "token C=0.5",
        *(f"windowed C=0.5 M={window}" for window in (1, 4, 8, 16)),
    ]
    with pytest.raises(ConfigurationError, match="method='magic' is not one of"):
        fits_of(("magic",), None, "linear")


@pytest.mark.parametrize("ability", ["streamed", "penalty", "heads"])
def test_what_a_kind_cannot_do_is_refused_with_the_kinds_that_can(plain, ability):
    with pytest.raises(ConfigurationError, match=r"'plain' do not support .* probe of \['linear'"):
        require_abilities((FitConfig(), plain), (ability,))
    require_abilities((FitConfig(),), (ability,))


def test_a_recipe_refuses_before_it_runs_the_model(plain, llama, tokenizer):
    from dataclasses import replace

    config = replace(CONFIG, fits=(plain,))
    with pytest.raises(ConfigurationError, match="'plain' do not support fitting without stored"):
        make_bundle(llama, tokenizer, (), config, features=FeatureStore(recompute=True))
    with pytest.raises(ConfigurationError, match="'plain' do not support heads by category"):
        make_bundle(llama, tokenizer, (), replace(config, by_category=True))


def test_methods_that_a_fitter_does_not_write_refuse_by_name(plain):
    with pytest.raises(ConfigurationError, match="'plain' do not support 'streamed'"):
        fitter_for(plain).fit_streamed(iter, (), (), (), ())
    with pytest.raises(ConfigurationError, match="'plain' do not support 'heads'"):
        fitter_for(plain).joined((), {})
