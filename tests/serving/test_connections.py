"""Connections that keep the server waiting, by real sockets: each ends in time."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import threading
import time

import httpx2
import pytest

from safe_decode.errors import ConfigurationError
from safe_decode.serving.middleware import connections
from safe_decode.serving.middleware.connections import _network, require_descriptors
from safe_decode.serving.middleware.crowd import BURST, BURST_SECONDS, Crowd
from safe_decode.serving.operations.metrics import Metrics
from tests.servers import MODEL, running, settings_of
from tests.serving.test_operation import SlowEngine, sample
from tests.staged import CALM

BODY = {"model": MODEL, "messages": CALM}
HALF = b"POST /v1/chat/completions HTTP/1.1\r\nhost: 127.0.0.1\r\nx-half: "
PATIENCE = 20.0


class Going(SlowEngine):
    """Answers at once."""

    def __init__(self):
        super().__init__()
        self.go.set()


def connected(address, data=b"", *, source=None, buffer=None):
    """Connect, and send something."""
    host, port = address.removeprefix("http://").rsplit(":", 1)
    one = socket.socket()
    if buffer is not None:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
    if source is not None:
        one.bind((source, 0))
    one.settimeout(PATIENCE)
    one.connect((host, int(port)))
    if data:
        one.sendall(data)
    return one


@pytest.fixture
def opened():
    """Connects as `connected` does; whatever is left open is closed at the end."""
    with contextlib.ExitStack() as stack:
        yield lambda *args, **kwargs: stack.enter_context(connected(*args, **kwargs))


def told(one):
    """Read until the other side ends the connection."""
    data = b""
    with contextlib.suppress(ConnectionError):
        while chunk := one.recv(65536):
            data += chunk
    one.close()
    return data


def dropped(address, why):
    name = f'safe_decode_connections_dropped_total{{why="{why}"}}'
    text = httpx2.get(f"{address}/metrics").text
    return sample(text, name) if name in text else 0.0


def asked(address):
    return httpx2.post(f"{address}/v1/chat/completions", json=BODY, timeout=PATIENCE)


def test_half_sent_headers_end_in_time_even_when_they_drip(opened):
    with running(Going(), settings_of(header_timeout_s=0.5)) as (address, _):
        for drips in (False, True):
            one = opened(address, HALF)
            began = time.monotonic()
            one.settimeout(0.05)
            answer = b""
            while time.monotonic() - began < PATIENCE:
                with contextlib.suppress(TimeoutError):
                    data = one.recv(4096)
                    answer += data
                    if not data:
                        break
                if drips:
                    with contextlib.suppress(OSError):
                        one.sendall(b"a")
            assert answer.startswith(b"HTTP/1.1 408 "), answer
            assert 0.4 < time.monotonic() - began < 5
            one.close()
        assert dropped(address, "slow_headers") == 2


def test_a_connection_that_says_nothing_ends_in_time(opened):
    with running(Going(), settings_of(header_timeout_s=0.3)) as (address, _):
        began = time.monotonic()
        told(opened(address))
        assert time.monotonic() - began < 5


def test_the_time_runs_anew_for_each_request_of_a_connection(opened):
    """Kept alive over longer than the headers' time; then half a request ends it."""
    settings = settings_of(header_timeout_s=0.6, keep_alive_timeout_s=5)
    with running(Going(), settings) as (address, _):
        one = opened(address)
        for _ in range(4):
            one.sendall(b"GET /healthz HTTP/1.1\r\nhost: 127.0.0.1\r\n\r\n")
            answer = b""
            while b"alive" not in answer:
                answer += one.recv(65536)
            assert answer.startswith(b"HTTP/1.1 200 ")
            time.sleep(0.3)
        one.sendall(b"GET /healthz HT")
        assert told(one).startswith(b"HTTP/1.1 408 ")


def test_the_headers_time_does_not_run_while_an_answer_is_made():
    engine = SlowEngine()
    with running(engine, settings_of(header_timeout_s=0.2)) as (address, _):
        answers = []
        thread = threading.Thread(target=lambda: answers.append(asked(address)))
        thread.start()
        assert engine.began.wait(10)
        time.sleep(0.6)
        engine.go.set()
        thread.join(PATIENCE)
    assert answers[0].status_code == 200


