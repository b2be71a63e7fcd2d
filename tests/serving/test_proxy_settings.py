"""The settings of the proxy: one precedence, no key where others read it, and its command."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from safe_decode.cli.main import app
from safe_decode.errors import ConfigurationError
from safe_decode.serving.proxy.app import proxy_screen
from safe_decode.serving.proxy.settings import ProxySettings, load_proxy_settings
from tests.proxying import BUNDLE, MARK, proxy_settings

BASE = {"upstream": "http://up:1/", "bundle": BUNDLE}
PREFIX = "SAFE_DECODE_PROXY_"


def test_what_is_given_beats_what_is_not_and_the_nearer_source_wins(tmp_path):
    config = tmp_path / "proxy.yaml"
    config.write_text("port: 1\nholdback_tokens: 1\nmax_choices: 1\ncanary_every_s: 1\n")
    loaded = load_proxy_settings(
        config,
        flags={**BASE, "port": 4, "audit": None, "holdback_tokens": None},
        assignments={"port": "3", "holdback_tokens": "3"},
        environ={PREFIX + n: "2" for n in ("PORT", "HOLDBACK_TOKENS", "MAX_CHOICES")},
    )
    own, sources = loaded
    assert (own.port, own.holdback_tokens, own.max_choices, own.canary_every_s) == (4, 3, 2, 1)
    assert own.host == "127.0.0.1" and own.upstream == "http://up:1" and own.marker == MARK
    names = ("port", "holdback_tokens", "max_choices", "canary_every_s", "host", "audit")
    assert [sources.get(name) for name in names] == [
        *("flag", "--set", "environment", "file", None, None)
    ]
    told = dict(proxy_screen(loaded))["settings"]
    assert "file: canary_every_s" in told and "--set: holdback_tokens" in told


def test_keys_come_from_the_environment_or_the_file_and_are_never_told():
    environ = {PREFIX + "UPSTREAM_KEY": "operators", PREFIX + "API_KEYS": '["a-key", "b-key"]'}
    loaded = load_proxy_settings(flags=BASE, environ=environ)
    keys = [key.get_secret_value() for key in loaded.settings.api_keys]
    assert keys == ["a-key", "b-key"]
    assert loaded.settings.upstream_key.get_secret_value() == "operators"
    told = str(proxy_screen(loaded)) + repr(loaded)
    assert "operators" not in told and "a-key" not in told and "2" in told
    one = load_proxy_settings(flags=BASE, assignments={"api_keys": "c-key"}, environ={})
    assert one.settings.api_keys[0].get_secret_value() == "c-key"
    for where in ("flags", "assignments"):
        given = {"flags": BASE, where: {**BASE, "upstream_key": "operators"}}
        with pytest.raises(ConfigurationError, match="UPSTREAM_KEY") as caught:
            load_proxy_settings(environ={}, **given)
        assert "operators" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"upstream": "ftp://x"}, "upstream"),
        ({"upstream": "http://me:secret@x"}, "upstream"),
        ({"upstream": "http://x/v1"}, "without /v1"),
        ({"upstream": "http://x?key=secret"}, "upstream"),
        ({"bundle": "short"}, "bundle"),
        ({"bundle": "g" * 64}, "bundle"),
        ({"port": 70000}, "port"),
        ({"holdback_tokens": -1}, "holdback_tokens"),
        ({"request_timeout_s": float("inf")}, "request_timeout_s"),
        ({"unknown": 1}, "unknown"),
        ({"api_keys": [""]}, "api_keys"),
        ({"api_keys": ["a b"]}, "key 1 of 1"),
        ({"allowed_hosts": ["http://x"]}, "allowed_hosts"),
        ({"api_keys": "[secret"}, "api_keys"),
        ({"upstream": None}, "upstream"),
    ],
)
def test_what_is_wrong_is_named_and_not_repeated(change, told):
    flags = {name: value for name, value in {**BASE, **change}.items() if value is not None}
    with pytest.raises(ConfigurationError, match=told) as caught:
        load_proxy_settings(flags=flags, environ={})
    assert "secret" not in str(caught.value)


def test_the_operator_s_key_wants_keys_of_clients():
    environ = {PREFIX + "UPSTREAM_KEY": "operators"}
    with pytest.raises(ConfigurationError, match="api_keys is empty") as caught:
        load_proxy_settings(flags=BASE, environ=environ)
    assert "operators" not in str(caught.value)


def test_variables_and_files_that_are_no_settings_are_refused(tmp_path):
    with pytest.raises(ConfigurationError, match="SAFE_DECODE_PROXY_HOLDBACK is"):
        load_proxy_settings(flags=BASE, environ={PREFIX + "HOLDBACK": "3"})
    load_proxy_settings(flags=BASE, environ={"SAFE_DECODE_PORT": "3"})
    config = tmp_path / "proxy.yaml"
    for text, told in (("- a", "wanted a mapping"), ("a: [", "cannot be read"), ("b: 1", "b ")):
        config.write_text(text)
        with pytest.raises(ConfigurationError, match=told):
            load_proxy_settings(config, flags=BASE, environ={})
    config.write_text("")
    assert load_proxy_settings(config, flags=BASE, environ={}).settings == proxy_settings(
        upstream="http://up:1", port=8001
    )


def test_the_command_refuses_in_one_line():
    for arguments, told in (
        (["--set", "upstream_key=secret"], "UPSTREAM_KEY"),
        (["--set", "port"], "NAME=VALUE"),
        (["--upstream", "x"], "upstream"),
    ):
        done = CliRunner().invoke(app, ["proxy", *arguments])
        assert done.exit_code == 2 and told in done.output
        assert "secret" not in done.output and "Traceback" not in done.output


@pytest.mark.parametrize("name", ProxySettings.model_fields)
@pytest.mark.parametrize("way", ["flag", "--set", "environment", "file"])
def test_a_blank_value_is_refused_by_name_whichever_way_it_is_given(name, way, tmp_path):
    if name == "upstream_key" and way in ("flag", "--set"):
        pytest.skip("refused there whatever it holds")
    given = {key: value for key, value in BASE.items() if key != name}
    config = tmp_path / "proxy.yaml"
    config.write_text(f"{name}: ' '\n" if way == "file" else "")
    with pytest.raises(ConfigurationError, match=rf"^{name}=' ' \({way}\) is blank"):
        load_proxy_settings(
            config,
            flags={**given, **({name: " "} if way == "flag" else {})},
            assignments={name: " "} if way == "--set" else {},
            environ={PREFIX + name.upper(): " "} if way == "environment" else {},
        )
