import subprocess
import sys

import pytest

import probes
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


def test_import_probes_is_light():
    assert not loaded_after("import probes") & {*HEAVY, "torch"}


@pytest.mark.parametrize("package", [safe_decode, probes], ids=lambda package: package.__name__)
def test_every_public_name_is_there_and_an_unknown_one_is_not(package):
    for name in package.__all__:
        assert getattr(package, name) is not None
    assert set(package.__all__) <= set(dir(package))
    with pytest.raises(AttributeError, match="nonsense"):
        _ = package.nonsense


def test_what_the_roots_name_otherwise_is_what_its_module_holds():
    from probes.data.splits import prepared
    from safe_decode.demo.embedded_pair import embedded

    assert safe_decode.load_embedded is embedded
    assert probes.prepare_splits is prepared