def test_a_connection_between_requests_ends_in_time(opened):
    with running(Going(), settings_of(keep_alive_timeout_s=1)) as (address, _):
        one = opened(address, b"GET /healthz HTTP/1.1\r\nhost: 127.0.0.1\r\n\r\n")
        began = time.monotonic()
        assert b"200 OK" in told(one)
        assert 0.5 < time.monotonic() - began < 5


def test_a_body_that_drips_is_refused_in_time(opened):
    with running(Going(), settings_of(body_timeout_s=0.5)) as (address, _):
        one = opened(address, HALF + b"\r\ncontent-length: 1000\r\n\r\n{")
        answer = told(one)
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert json.loads(answer.split(b"\r\n\r\n")[1])["error"]["code"] == "slow_body"


def test_half_a_body_is_no_request(opened):
    """Whoever leaves in the middle of a body has asked nothing."""
    engine = Going()
    whole = json.dumps(BODY).encode()
    with running(engine, settings_of()) as (address, app):
        one = opened(address, HALF + b"\r\ncontent-length: 100000\r\n\r\n" + whole)
        one.close()
        deadline = time.monotonic() + 10
        counted = app.state.service.metrics.refused.labels("client_left")._value
        while counted.get() == 0 and time.monotonic() < deadline:
            time.sleep(0.02)
        assert counted.get() == 1
    assert engine.runs == []


def test_a_reader_that_takes_nothing_is_cut_off(opened):
    """More than all buffers between hold; others are answered meanwhile."""
    engine = Going()
    with running(engine, settings_of(write_timeout_s=0.5)) as (address, app):
        app.state.service.metrics.text = lambda: b"x" * 50_000_000
        one = opened(address, b"GET /metrics HTTP/1.1\r\nhost: 127.0.0.1\r\n\r\n", buffer=4096)
        assert asked(address).status_code == 200
        deadline = time.monotonic() + PATIENCE
        counted = app.state.service.metrics.dropped_connections.labels("slow_reader")._value
        while counted.get() == 0 and time.monotonic() < deadline:
            time.sleep(0.05)
        assert counted.get() == 1
        assert len(told(one)) < 50_000_000


def test_a_reader_that_reads_on_gets_everything(opened):
    with running(Going(), settings_of(write_timeout_s=0.5)) as (address, app):
        app.state.service.metrics.text = lambda: b"x" * 8_000_000
        one = opened(
            address,
            b"GET /metrics HTTP/1.1\r\nhost: 127.0.0.1\r\nconnection: close\r\n\r\n",
            buffer=65536,
        )
        data, began = b"", time.monotonic()
        while chunk := one.recv(400_000):
            data += chunk
            time.sleep(0.005)
        one.close()
    assert time.monotonic() - began < PATIENCE and data.count(b"x") >= 8_000_000


def test_with_every_place_taken_by_slow_ones_an_honest_request_is_answered_at_once(opened):
    settings = settings_of(max_connections=30, header_timeout_s=30, body_timeout_s=30)
    with running(Going(), settings) as (address, app):
        slow = [opened(address, HALF) for _ in range(60)]
        slow += [opened(address, HALF + b"\r\ncontent-length: 99\r\n\r\n{") for _ in range(60)]
        began = time.monotonic()
        for _ in range(5):
            assert asked(address).status_code == 200
        assert time.monotonic() - began < 10
        assert dropped(address, "crowded_out") >= 90
        time.sleep(3 * BURST_SECONDS)
        assert app.state.service.metrics.connections._value.get() <= 31
        for one in slow:
            one.close()


def test_one_address_takes_its_share_and_no_more(opened):
    settings = settings_of(max_connections=100, max_connections_per_address=5)
    with running(Going(), settings) as (address, app):
        other = opened(address, HALF, source="127.0.0.2")
        slow = [opened(address, HALF, source="127.0.0.3") for _ in range(20)]
        deadline = time.monotonic() + 10
        gauge = app.state.service.metrics.connections._value
        while gauge.get() != 6 and time.monotonic() < deadline:
            time.sleep(0.02)
        assert gauge.get() == 6
        other.sendall(b"x\r\n\r\n")
        assert other.recv(100).startswith(b"HTTP/1.1 4")  # heard, not crowded out
        for one in (other, *slow):
            one.close()


