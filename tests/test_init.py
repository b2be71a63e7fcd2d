import subprocess
import sys

import pytest

import safe_decode

HEAVY = ("transformers", "sklearn", "scipy", "pandas", "datasets")


def loaded_after(statement: str) -> set[str]:
    code = f"{statement}\nimport sys\nprint(' '.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return {name.partition(".")[0] for name in done.stdout.split()}


def test_import_safe_decode_is_light():
    assert not loaded_after("import safe_decode") & {*HEAVY, "torch"}


@pytest.mark.parametrize(
    "room",
    [
        "probe.linear",
        "monitor.monitor",
        "policy.redirect",
        "policy.holdback",
        "policy.policy",
        "bundle.bundle",
        "session.session",
    ],
)
def test_rooms_that_serve_other_engines_do_not_import_transformers(room):
    assert not loaded_after(f"import safe_decode.{room}") & set(HEAVY)


def test_every_public_name_is_there_and_an_unknown_one_is_not():
    for name in safe_decode.__all__:
        assert getattr(safe_decode, name) is not None
    assert set(safe_decode.__all__) <= set(dir(safe_decode))
    with pytest.raises(AttributeError, match="nonsense"):
        _ = safe_decode.nonsense
