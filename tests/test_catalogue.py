"""Names of the catalogue stand for a model and its bundle; a file of one's own may replace it."""

from __future__ import annotations

import fsspec
import pytest

from safe_decode.catalogue import cache_folder, catalogue, fetched_model, model_folder
from safe_decode.checkpoint import look_at
from safe_decode.errors import ConfigurationError
from safe_decode.testing.models import byte_tokenizer, tiny_model

OWN = """
["some-model"]
about = "a model"
licence = "Apache-2.0"
bundle = "guards/some"

["some-model".model]
hub = "some/model"
file = "model.gguf"
sha256 = "ab"

["a-bundle"]
about = "a bundle"
licence = "Apache-2.0"
bundle = "s3://guards/other"
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    monkeypatch.setenv("SAFE_DECODE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("SAFE_DECODE_CATALOGUE", str(tmp_path / "catalogue.toml"))
    (tmp_path / "catalogue.toml").write_text(OWN)
    return tmp_path


def test_the_shipped_catalogue_names_sources_with_sums():
    known = catalogue()
    assert "qwen2.5-coder-0.5b-instruct" in known
    for name, entry in known.items():
        assert entry.name == name
        assert entry.model is None or len(entry.model.sha256) == 64


def test_a_bundle_lies_beside_the_catalogue_or_under_an_address(own):
    known = catalogue()
    assert known["some-model"].bundle == f"{own}/guards/some"
    assert known["a-bundle"].bundle == "s3://guards/other"


def test_a_catalogue_is_read_from_an_address(monkeypatch):
    with fsspec.open("memory://shelf/catalogue.toml", "w") as file:
        file.write(OWN)
    monkeypatch.setenv("SAFE_DECODE_CATALOGUE", "memory://shelf/catalogue.toml")
    assert catalogue()["some-model"].bundle == "memory://shelf/guards/some"


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("not toml =", "cannot be read"),
        ('["m"]\nabout = "x"\nlicence = "y"\n', "'m': .*bundle"),
        ('["m"]\nabout = 3\nlicence = "y"\nbundle = "z"\n', "'m': .*about"),
        ('["m"]\nabout = "x"\nlicence = "y"\nbundle = "z"\nsize = 3\n', "'m': .*size"),
        ("m = 3\n", "'m'"),
    ],
)
def test_a_catalogue_that_is_wrong_is_named_with_the_field(tmp_path, monkeypatch, content, named):
    path = tmp_path / "wrong.toml"
    path.write_text(content)
    monkeypatch.setenv("SAFE_DECODE_CATALOGUE", str(path))
    with pytest.raises(ConfigurationError, match=f"wrong.toml.*{named}"):
        catalogue()


@pytest.mark.usefixtures("own")
def test_a_name_is_refused_until_its_model_is_there_and_then_loads():
    with pytest.raises(ConfigurationError, match="safe-decode fetch some-model"):
        look_at("some-model")
    folder = model_folder(catalogue()["some-model"])
    assert folder.is_relative_to(cache_folder())
    tiny_model("llama").save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    assert look_at("some-model").model == str(folder)


@pytest.mark.usefixtures("own")
def test_other_names_are_left_to_transformers():
    assert fetched_model("org/some-model") is None
    assert look_at("gpt2").model == "gpt2"
    with pytest.raises(ConfigurationError, match="a bundle alone"):
        fetched_model("a-bundle")


def test_the_cache_follows_the_users_own(monkeypatch, tmp_path):
    monkeypatch.delenv("SAFE_DECODE_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "safe-decode"
