"""The endpoint over real sockets: who may listen and read, and what clients can do to the process (nothing)."""

import base64
import contextlib
import socket
import ssl
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request

import pytest

from titan_fp8.errors import UserError
from titan_fp8.stability import endpoint as endpoint_module
from titan_fp8.stability.endpoint import BURST, CONNECTIONS, RATE, Endpoint


class Application:
    """Answers "hello" and counts."""

    def __init__(self):
        self.answers = 0
        self.work = 0.0  # CPU seconds that an answer takes

    def __call__(self, environ, start_response):
        self.answers += 1
        end = time.thread_time() + self.work
        while time.thread_time() < end:
            pass
        start_response("200 OK", [("Content-Type", "text/plain")])
        return [b"hello"]


@pytest.fixture
def application():
    return Application()


@pytest.fixture
def open_endpoint(application):
    """open_endpoint(**arguments) -> a started Endpoint on a free port; closed at the end."""
    opened = []

    def open_endpoint(**arguments):
        endpoint = Endpoint(application, "127.0.0.1", 0, **arguments)
        opened.append(endpoint)
        endpoint.start()
        return endpoint

    yield open_endpoint
    for endpoint in opened:
        endpoint.close()


@pytest.fixture
def taken_port():
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        yield holder.getsockname()[1]


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    """(certfile, keyfile) for 127.0.0.1."""
    folder = tmp_path_factory.mktemp("tls")
    names = [str(folder / "cert.pem"), str(folder / "key.pem")]
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes",
               "-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1", "-days", "2",
               "-out", names[0], "-keyout", names[1]]  # fmt: skip
    try:
        subprocess.run(command, check=True, capture_output=True)
    except FileNotFoundError:
        pytest.skip("needs the program openssl to make a certificate")
    return names


def get(endpoint, context=None, **headers):
    request = urllib.request.Request(endpoint.url, headers=headers)
    with urllib.request.urlopen(request, timeout=15, context=context) as answer:
        return answer.read()


# ---- Listening ----


def test_a_taken_port_is_refused_with_the_remedy(application, taken_port):
    with pytest.raises(UserError) as refused:
        Endpoint(application, "127.0.0.1", taken_port).start()
    message = str(refused.value)
    assert f"{taken_port} on 127.0.0.1 is taken" in message
    assert "--prometheus.port=" in message and "--prometheus.next_free_port" in message
    assert "\n" not in message


def test_next_free_port(application, taken_port, caplog):
    endpoint = Endpoint(application, "127.0.0.1", taken_port, next_free_port=True)
    port = endpoint.start()
    try:
        assert taken_port < port < taken_port + 100
        assert get(endpoint) == b"hello"
        assert f"Prometheus port {taken_port} is taken; using {port} instead" in caplog.text
    finally:
        endpoint.close()


@pytest.mark.parametrize(
    ("host", "port", "next_free"),
    [
        ("192.0.2.1", 0, False),  # reserved for documentation: no machine has it
        ("127.0.0.1", 70000, False),
        ("127.0.0.1", 70000, True),
        ("no.such.host.invalid", 0, False),
    ],
)
def test_an_impossible_address_is_refused(application, host, port, next_free):
    with pytest.raises(UserError, match=r"--prometheus\.host=.*--prometheus\.port="):
        Endpoint(application, host, port, next_free).start()


def test_the_port_is_free_after_close(application):
    endpoint = Endpoint(application, "127.0.0.1", 0)
    port = endpoint.start()
    get(endpoint)
    endpoint.close()
    endpoint.close()
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", port)) != 0
    again = Endpoint(application, "127.0.0.1", port)
    assert again.start() == port
    again.close()


def test_the_url_of_an_ipv6_address_has_brackets(application):
    assert Endpoint(application, "::1", 9464).url == "http://[::1]:9464/metrics"


# ---- Who may read ----


def test_https(open_endpoint, certificate):
    endpoint = open_endpoint(certfile=certificate[0], keyfile=certificate[1])
    assert endpoint.url.startswith("https://")
    assert get(endpoint, ssl.create_default_context(cafile=certificate[0])) == b"hello"
    with pytest.raises(urllib.error.URLError, match="CERTIFICATE_VERIFY_FAILED"):
        get(endpoint, ssl.create_default_context())
    with pytest.raises(OSError):
        urllib.request.urlopen(endpoint.url.replace("https", "http"), timeout=5)
    assert get(endpoint, ssl.create_default_context(cafile=certificate[0])) == b"hello"  # and goes on


