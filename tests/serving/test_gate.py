"""The gate: who may call the server, by which name, and that no path leads round it."""

from __future__ import annotations

import socket

import httpx2
import pytest
from starlette.testclient import TestClient
from starlette.websockets import WebSocketDisconnect

from safe_decode.serving.app import create_app
from safe_decode.serving.middleware.gate import MARKER
from safe_decode.serving.middleware.hosts import AllowedHosts, host_pattern
from tests.servers import MODEL, running, settings_of, staged_engine
from tests.serving.test_operation import FailingCanary, SlowEngine
from tests.staged import CALM

BODY = {"model": MODEL, "messages": CALM}
OPEN = {"/", "/healthz", "/readyz", "/openapi.json", "/page/facts", "/page/{name}"}


def keyed(**changes):
    return create_app(SlowEngine(), settings_of(api_keys=["k"], expose_bare=True, **changes))


def endpoints(app):
    """Every path and method that the application has, however its routers are nested."""
    found = set()

    def walk(routes):
        for route in routes:
            inner = getattr(route, "original_router", None) or getattr(route, "router", None)
            if inner is not None:
                walk(inner.routes)
            elif hasattr(route, "path"):
                found.update((route.path, method) for method in route.methods or ())

    walk(app.routes)
    return found


def test_every_endpoint_wants_a_key_unless_it_is_named_as_open():
    app = keyed()
    found = endpoints(app)
    assert {("/v1/chat/completions", "POST"), ("/metrics", "GET"), ("/page/bare", "POST")} <= found
    with TestClient(app) as client:
        for path, method in found:
            status = client.request(method, path.replace("{name:path}", MODEL)).status_code
            if path in OPEN and method in ("GET", "HEAD"):
                assert status != 401, (path, method)
            else:
                assert status == 401, (path, method)


@pytest.mark.parametrize("method", ["GET", "HEAD", "OPTIONS", "POST", "PUT", "TRACE", "FROB"])
@pytest.mark.parametrize(
    "path",
    [
        "/v1/chat/completions",
        "/%761/chat/completions",
        "/v1%2Fchat%2fcompletions",
        "/v1//chat/completions",
        "//v1/chat/completions",
        "/V1/chat/completions",
        "/v1/chat/completions/",
        "/v1/./chat/completions",
        "/page/../v1/chat/completions",
        "/page/%2e%2e/v1/chat/completions",
        "/v1/chat/completions;x",
        "/v1/chat/completions%00",
        "/v1/chat/completions?x=/healthz",
        "/healthz/../v1/chat/completions",
        "/page/bare",
        "/page%2Fbare",
        "/metrics",
        "/metrics/",
        "/%6detrics",
        "http://127.0.0.1/v1/chat/completions",
        "*",
    ],
)
def test_no_spelling_of_a_path_reaches_an_endpoint_without_a_key(door, path, method):
    """Real sockets, since clients in Python would write the path anew."""
    address, engine = door
    host, port = address.removeprefix("http://").split(":")
    request = f"{method} {path} HTTP/1.1\r\nhost: {host}\r\nconnection: close\r\n"
    with socket.create_connection((host, int(port)), timeout=20) as one:
        one.sendall(f"{request}content-length: 2\r\n\r\n{{}}".encode())
        answer = b""
        while data := one.recv(65536):
            answer += data
    status = int(answer.split(b" ", 2)[1])
    is_file = path.startswith("/page") and method in ("GET", "HEAD")
    assert status in ((400, 401, 404, 405) if is_file or method == "TRACE" else (400, 401)), answer
    assert b"safe_decode_rows" not in answer and engine.runs == []


@pytest.fixture(scope="module")
def door():
    engine = SlowEngine()
    settings = settings_of(api_keys=["k"], expose_bare=True, host="127.0.0.1")
    with running(engine, settings) as (address, _):
        yield address, engine


def test_a_path_that_is_not_there_wants_a_key_too():
    with TestClient(keyed()) as client:
        assert client.get("/nothing").status_code == 401
        assert client.get("/nothing", headers={"x-api-key": "k"}).status_code == 404


def test_a_websocket_is_refused_at_the_gate():
    with TestClient(keyed()) as client:
        for path in ("/v1/chat/completions", "/healthz"):
            with pytest.raises(WebSocketDisconnect) as refused, client.websocket_connect(path):
                pass
            assert refused.value.code == 1008


def test_metrics_are_told_to_operators_and_to_anybody_only_where_nobody_has_a_key():
    given = {"x-api-key": "k"}
    with TestClient(create_app(SlowEngine(), settings_of())) as client:
        assert client.get("/metrics").status_code == 200
    with TestClient(keyed()) as client:
        for headers in ({}, given):
            assert client.get("/metrics", headers=headers).status_code == 401
    with TestClient(keyed(operator_keys=["op"])) as client:
        for headers in ({}, given):
            assert client.get("/metrics", headers=headers).status_code == 401
        assert client.get("/metrics", headers={"x-api-key": "op"}).status_code == 200
    with TestClient(create_app(SlowEngine(), settings_of(operator_keys=["op"]))) as client:
        assert client.get("/metrics").status_code == 401


