"""The client of inference servers: pace, patience, several servers, and each kind of failure."""

from __future__ import annotations

import json
import pickle
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

from pipeline.errors import MisuseError, ServerError
from pipeline.servers import pool
from pipeline.servers.addresses import base_urls, is_loopback, server_key
from pipeline.servers.answers import RefusedError, UnusableAnswerError, message_of, publishable
from pipeline.servers.client import Client
from pipeline.servers.pace import Pace


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(pool, "FIRST_WAIT", 0.005)
    monkeypatch.setattr(pool, "LAST_WAIT", 0.05)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128


@contextmanager
def answering(answer):
    """The URL of a loopback server; `answer(body)` returns status, headers and content."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True  # else each answer waits 40 ms for an acknowledgement

        def log_message(self, format, *args):
            return

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            status, headers, content = answer(body)
            self.send_response(status)
            for name, value in {"Content-Length": str(len(content)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)

    server = _Server(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def echo(body):
    return 200, {}, json.dumps(body).encode()


@contextmanager
def client_of(*urls, **settings):
    found = Client(urls, **{"patience": 5.0, **settings})
    try:
        yield found
    finally:
        found.close()


def ask(client, value=0, what="row 7"):
    return client.submit("/x", {"value": value}, lambda answer: answer["value"], what=what)


def test_answers_come_in_the_order_of_their_requests():
    with answering(echo) as url, client_of(url) as client:
        futures = [ask(client, i) for i in range(100)]
        assert [future.result() for future in futures] == list(range(100))


def test_no_more_requests_are_in_flight_than_asked_for():
    lock, now, most = threading.Lock(), [0], [0]

    def answer(body):
        with lock:
            now[0] += 1
            most[0] = max(most[0], now[0])
        time.sleep(0.02)
        with lock:
            now[0] -= 1
        return echo(body)

    with answering(answer) as url, client_of(url, concurrency=3) as client:
        for future in [ask(client, i) for i in range(40)]:
            future.result()
    assert most[0] == 3


def test_load_is_shared_and_a_dead_server_is_left_alone(caplog):
    seen = []
    slow = answering(lambda body: (seen.append(body), time.sleep(0.002), echo(body))[-1])
    with slow as url, client_of(url, "http://127.0.0.1:9", concurrency=4) as client:
        assert [f.result() for f in [ask(client, i) for i in range(30)]] == list(range(30))
    assert len(seen) == 30
    assert "127.0.0.1:9: cannot be reached" in caplog.text


@pytest.mark.parametrize(
    ("status", "kind", "line"),
    [
        (400, RefusedError, r"http://127.*: row 7: 400 too long"),
        (401, ServerError, r"refuses the key \(401\); set SOFTLABEL_SERVER_KEY"),
        (403, ServerError, r"refuses the key \(403\)"),
        (404, ServerError, r"row 7: 404 too long; expected the base address"),
        (307, ServerError, r"redirects \(307\); give --server the address"),
        (422, RefusedError, r"row 7: 422 too long"),
    ],
)
def test_what_would_come_again_is_said_at_once(status, kind, line):
    count = []
    body = json.dumps({"error": {"message": "too\nlong"}}).encode()
    refusing = answering(lambda _: (count.append(1), (status, {}, body))[1])
    with refusing as url, client_of(url) as client, pytest.raises(kind, match=line) as caught:
        ask(client).result()
    assert len(count) == 1
    assert "\n" not in str(caught.value)


def test_one_request_that_fails_while_others_are_answered_is_refused():
    def answer(body):
        return (500, {}, b"out of memory") if body["value"] == 3 else echo(body)

    with answering(answer) as url, client_of(url, patience=60.0, concurrency=2) as client:
        bad = ask(client, 3)
        stop = time.monotonic() + 20
        while not bad.done() and time.monotonic() < stop:
            assert ask(client, 1).result() == 1
        with pytest.raises(RefusedError, match=r"row 7: 500 out of memory; asked 8 times, while others were answered"):
            bad.result(0)


@pytest.mark.parametrize("patience", [60.0, 0.1])
def test_a_request_that_always_fails_is_refused_with_nothing_else_to_ask(patience):
    def answer(body):
        return (500, {}, b"NaN is not JSON") if body["value"] == 3 else echo(body)

    with answering(answer) as url, client_of(url, patience=patience) as client:
        assert ask(client, 1).result() == 1
        with pytest.raises(RefusedError, match=r"row 7: 500 NaN is not JSON; asked \d times, while others") as caught:
            ask(client, 3).result()
    assert caught.value.reason == "the server refuses it: 500 NaN is not JSON"


def test_a_server_that_fails_at_everything_refuses_no_request():
    broken = []
    with (
        answering(lambda body: (500, {}, b"no") if broken else echo(body)) as url,
        client_of(url, patience=0.5) as client,
    ):
        assert ask(client, 1).result() == 1
        broken.append(1)
        with pytest.raises(ServerError, match=r"row 7: 500 no; given up after 0\.5 s") as caught:
            ask(client, 3).result()
        assert not isinstance(caught.value, RefusedError)
        future = ask(client, 4)
        time.sleep(0.3)
        broken.clear()
        assert future.result() == 4


@pytest.mark.parametrize("status", [500, 503, 200])
def test_one_broken_server_of_two_costs_no_row(status):
    hits = []
    bad = answering(lambda body: (hits.append(1), (status, {}, b"backend down"))[1])
    with answering(echo) as good, bad as url, client_of(url, good, concurrency=8, patience=20.0) as client:
        assert [f.result() for f in [ask(client, i) for i in range(100)]] == list(range(100))
        assert client.concurrency == 8
    assert 1 <= len(hits) < 60


def test_a_request_is_not_at_fault_where_only_a_broken_server_has_it():
    broken = []
    bad = answering(lambda body: (500, {}, b"no") if broken else echo(body))
    with bad as url, answering(echo) as good, client_of(url, good, patience=20.0) as client:
        assert client.submit("/x", {"value": 1}, lambda answer: answer["value"], what="row 1", url=url).result() == 1
        broken.append(1)
        asked = client.submit("/x", {"value": 2}, lambda answer: answer["value"], what="row 2", url=url)
        time.sleep(0.6)
        assert not asked.done()
        broken.clear()
        assert asked.result() == 2


def test_a_server_that_refuses_what_it_answered_before_is_at_fault():
    other = []

    def answer(body):
        return (400, {}, b"greater than max allowed: 5") if other or body["value"] == 3 else echo(body)

    with answering(answer) as url, client_of(url) as client:
        assert ask(client, 1).result() == 1
        with pytest.raises(RefusedError):
            ask(client, 3).result()
        other.append(1)
        with pytest.raises(ServerError, match="a request that was answered before: 400 greater than") as caught:
            ask(client, 4).result()
        assert not isinstance(caught.value, RefusedError)


def test_a_request_is_sent_at_once_while_another_one_pauses():
    """A pausing request waits on the lock that hands over requests but must not take wake-ups."""
    first = []

    def answer(body):
        busy = body["value"] == 0 and not first
        return (first.append(1), (503, {"Retry-After": "8"}, b"busy"))[1] if busy else echo(body)

    def read(answer):
        time.sleep(0.02)
        return answer["value"]

    with answering(answer) as url, client_of(url, concurrency=8, patience=60.0) as client:
        client.submit("/x", {"value": 0}, read, what="row 0")
        time.sleep(0.3)
        client.submit("/x", {"value": 1}, read, what="row 1").result()
        time.sleep(0.2)
        for n in range(2, 5):
            assert client.submit("/x", {"value": n}, read, what="row").result(3) == n


def test_patience_ends(caplog):
    with client_of("http://127.0.0.1:9", patience=0.2) as client:
        started = time.monotonic()
        with pytest.raises(ServerError, match=r"given up after 0\.2 s \(--server-patience\)"):
            ask(client).result()
    assert time.monotonic() - started < 5
    assert caplog.text.count("cannot be reached") == 1


def test_a_server_that_says_nothing_is_asked_again():
    stalled = threading.Event()

    def answer(body):
        if not stalled.is_set():
            stalled.set()
            time.sleep(1.0)
        return echo(body)

    with answering(answer) as url, client_of(url, read_seconds=0.2) as client:
        assert ask(client, 5).result() == 5


def test_an_answer_that_cannot_be_read_is_asked_for_again():
    count = []

    def read(answer):
        count.append(1)
        if len(count) < 3:
            raise UnusableAnswerError("expected more")
        return answer["value"]

    def never(answer):
        raise UnusableAnswerError("expected numbers, found none", of_row=True)

    with answering(echo) as url, client_of(url) as client:
        assert client.submit("/x", {"value": 4}, read, what="row 1").result() == 4
        with pytest.raises(RefusedError, match=r"row 2: expected numbers, found none; asked 4 times"):
            client.submit("/x", {"value": 4}, never, what="row 2").result()


def test_an_answer_whose_numbers_are_too_large_is_asked_for_again_and_a_fault_of_ours_is_not_hidden():
    def overflow(answer):
        return np.array([int("9" * 20)], dtype=np.int64)

    def broken(answer):
        raise RuntimeError("a fault of ours")

    with answering(echo) as url, client_of(url) as client:
        with pytest.raises(ServerError, match=r"row 1: not an answer of this API \(OverflowError.*asked 4 times"):
            client.submit("/x", {"value": 4}, overflow, what="row 1").result()
        with pytest.raises(RuntimeError, match="a fault of ours"):
            client.submit("/x", {"value": 4}, broken, what="row 1").result()


def test_refusals_for_load_lower_the_pace():
    def answer(body):
        return (
            (429, {"Retry-After": "0"}, b"{}")
            if not body["value"] and len(seen) < 2 and not seen.append(1)
            else echo(body)
        )

    seen: list[int] = []
    with answering(answer) as url, client_of(url, concurrency=16) as client:
        assert ask(client, 0).result() == 0
        assert client.concurrency == 8


def test_closing_gives_up():
    client = Client(["http://127.0.0.1:9"], patience=600.0)
    futures = [ask(client, i) for i in range(20)]
    time.sleep(0.05)
    client.close()
    for future in futures:
        with pytest.raises(BaseException, match=r"closed|^$"):
            future.result(5)


# --------------------------------------------------------------------------------------------- pace


def test_the_pace_rises_until_it_is_no_faster():
    now = [0.0]
    pace = Pace(None, 1, clock=lambda: now[0])
    limits = []
    for _ in range(20_000):
        if pace.is_found:
            break
        now[0] += 1 / min(pace.limit, 40)  # the server handles at most 40 at once
        pace.answered(1, waiting=True)
        limits.append(pace.limit)
    assert pace.is_found
    assert pace.limit == 64 or pace.limit == 32
    assert sorted(set(limits))[:3] == [8, 16, 32]


def test_a_pace_without_work_to_wait_says_nothing():
    now = [0.0]
    pace = Pace(None, 1, clock=lambda: now[0])
    for _ in range(1000):
        now[0] += 0.1
        pace.answered(1, waiting=False)
    assert pace.limit == 8
    assert not pace.is_found


def test_a_refusal_halves_and_rounds_restore():
    now = [0.0]
    pace = Pace(32, 1, clock=lambda: now[0])
    for _ in range(5):
        pace.refused()  # simultaneous refusals count once
    assert pace.limit == 16
    for _ in range(10_000):
        now[0] += 0.01
        pace.answered(1, waiting=True)
    assert pace.limit == 32


# ---------------------------------------------------------------------------------------- addresses


def test_addresses():
    assert base_urls(["http://a:1/v1/", "https://b/x/v1", "http://c"]) == ("http://a:1", "https://b/x", "http://c")
    for bad in ("a:1", "ftp://a", "http://", "http://a:x", "http://a/v1?key=1"):
        with pytest.raises(MisuseError, match="expected an address"):
            base_urls([bad])
    with pytest.raises(MisuseError, match="found it twice"):
        base_urls(["http://a:1", "http://a:1/v1"])
    with pytest.raises(MisuseError, match=r"http://\*\*\*@host") as caught:
        base_urls(["http://user:secret@host/v1"])
    assert "secret" not in str(caught.value)


def test_proxies_are_not_for_this_machine(monkeypatch):
    assert all(map(is_loopback, ("http://localhost:1", "http://127.0.0.2", "http://[::1]:8000")))
    assert not is_loopback("http://10.0.0.1:8000")
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    with answering(echo) as url, client_of(url) as client:
        assert ask(client, 1).result() == 1


def test_the_key_is_in_no_message(monkeypatch):
    body = b'{"detail": "key planted-secret is not for this"}'
    line = r"key \$SOFTLABEL_SERVER_KEY is not for this"
    with answering(lambda _: (400, {}, body)) as url, client_of(url, key="planted-secret") as client:
        asked = ask(client)
        with pytest.raises(RefusedError, match=line):
            asked.result()


@pytest.mark.parametrize("key", ["planted\nsecret", "planted secret", "planted\u00e9secret", "planted\x07secret"])
def test_a_key_that_cannot_be_sent_is_not_quoted(monkeypatch, key):
    monkeypatch.setenv("SOFTLABEL_SERVER_KEY", key)
    with pytest.raises(MisuseError, match="SOFTLABEL_SERVER_KEY: expected printable ASCII") as caught:
        server_key()
    assert "planted" not in str(caught.value)
    with answering(echo) as url, client_of(url, key="planted\nsecret") as client:
        with pytest.raises(ServerError, match="check the address, and the key") as refused:
            ask(client).result()
        assert "planted" not in str(refused.value)


@pytest.mark.parametrize(
    ("said", "published"),
    [
        ("CUDA error at http://gpu-07.internal:8000/v1: no", "CUDA error at ... no"),
        ("File /opt/models/llama/x.py: no", "File ...: no"),
        ("10.0.3.7:8000 and gpu-07.internal:8000, localhost:8000", "... and ..., ..."),
        ("request cmpl-0123456789abcdef0123 failed", "request ... failed"),
        (
            "maximum context length is 40 tokens (12/13), 1.5 nats",
            "maximum context length is 40 tokens (12/13), 1.5 nats",
        ),
        ("C:\\models\\tiny is bad", "... is bad"),
    ],
)
def test_what_is_published_names_no_machine(said, published):
    assert publishable(said) == published


def test_a_refusal_names_the_server_in_its_text_alone():
    body = b'{"detail": "no /srv/models/tiny at http://10.0.0.1:8000/v1"}'
    refusing = answering(lambda _: (400, {}, body))
    with refusing as url, client_of(url) as client, pytest.raises(RefusedError, match="http://127") as caught:
        ask(client).result()
    assert caught.value.reason == "the server refuses it: 400 no ... at ..."
    assert pickle.loads(pickle.dumps(caught.value)).reason == caught.value.reason


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b'{"error": {"message": "a\\nb"}}', "a b"),
        (b'{"object": "error", "message": "a"}', "a"),
        (b'{"detail": [{"msg": "field required"}]}', "field required"),
        (b"<html>bad gateway</html>", "<html>bad gateway</html>"),
        (b"", ""),
    ],
)
def test_messages_of_servers(body, said):
    assert message_of(body) == said