@pytest.mark.parametrize(
    ("sent", "allowed"),
    [
        ("Basic " + base64.b64encode("prom:s€cret:1".encode()).decode(), True),
        ("basic " + base64.b64encode("prom:s€cret:1".encode()).decode(), True),
        ("Basic " + base64.b64encode(b"prom:secret").decode(), False),
        ("Basic " + base64.b64encode(b"prom").decode(), False),
        ("Basic not-base64!", False),
        ("Bearer " + base64.b64encode("prom:s€cret:1".encode()).decode(), False),
        (None, False),
    ],
)
def test_basic_auth(open_endpoint, application, tmp_path, sent, allowed):
    path = tmp_path / "password"
    path.write_text("prom:s€cret:1\n", encoding="utf-8")
    endpoint = open_endpoint(basic_auth_file=str(path))
    headers = {} if sent is None else {"Authorization": sent}
    if allowed:
        assert get(endpoint, **headers) == b"hello"
    else:
        with pytest.raises(urllib.error.HTTPError) as refused:
            get(endpoint, **headers)
        assert refused.value.code == 401 and "Basic" in refused.value.headers["WWW-Authenticate"]
        assert application.answers == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"certfile": "cert.pem"}, "both be set"),
        ({"keyfile": "key.pem"}, "both be set"),
        ({"certfile": "/nowhere/cert.pem", "keyfile": "/nowhere/key.pem"}, "/nowhere/cert.pem"),
        ({"certfile": __file__, "keyfile": __file__}, "PEM"),
        ({"basic_auth_file": "/nowhere/password"}, "NAME:PASSWORD"),
        ({"basic_auth_file": __file__}, "one line"),
        ({"basic_auth_file": "password", "host": "0.0.0.0"}, "in clear"),
    ],
)
def test_what_cannot_be_safe_is_refused_before_anything_listens(application, arguments, words):
    host = arguments.pop("host", "127.0.0.1")
    with pytest.raises(UserError, match=words):
        Endpoint(application, host, 0, **arguments)


# ---- What clients can do ----

HAMMER = """
import socket, sys, threading, time
def ask():
    while time.monotonic() < end:
        try:
            with socket.create_connection(("127.0.0.1", int(sys.argv[1])), timeout=1) as s:
                s.sendall(b"GET /metrics HTTP/1.0\\r\\n\\r\\n")
                s.recv(100)
        except OSError:
            time.sleep(0.01)
end = time.monotonic() + float(sys.argv[2])
threads = [threading.Thread(target=ask) for _ in range(50)]
[t.start() for t in threads]; [t.join() for t in threads]
"""


def test_a_thousand_scrapes_a_second_cost_little(open_endpoint, application):
    """50 clients as fast as they can: answers, and with them the time taken from training, are bounded."""
    application.work = 0.006  # as 1000 series
    endpoint = open_endpoint()
    seconds = 3.0
    wall, cpu = time.monotonic(), time.process_time()
    subprocess.run([sys.executable, "-c", HAMMER, str(endpoint.port), str(seconds)], check=True, timeout=60)
    wall, cpu = time.monotonic() - wall, time.process_time() - cpu
    assert BURST <= application.answers <= BURST + RATE * wall + 1
    assert cpu < 0.2 * wall  # CPU time, so other programs do not count
    assert threading.active_count() < 10 + CONNECTIONS


def left(client):
    """Whether the server has ended this connection."""
    client.setblocking(False)
    try:
        return client.recv(1000) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True


@pytest.mark.parametrize("secure", [False, True], ids=["http", "https"])
def test_silent_clients_shut_nobody_out(open_endpoint, certificate, secure):
    """More than there are places connect and say nothing: the oldest make room for them, and for a scraper."""
    files = {"certfile": certificate[0], "keyfile": certificate[1]} if secure else {}
    endpoint = open_endpoint(**files)
    context = ssl.create_default_context(cafile=certificate[0]) if secure else None
    clients = [socket.create_connection(("127.0.0.1", endpoint.port)) for _ in range(CONNECTIONS + 2)]
    assert get(endpoint, context) == b"hello"
    assert [left(client) for client in clients] == [True] * 3 + [False] * (CONNECTIONS - 1)
    for client in clients:
        client.close()


@pytest.mark.parametrize("secure", [False, True], ids=["http", "https"])
def test_silent_clients_are_shown_out(open_endpoint, certificate, monkeypatch, secure):
    """As many as there are places connect and say nothing, or a byte now and then, but not for long."""
    monkeypatch.setattr(endpoint_module, "DEADLINE", 0.6)
    files = {"certfile": certificate[0], "keyfile": certificate[1]} if secure else {}
    endpoint = open_endpoint(**files)
    clients = [socket.create_connection(("127.0.0.1", endpoint.port)) for _ in range(CONNECTIONS)]
    ends = threading.Event()

    def drip():
        while not ends.wait(0.1):
            for client in clients[::2]:
                with contextlib.suppress(OSError):
                    client.send(b"\x16" if secure else b"G")

    thread = threading.Thread(target=drip)
    thread.start()
    try:
        time.sleep(0.3)
        assert not any(map(left, clients))
        time.sleep(1.3)  # the deadline, and the half second between two looks
        assert all(map(left, clients))
    finally:
        ends.set()
        thread.join()
        for client in clients:
            client.close()


@pytest.mark.parametrize("secure", [False, True], ids=["http", "https"])
def test_closing_waits_for_nobody(application, certificate, secure):
    files = {"certfile": certificate[0], "keyfile": certificate[1]} if secure else {}
    endpoint = Endpoint(application, "127.0.0.1", 0, **files)
    endpoint.start()
    with socket.create_connection(("127.0.0.1", endpoint.port)):  # says nothing
        time.sleep(0.2)
        started = time.monotonic()
        endpoint.close()
        assert time.monotonic() - started < 3  # half a second between two looks at the flag


def test_a_client_that_dies_in_the_middle_leaves_no_word(open_endpoint, capfd):
    endpoint = open_endpoint()
    for said in (b"", b"GET", b"GET /metrics HTTP/1.0\r\n\r\n"):
        client = socket.create_connection(("127.0.0.1", endpoint.port))
        client.setsockopt(
            socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00"
        )  # close by reset
        client.sendall(said)
        client.close()
    assert get(endpoint) == b"hello"
    assert capfd.readouterr() == ("", "")
