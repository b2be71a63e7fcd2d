"""Bundles load by directory, by address and by name."""

from __future__ import annotations

import fsspec
import pytest

from safe_decode import load_bundle
from safe_decode.errors import BundleCorruptError, BundleError
from safe_decode.fetching import bundle_places
from tests.bundles import random_bundle


@pytest.fixture
def saved(llama, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setenv("SAFE_DECODE_CACHE", str(tmp_path / "cache"))
    bundle = random_bundle(llama, tokenizer)
    bundle.save(tmp_path / "guard")
    upload(tmp_path / "guard")
    yield tmp_path, bundle
    fsspec.filesystem("memory").rm("/guards", recursive=True)


def upload(folder):
    for file in folder.iterdir():
        fsspec.filesystem("memory").pipe(f"/guards/guard/{file.name}", file.read_bytes())


def test_a_bundle_loads_from_its_directory_and_from_addresses(saved):
    folder, bundle = saved
    for name in (folder / "guard", str(folder / "guard"), f"file://{folder}/guard"):
        assert load_bundle(name).digest == bundle.digest
    assert load_bundle("memory://guards/guard").digest == bundle.digest


def test_what_an_address_holds_is_fetched_anew(saved, llama, tokenizer):
    folder, bundle = saved
    assert load_bundle("memory://guards/guard").digest == bundle.digest
    other = random_bundle(llama, tokenizer, holdback_tokens=2)
    other.save(folder / "other")
    upload(folder / "other")
    assert load_bundle("memory://guards/guard").digest == other.digest
    # Both stay, so that nobody who is reading the first one loses it.
    assert len(list((folder / "cache" / "bundles").iterdir())) == 2
    assert bundle_places.bundle_folder("memory://guards/guard").is_dir()
    assert len(list((folder / "cache" / "bundles").iterdir())) == 2


def test_a_name_of_the_catalogue_is_a_bundle(saved, monkeypatch):
    folder, bundle = saved
    (folder / "own.toml").write_text(
        '[near]\nabout = "x"\nlicence = "y"\nbundle = "guard"\n'
        '[far]\nabout = "x"\nlicence = "y"\nbundle = "memory://guards/guard"\n'
    )
    monkeypatch.setenv("SAFE_DECODE_CATALOGUE", str(folder / "own.toml"))
    assert load_bundle("near").digest == load_bundle("far").digest == bundle.digest


def test_a_directory_comes_before_a_name(saved, monkeypatch):
    folder, bundle = saved
    monkeypatch.chdir(folder)
    (folder / "own.toml").write_text('[guard]\nabout = "x"\nlicence = "y"\nbundle = "nowhere"\n')
    monkeypatch.setenv("SAFE_DECODE_CATALOGUE", str(folder / "own.toml"))
    assert load_bundle("guard").digest == bundle.digest


@pytest.mark.usefixtures("saved")
@pytest.mark.parametrize("name", ["memory://nothing/here", "nosuchstore://x/y", "no-such-name"])
def test_what_is_not_there_is_named(name):
    with pytest.raises(BundleError, match=name):
        load_bundle(name)


@pytest.mark.usefixtures("saved")
def test_what_is_fetched_is_checked_like_any_bundle(monkeypatch):
    fsspec.filesystem("memory").pipe("/guards/guard/card.json", b"{}")
    with pytest.raises(BundleCorruptError):
        load_bundle("memory://guards/guard")
    monkeypatch.setattr(bundle_places, "_LARGEST", 10)
    with pytest.raises(BundleError, match="at most 10"):
        load_bundle("memory://guards/guard")
