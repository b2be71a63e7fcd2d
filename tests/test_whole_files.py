"""A file is written whole or not at all, and what somebody else wrote stays."""

import ast
import os
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from probes.activations.harvest import harvest_to
from probes.data.conversations import Conversation, read_jsonl, write_jsonl
from probes.organism.curriculum import _Curve, _remove, _save
from probes.rollouts.generate import RolloutConfig
from probes.rollouts.resume import rollout_to
from probes.rollouts.types import Request
from safe_decode.activations.site import Site
from safe_decode.bench.machine import write_lines
from safe_decode.bundle.bundle import ProbeBundle
from safe_decode.bundle.files import CALIBRATION, CARD, PROBE
from safe_decode.cli.console import write_text
from safe_decode.cli.main import app
from safe_decode.errors import BundleCorruptError, BundleError, ConfigurationError, DataError
from safe_decode.testing.models import byte_tokenizer, tiny_model
from safe_decode.whole_files import replace_files, whole_file, write_whole
from tests.bundles import random_bundle

ROOT = Path(__file__).resolve().parent.parent
OURS = sorted([CALIBRATION, CARD, PROBE])


@pytest.fixture(scope="module")
def bundle():
    return random_bundle(tiny_model(), byte_tokenizer())


def listed(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def broken_disk(monkeypatch, *, at):
    """Let the replacement of one file fail, once."""
    original, failed = Path.replace, []

    def refuse(self, target):
        if Path(target).name == at and not failed:
            failed.append(target)
            raise OSError(28, "disk full")
        return original(self, target)

    monkeypatch.setattr(Path, "replace", refuse)


def test_saving_a_bundle_leaves_every_other_file(bundle, tmp_path):
    place = tmp_path / "bundle"
    bundle.save(place)
    (place / "thesis.txt").write_text("three years of work")
    (place / "notes").mkdir()
    (place / "notes" / "a.md").write_text("mine")
    replace(bundle, refusal="No.").save(place)
    assert ProbeBundle.load(place).refusal == "No."
    assert (place / "thesis.txt").read_text() == "three years of work"
    assert listed(place) == sorted([*OURS, "notes", "notes/a.md", "thesis.txt"])


@pytest.mark.parametrize("content", ['{"name": "a card of mine"}', "[1]", "", "{"])
def test_a_card_that_we_did_not_write_is_not_replaced(bundle, tmp_path, content):
    place = tmp_path / "pack"
    place.mkdir()
    (place / CARD).write_text(content)
    (place / PROBE).write_bytes(b"weights of mine")
    with pytest.raises(BundleError, match="exists and is no bundle"):
        bundle.save(place)
    assert (place / CARD).read_text() == content
    assert (place / PROBE).read_bytes() == b"weights of mine"


@pytest.mark.parametrize("at", [PROBE, CALIBRATION, CARD])
def test_a_save_that_fails_midway_leaves_the_old_bundle(bundle, tmp_path, monkeypatch, at):
    place = tmp_path / "bundle"
    bundle.save(place)
    other = replace(bundle, refusal="No.", certificates=bundle.certificates[:2])
    broken_disk(monkeypatch, at=at)
    with pytest.raises(BundleError, match="cannot be written: .*disk full"):
        other.save(place)
    assert ProbeBundle.load(place).digest == bundle.digest
    assert listed(place) == OURS


def test_a_reader_between_two_replacements_sees_no_mixture(bundle, tmp_path, monkeypatch):
    place = tmp_path / "bundle"
    bundle.save(place)
    other = replace(bundle, certificates=bundle.certificates[:2])
    original, seen = Path.replace, []

    def reading(self, target):
        found = original(self, target)
        if Path(target).parent == place:
            try:
                seen.append(ProbeBundle.load(place).digest)
            except BundleCorruptError as error:
                assert "from another bundle" in str(error)
                seen.append(None)
        return found

    monkeypatch.setattr(Path, "replace", reading)
    other.save(place)
    assert set(seen) <= {bundle.digest, other.digest, None} and seen[-1] == other.digest


def test_a_file_is_whole_or_as_it_was(tmp_path):
    target = tmp_path / "out.json"
    write_whole(target, "old")
    target.chmod(0o640)
    with pytest.raises(RuntimeError), whole_file(target) as part:
        part.write_text("half")
        raise RuntimeError
    assert target.read_text() == "old" and listed(tmp_path) == ["out.json"]
    write_whole(target, "new")
    assert target.read_text() == "new" and target.stat().st_mode & 0o777 == 0o640


def test_a_link_is_followed_and_what_is_no_file_is_written_to(tmp_path):
    (tmp_path / "real.txt").write_text("old")
    (tmp_path / "link.txt").symlink_to(tmp_path / "real.txt")
    write_whole(tmp_path / "link.txt", "new")
    assert (tmp_path / "link.txt").is_symlink()
    assert (tmp_path / "real.txt").read_text() == "new"
    write_whole("/dev/null", "x")
    assert not Path("/dev/null").is_file()


def test_several_files_are_put_back_when_one_fails(tmp_path, monkeypatch):
    (tmp_path / "a").write_text("old a")
    broken_disk(monkeypatch, at="c")
    with pytest.raises(OSError, match="disk full"):
        replace_files(tmp_path, {"a": b"new a", "b": b"new b", "c": b"new c"})
    assert listed(tmp_path) == ["a"] and (tmp_path / "a").read_text() == "old a"


def test_reports_are_written_whole(tmp_path, monkeypatch):
    """Whatever a command writes for its user: the old report stays when the disk is full."""
    (tmp_path / "r.part").write_text("a file of mine")
    for write in (
        lambda path: write_text(path, "new"),
        lambda path: write_lines(path, [{"a": 1}], {}),
    ):
        target = tmp_path / "r"
        target.write_text("old")
        with monkeypatch.context() as patch:
            broken_disk(patch, at="r")
            with pytest.raises(ConfigurationError, match="cannot be written"):
                write(target)
        assert target.read_text() == "old"
        assert listed(tmp_path) == ["r", "r.part"]
    assert (tmp_path / "r.part").read_text() == "a file of mine"


def test_a_rollout_removes_its_own_parts_alone(llama, tokenizer, tmp_path):
    requests = [
        Request(messages=({"role": "user", "content": text},), group=text) for text in ("ab", "cd")
    ]
    parts = tmp_path / "own.jsonl.parts"
    parts.mkdir()
    (parts / "mine.txt").write_text("keep me")
    config = RolloutConfig(max_new_tokens=3)
    rollout_to(
        tmp_path / "own.jsonl", llama, tokenizer, requests, config=config, responses_per_part=1
    )
    assert listed(parts) == ["mine.txt"]
    rows = read_jsonl(tmp_path / "own.jsonl")
    assert {row.generation.max_new_tokens for row in rows} == {3}
    (parts / "000000.jsonl").write_text("")
    with pytest.raises(DataError, match=r"holds parts but no run\.json"):
        rollout_to(tmp_path / "own.jsonl", llama, tokenizer, requests, config=config)


def test_a_harvest_takes_no_shard_and_removes_no_file_of_others(llama, tokenizer, tmp_path):
    rows = [Conversation(messages=({"role": "user", "content": "ab"},), response="cd", group="g")]
    sites = (Site(0, "resid", (0, 1)),)
    (tmp_path / "features-mine.part").write_text("keep me")
    (tmp_path / "features-00000.123.part").write_text("half a shard")
    harvest_to(tmp_path, llama, tokenizer, rows, sites)
    assert (tmp_path / "features-mine.part").exists()
    assert not (tmp_path / "features-00000.123.part").exists()
    (tmp_path / "harvest.json").unlink()
    with pytest.raises(DataError, match=r"holds shards but no harvest\.json"):
        harvest_to(tmp_path, llama, tokenizer, rows, sites)


def test_a_model_that_is_trained_again_leaves_every_other_file(tmp_path):
    model, tokenizer = tiny_model("llama"), byte_tokenizer()
    _save(model, tokenizer, tmp_path / "aligned")
    (tmp_path / "aligned" / "README.md").write_text("mine")
    _save(model, tokenizer, tmp_path / "aligned")
    assert (tmp_path / "aligned" / "README.md").read_text() == "mine"
    _remove(tmp_path / "aligned")
    assert listed(tmp_path / "aligned") == ["README.md"]
    (tmp_path / "aligned" / "README.md").unlink()
    _remove(tmp_path / "aligned")
    assert not (tmp_path / "aligned").exists()
    (tmp_path / "curve.jsonl").write_text("x,y\n")
    with pytest.raises(DataError, match="is no learning curve"):
        _Curve(tmp_path / "curve.jsonl", print).begin()
    (tmp_path / "curve.jsonl").write_text('{"stage": "pretraining"}\n')
    _Curve(tmp_path / "curve.jsonl", print).begin()
    assert listed(tmp_path) == []


def test_conversations_keep_the_permissions_that_others_have(tmp_path):
    old = os.umask(0o022)
    try:
        write_jsonl(tmp_path / "rows.jsonl", [])
    finally:
        os.umask(old)
    assert (tmp_path / "rows.jsonl").stat().st_mode & 0o777 == 0o644


def test_a_flag_that_is_not_given_does_not_take_back_a_setting(monkeypatch):
    found = []
    pytest.importorskip("fastapi")
    monkeypatch.setattr("safe_decode.cli.serve._run", found.append)
    CliRunner().invoke(app, ["serve", "--set", "port=0", "--set", "require_signature=k.pem"])
    settings = found[0].settings
    assert (settings.port, settings.require_signature) == (0, Path("k.pem"))


REMOVING = {"rmtree", "unlink", "rmdir"}
WRITING = {"write_text", "write_bytes", "savefig"}
ALLOWED = {
    # The room itself.
    "safe_decode/whole_files.py": REMOVING | WRITING,
    # Half a shard, named by its process, in a directory that says whose it is.
    "probes/activations/harvest.py": {"unlink"},
    "probes/location/checkpoint.py": {"unlink"},
    # Parts of this run, by their numbers.
    "probes/rollouts/resume.py": {"unlink"},
    # A model and a curve that this course wrote, by their names.
    "probes/organism/curriculum.py": {"unlink"},
    # Into memory, or to a path that `whole_file` lends.
    "probes/reports/evaluation_plots.py": {"savefig"},
    "probes/reports/figures.py": {"savefig"},
    "probes/organism/model_card.py": {"savefig"},
    "safe_decode/bench/plots.py": {"savefig"},
    "benchmarks/modes/rewind_tries.py": {"savefig"},
    # A temporary directory of its own.
    "benchmarks/workbench/harvest.py": {"rmtree"},
}


@pytest.mark.parametrize("package", ["safe_decode", "probes", "benchmarks"])
def test_nothing_else_removes_or_overwrites(package):
    """A new place that removes or writes in place has to be looked at, and named above."""
    for path in sorted((ROOT / package).rglob("*.py")):
        name = path.relative_to(ROOT).as_posix()
        calls = {
            node.func.attr
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
        }
        assert calls & (REMOVING | WRITING) <= ALLOWED.get(name, set()), name