def test_when_all_are_at_work_a_further_connection_is_refused(opened):
    engine = SlowEngine()
    with running(engine, settings_of(max_connections=3)) as (address, _):
        threads = [threading.Thread(target=asked, args=(address,)) for _ in range(3)]
        for thread in threads:
            thread.start()
        deadline = time.monotonic() + 10
        while sum(engine.runs) < 1 and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(0.5)
        answer = told(opened(address))
        engine.go.set()
        for thread in threads:
            thread.join(PATIENCE)
        assert answer.startswith(b"HTTP/1.1 503 ") and b"retry-after" in answer
        assert asked(address).status_code == 200
        assert dropped(address, "refused") == 1


def test_a_thousand_connections_come_and_go_and_nothing_is_kept(opened):
    settings = settings_of(max_connections=50, header_timeout_s=0.3)
    with running(Going(), settings) as (address, app):
        for _ in range(100):
            many = [opened(address, HALF) for _ in range(10)]
            for one in many:
                one.close()
        gauge = app.state.service.metrics.connections._value
        deadline = time.monotonic() + 10
        while gauge.get() and time.monotonic() < deadline:
            time.sleep(0.02)
        assert gauge.get() == 0
        assert asked(address).status_code == 200


class Standing:
    """A connection as the crowd sees it."""

    def __init__(self, address, cycle=None, waits=True):
        self.address, self.cycle, self.keeps_us_waiting = address, cycle, waits
        self.why = None

    def drop(self, why):
        self.why = why


def test_who_never_asked_makes_room_before_who_rests_between_requests():
    metrics = Metrics()

    async def come():
        crowd = Crowd(settings_of(max_connections=3), metrics)
        rests, works, asks_never = Standing("a", 1), Standing("b", 1, False), Standing("c")
        for one in (rests, works, asks_never, Standing("d")):
            assert crowd.enter(one)
        assert asks_never.why is None  # its request may be on its way
        await asyncio.sleep(3 * BURST_SECONDS)
        assert asks_never.why == "crowded_out" and rests.why is works.why is None
        crowd.leave(asks_never)  # its socket closes only now: it has left already
        assert metrics.connections._value.get() == 3

    asyncio.run(come())


def test_who_has_asked_in_the_moment_of_a_burst_stays():
    async def come():
        crowd = Crowd(settings_of(max_connections=10), Metrics())
        honest = Standing("a")
        slow = [Standing("b") for _ in range(200)]
        for one in (honest, *slow):
            assert crowd.enter(one)
        honest.cycle, honest.keeps_us_waiting = 1, False
        await asyncio.sleep(3 * BURST_SECONDS)
        assert honest.why is None and len(crowd._all) == 10
        assert [one.why for one in slow] == ["crowded_out"] * 191 + [None] * 9

    asyncio.run(come())


def test_a_burst_has_a_limit_of_its_own():
    async def come():
        crowd = Crowd(settings_of(max_connections=10, max_connections_per_address=10), Metrics())
        many = [Standing("b") for _ in range(1000)]
        for one in many:
            assert crowd.enter(one)
            assert len(crowd._all) <= 10 + BURST

    asyncio.run(come())


def test_a_refused_connection_is_not_counted_in():
    crowd = Crowd(settings_of(max_connections=1), Metrics())
    works = Standing("a", 1, False)
    refused = Standing("b")
    assert crowd.enter(works) and not crowd.enter(refused)
    crowd.leave(refused)
    crowd.leave(works)
    assert crowd.enter(Standing("b"))
    assert set(crowd._of) == {"b"}


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("2001:db8::1", "2001:db8::ffff", True),
        ("2001:db8::1", "2001:db8:0:1::1", False),
        ("::ffff:10.0.0.1", "10.0.0.1", True),
        ("10.0.0.1", "10.0.0.2", False),
        ("fe80::1%eth0", "fe80::2", True),
        ("", "10.0.0.1", False),
    ],
)
def test_addresses_of_one_network_share_a_limit(one, other, same):
    assert (_network(one) == _network(other)) is same


def test_open_files_are_made_to_suffice_or_the_start_is_refused(monkeypatch):
    import resource

    made = []
    monkeypatch.setattr(resource, "getrlimit", lambda _: (512, 1024))
    monkeypatch.setattr(resource, "setrlimit", lambda _, limits: made.append(limits))
    require_descriptors(settings_of(max_connections=100))
    assert made == []
    require_descriptors(settings_of(max_connections=512))
    assert made == [(512 + connections._SPARE_DESCRIPTORS, 1024)]
    with pytest.raises(ConfigurationError, match="max_connections=2000 wants 2384 open files"):
        require_descriptors(settings_of(max_connections=2000))
