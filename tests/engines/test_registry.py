import pytest

from safe_decode.engines.interface import Engine
from safe_decode.engines.registry import ENGINES, engine_named
from safe_decode.errors import ConfigurationError

MEMBERS = {name for name in vars(Engine) if not name.startswith("_")}


@pytest.mark.parametrize("name", ENGINES)
def test_every_engine_has_what_the_server_asks_for(name):
    assert set(dir(engine_named(name))) >= MEMBERS and "run" in MEMBERS


def test_an_unknown_engine_is_refused_by_name():
    with pytest.raises(ConfigurationError, match="engine='nobody' is not one of transformers"):
        engine_named("nobody")
