"""A signed bundle loads under its key; an unsigned, foreign or changed one is refused by name."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

pytest.importorskip("cryptography")

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519

from safe_decode.bundle.bundle import ProbeBundle
from safe_decode.bundle.files import CALIBRATION, CARD, PROBE
from safe_decode.bundle.signing import SIGNATURE, require_signed, sign_bundle
from safe_decode.cli.main import app
from safe_decode.errors import ConfigurationError, SignatureError
from safe_decode.testing.models import byte_tokenizer, tiny_model
from tests.bundles import random_bundle

# Made by model-signing 1.1.1 of the OpenSSF over a directory of a.txt ("one\n") and sub/b.txt
# ("two\n"), with `model_signing sign key`.
FOREIGN_KEY = """-----BEGIN PUBLIC KEY-----
MFkwEwYHKoZIzj0CAQYIKoZIzj0DAQcDQgAEbrKVtUCxHqkxFFcsKMuElgX6866K
IN1BiZr06J3beqJPSwJLaFxb26cx29H2P/kl3wyIhyebXrwDy4pU6NgekA==
-----END PUBLIC KEY-----
"""
FOREIGN_SIGNATURE = Path(__file__).with_name("model_signing_1_1_1.sig")


def keys(folder, name="key", curve=None):
    """Write a key pair; returns the private and the public file."""
    private = ec.generate_private_key(curve or ec.SECP256R1())
    return written(folder, name, private)


def written(folder, name, private, password=None):
    folder.mkdir(parents=True, exist_ok=True)
    locked = (
        serialization.NoEncryption()
        if password is None
        else serialization.BestAvailableEncryption(password)
    )
    secret, public = folder / f"{name}.pem", folder / f"{name}.pub"
    secret.write_bytes(
        private.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, locked)
    )
    public.write_bytes(
        private.public_key().public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )
    )
    return secret, public


@pytest.fixture(scope="module")
def bundle():
    return random_bundle(tiny_model(), byte_tokenizer())


@pytest.fixture
def signed(bundle, tmp_path):
    bundle.save(tmp_path / "bundle")
    secret, public = keys(tmp_path / "keys")
    sign_bundle(tmp_path / "bundle", secret)
    return tmp_path / "bundle", public


def test_a_signed_bundle_loads_under_its_key(bundle, signed):
    place, public = signed
    assert ProbeBundle.load(place, trusted_key=public).digest == bundle.digest


@pytest.mark.parametrize("curve", [ec.SECP256R1(), ec.SECP384R1(), ec.SECP521R1()])
def test_every_curve_of_the_format_signs(bundle, tmp_path, curve):
    bundle.save(tmp_path / "b")
    secret, public = keys(tmp_path / "keys", curve=curve)
    sign_bundle(tmp_path / "b", secret)
    ProbeBundle.load(tmp_path / "b", trusted_key=public)


def test_an_unsigned_bundle_is_refused(bundle, tmp_path):
    bundle.save(tmp_path / "b")
    _, public = keys(tmp_path / "keys")
    with pytest.raises(
        SignatureError, match=r"is unsigned, wanted a signature by the key .*key\.pub"
    ):
        ProbeBundle.load(tmp_path / "b", trusted_key=public)


def test_a_bundle_signed_by_another_key_is_refused(signed, tmp_path):
    place, _ = signed
    _, other = keys(tmp_path / "others")
    with pytest.raises(SignatureError, match="is signed by the key .*, wanted "):
        ProbeBundle.load(place, trusted_key=other)
    # Nor does it help to claim the trusted key: the signature is what counts.
    record = json.loads((place / SIGNATURE).read_text())
    record["verificationMaterial"] = {"publicKey": {}}
    (place / SIGNATURE).write_text(json.dumps(record))
    with pytest.raises(SignatureError, match="does not hold for the key"):
        ProbeBundle.load(place, trusted_key=other)


@pytest.mark.parametrize("name", [CARD, PROBE, CALIBRATION])
def test_a_changed_or_missing_file_is_named(signed, name):
    place, public = signed
    content = (place / name).read_bytes()
    (place / name).write_bytes(content + b" ")
    with pytest.raises(SignatureError, match=f"is not as it was signed: {name} was changed"):
        ProbeBundle.load(place, trusted_key=public)
    (place / name).unlink()
    with pytest.raises(SignatureError, match=f"{name} is missing"):
        require_signed(place, public)


def test_a_bundle_that_was_made_anew_needs_a_new_signature(bundle, signed):
    place, public = signed
    from dataclasses import replace

    replace(bundle, refusal="Never.").save(place)  # digests are those of the new content
    assert ProbeBundle.load(place).refusal == "Never."
    with pytest.raises(SignatureError, match=r"card\.json was changed"):
        ProbeBundle.load(place, trusted_key=public)


def test_other_files_are_covered_when_signed_and_refused_afterwards(bundle, tmp_path):
    place = tmp_path / "b"
    bundle.save(place)
    (place / "README.md").write_text("A bundle.")
    (place / ".gitattributes").write_text("* text")
    secret, public = keys(tmp_path / "keys")
    sign_bundle(place, secret)
    (place / ".gitattributes").write_text("* binary")  # git's own is nobody's to sign
    ProbeBundle.load(place, trusted_key=public)
    (place / "sub").mkdir()
    (place / "sub" / "code.py").write_text("pass")
    with pytest.raises(SignatureError, match=r"sub/code\.py is not covered"):
        ProbeBundle.load(place, trusted_key=public)


def test_a_damaged_signature_is_refused(signed):
    place, public = signed
    whole = (place / SIGNATURE).read_text()
    record = json.loads(whole)
    record["dsseEnvelope"]["signatures"] = []
    other_type = json.loads(whole)
    other_type["dsseEnvelope"]["payloadType"] = "text/plain"
    for content in (whole[:-20], "[]", json.dumps(record), "{}", json.dumps(other_type)):
        (place / SIGNATURE).write_text(content)
        with pytest.raises(SignatureError, match=r"model\.sig cannot be read"):
            ProbeBundle.load(place, trusted_key=public)


def test_what_openssf_model_signing_signs_is_checked_here(tmp_path):
    (tmp_path / "fx" / "sub").mkdir(parents=True)
    (tmp_path / "fx" / "a.txt").write_text("one\n")
    (tmp_path / "fx" / "sub" / "b.txt").write_text("two\n")
    (tmp_path / "fx" / SIGNATURE).write_bytes(FOREIGN_SIGNATURE.read_bytes())
    (tmp_path / "key.pub").write_text(FOREIGN_KEY)
    require_signed(tmp_path / "fx", tmp_path / "key.pub")
    (tmp_path / "fx" / "a.txt").write_text("One\n")
    with pytest.raises(SignatureError, match=r"a\.txt was changed"):
        require_signed(tmp_path / "fx", tmp_path / "key.pub")


def test_keys_of_another_kind_are_refused(bundle, tmp_path):
    bundle.save(tmp_path / "b")
    secret, public = written(tmp_path / "keys", "ed", ed25519.Ed25519PrivateKey.generate())
    with pytest.raises(ConfigurationError, match="is of another kind, wanted an elliptic-curve"):
        sign_bundle(tmp_path / "b", secret)
    with pytest.raises(ConfigurationError, match="is of another kind"):
        require_signed(tmp_path / "b", public)
    with pytest.raises(ConfigurationError, match="public key .* cannot be read"):
        require_signed(tmp_path / "b", secret)
    with pytest.raises(ConfigurationError, match="private key .* cannot be read"):
        sign_bundle(tmp_path / "b", tmp_path / "none.pem")


def test_the_commands_sign_check_and_say_the_state(bundle, tmp_path, monkeypatch):
    place = tmp_path / "b"
    bundle.save(place)
    private = ec.generate_private_key(ec.SECP256R1())
    secret, public = written(tmp_path / "keys", "locked", private, b"pw")

    def run(*arguments, status=0):
        result = CliRunner().invoke(app, [str(argument) for argument in arguments])
        assert result.exit_code == status, result.output
        return result.stdout if status == 0 else result.stderr

    assert "unsigned" in run("verify-signature", place, "--key", public, status=2)
    assert "signature: none" in run("verify-certificate", "--bundle", place)
    monkeypatch.setenv("PASSWORD_OF_THE_KEY", "pw")
    assert "password" in run("sign", place, "--key", secret, status=2)
    run("sign", place, "--key", secret, "--password-variable", "PASSWORD_OF_THE_KEY")
    assert "verified" in run("verify-signature", place, "--key", public)
    assert "there, not checked: pass --key" in run("verify-certificate", "--bundle", place)
    told = json.loads(run("inspect", "--bundle", place, "--key", public, "--json"))
    assert told["signature"].startswith("holds for the key")
    (place / "note.txt").write_text("x")
    for command in ("inspect", "verify-certificate"):
        assert "note.txt is not covered" in run(
            command, "--bundle", place, "--key", public, status=2
        )


def test_serve_checks_the_signature_before_the_model_is_loaded(bundle, tmp_path, monkeypatch):
    pytest.importorskip("fastapi")
    place = tmp_path / "b"
    bundle.save(place)
    _, public = keys(tmp_path / "keys")

    def never(*_args, **_options):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("safe_decode.loading.load_model", never)
    common = ("serve", "--model", tmp_path / "model", "--bundle", place, "--port", 0)
    for flags in (
        ("--require-signature", public),
        ("--set", f"require_signature={public}"),
    ):
        result = CliRunner().invoke(app, [str(one) for one in (*common, *flags)])
        assert result.exit_code == 2
        assert "is unsigned" in result.stderr