def test_the_threshold_is_on_the_page_only_where_nobody_needs_a_key():
    for keys, is_told in (([], True), (["k"], False)):
        settings = settings_of(api_keys=keys, expose_scores=True)
        with TestClient(create_app(SlowEngine(), settings)) as client:
            facts = client.get("/page/facts").json()
        assert ("threshold" in facts["certificate"]) is is_told


def test_readiness_says_ready_while_rows_are_taken_and_503_otherwise():
    engine = SlowEngine()
    app = create_app(engine, settings_of())
    with TestClient(app) as client:
        ready = client.get("/readyz")
        assert (ready.status_code, ready.json()) == (200, {"status": "ready"})
        assert ready.headers[MARKER] == engine.facts.bundle[:16]
        alive = client.get("/healthz")
        assert (alive.status_code, alive.json()) == (200, {"status": "alive"})
        app.state.service.scheduler.begin_drain()
        for _ in range(2):
            ending = client.get("/readyz")
            assert (ending.status_code, ending.json()) == (503, {"status": "not ready"})
            assert int(ending.headers["retry-after"]) >= 1
        assert client.get("/healthz").status_code == 200
    with TestClient(create_app(FailingCanary(), settings_of())) as client:
        failed = client.get("/readyz")
        assert (failed.status_code, failed.json()) == (503, {"status": "not ready"})


@pytest.mark.parametrize(
    ("listens_on", "allowed", "good", "bad"),
    [
        (
            "127.0.0.1",
            None,
            ["localhost", "localhost:8000", "LOCALHOST", "localhost.", "127.0.0.1:80", "[::1]:1"],
            ["evil.example", "127.0.0.1.evil.example", "localhost.evil.example", "10.0.0.1", ""],
        ),
        ("::1", None, ["[::1]", "localhost"], ["::1", "[::2]", "evil.example"]),
        ("127.0.0.9", None, ["127.0.0.9", "localhost"], ["127.0.0.8"]),
        (
            "0.0.0.0",
            None,
            ["localhost", "10.1.2.3:8000", "[2001:db8::1]", socket.gethostname()],
            ["evil.example", "10.1.2.3.evil.example", "1.2.3", "[evil]", "a@10.1.2.3", "x:y"],
        ),
        ("::", None, ["127.0.0.1", "[::1]:80"], ["evil.example"]),
        ("box.lan", None, ["box.lan", "BOX.lan:80", "10.0.0.1"], ["evil.lan", "localhost"]),
        ("0.0.0.0", ["api.example"], ["api.example:443"], ["localhost", "127.0.0.1", "x.example"]),
        (
            "0.0.0.0",
            ["*.example"],
            ["a.example", "a.b.example"],
            ["example", "aexample", ".example"],
        ),
        ("0.0.0.0", ["[::1]", "B.c."], ["[::1]:3", "b.C"], ["c"]),
        ("127.0.0.1", ["*"], ["evil.example", "a b", "10.0.0.1"], []),
    ],
)
def test_hosts_that_are_meant_for_this_server_and_hosts_that_are_not(
    listens_on, allowed, good, bad
):
    hosts = AllowedHosts(listens_on, allowed)
    for name in good:
        assert hosts.admits(name.encode()), name
    for name in bad:
        assert not hosts.admits(name.encode()), name
    assert not hosts.admits(None)


@pytest.mark.parametrize("text", ["http://a", "a:80", "a/b", "a b", "", "*a", "a.*", "*.*", "a@b"])
def test_what_is_no_host_is_refused_as_one(text):
    with pytest.raises(ValueError, match="is no host"):
        host_pattern(text)


def test_a_foreign_host_gets_421_in_the_client_s_shape_whatever_it_asks():
    """The default of a server that listens on this machine alone, by real requests."""
    with running(SlowEngine(), settings_of(allowed_hosts=None)) as (address, _):
        evil = {"host": "evil.example"}
        for path in ("/", "/healthz", "/readyz", "/metrics", "/v1/models", "/nothing"):
            refused = httpx2.get(address + path, headers=evil)
            assert refused.status_code == 421, path
            assert refused.json()["error"]["code"] == "host_not_allowed"
        refused = httpx2.post(f"{address}/v1/messages", json={}, headers=evil)
        assert refused.status_code == 421 and refused.json()["type"] == "error"
        refused = httpx2.post(f"{address}/v1/chat/completions", json=BODY, headers=evil)
        assert refused.status_code == 421
        port = address.rsplit(":", 1)[1]
        for name in (f"127.0.0.1:{port}", f"localhost:{port}", "localhost"):
            assert httpx2.get(f"{address}/readyz", headers={"host": name}).status_code == 200


def test_a_request_without_a_host_is_refused():
    settings = settings_of(allowed_hosts=None)
    with running(staged_engine(), settings) as (address, _):
        host, port = address.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=20) as one:
            one.sendall(b"GET /healthz HTTP/1.0\r\n\r\n")
            assert one.recv(1000).startswith(b"HTTP/1.1 421 ")
