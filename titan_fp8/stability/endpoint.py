"""An HTTP(S) server for scrapers that cannot slow down or stop the process it runs in.

prometheus_client's own server would do but for four things, each of which reaches into training: it starts a thread per
connection without end; a client that connects and says nothing holds its thread for ever; with TLS it shakes hands in the
thread that accepts, so that one such client blocks all others and even closing; and it answers as often as it is asked,
which takes Python's lock from the training thread. Here:

    at most RATE answers a second, after a burst     the rest wait in the kernel's queue, or are refused there
    at most CONNECTIONS at a time                    the oldest makes room for the next: a scraper says at once what it wants
    each is over after DEADLINE seconds              handshake, request and answer together
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import errno
import hmac
import logging
import socket
import ssl
import threading
import time
from collections.abc import Callable
from pathlib import Path
from socketserver import ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

from titan_fp8.errors import UserError

logger = logging.getLogger(__name__)

Application = Callable[..., Any]
"""WSGI."""

PORTS_TO_TRY = 100
RATE, BURST = 10, 20  # answers; one of 1000 series takes 6 ms, and a Prometheus asks once in some seconds
CONNECTIONS = 8
DEADLINE = 10.0  # seconds, Prometheus' own default


class Endpoint:
    """Serves a WSGI application from a thread of its own.

    Args:
        application: what answers; called from several threads.
        host: address to listen on.
        port: TCP port; 0 takes any free one.
        next_free_port: when `port` is taken, try the 99 after it instead of refusing.
        certfile, keyfile: PEM files; with them it is HTTPS, of TLS 1.2 or later.
        basic_auth_file: one line NAME:PASSWORD that a client must send; over plain HTTP only to this machine.

    Raises UserError for files that cannot be used, and for a password that others could read off the wire.
    """

    def __init__(
        self,
        application: Application,
        host: str,
        port: int,
        next_free_port: bool = False,
        certfile: str = "",
        keyfile: str = "",
        basic_auth_file: str = "",
    ):
        self.host, self.port, self.next_free_port = host, port, next_free_port
        if bool(certfile) != bool(keyfile):
            raise UserError(
                f"prometheus.certfile and keyfile must both be set, or neither, got {certfile or keyfile!r} alone: "
                "add the other file"
            )
        self._tls = _tls(certfile, keyfile) if certfile else None
        if basic_auth_file:
            if self._tls is None and not _only_from_here(host):
                raise UserError(
                    f"a password must not cross a network in clear, and prometheus.host is {host!r} without a certificate: "
                    "set prometheus.certfile and keyfile, or listen on 127.0.0.1"
                )
            application = _locked(application, _credentials(basic_auth_file))
        self._application = application
        self._server: _Server | None = None
        self._thread: threading.Thread | None = None

    @property
    def url(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'https' if self._tls else 'http'}://{host}:{self.port}/metrics"

    def start(self) -> int:
        """Listen; returns the port. Raises UserError where the address cannot be used."""
        assert self._server is None, "the endpoint is already open"
        wanted = self.port
        last = (
            max(wanted, min(wanted + PORTS_TO_TRY - 1, 65535)) if self.next_free_port and wanted else wanted
        )
        for port in range(wanted, last + 1):
            try:
                self._server = _Server(self.host, port, self._application, self._tls)
                break
            except (OSError, OverflowError) as error:  # OverflowError: a port above 65535
                reason = getattr(error, "strerror", None) or error
                if getattr(error, "errno", None) != errno.EADDRINUSE:
                    raise UserError(
                        f"the metrics endpoint must be able to listen, and {self.host}:{port} refuses "
                        f"({reason}): give --prometheus.host= an address of this machine "
                        "and --prometheus.port= a number from 1024 to 65535"
                    ) from error
        else:
            if self.next_free_port:
                raise UserError(
                    f"the metrics endpoint needs a free port, and {wanted} to {last} on {self.host} are all "
                    "taken: choose another with --prometheus.port="
                )
            raise UserError(
                f"the metrics endpoint needs a free port, and {wanted} on {self.host} is taken: "
                "choose another with --prometheus.port=, or add --prometheus.next_free_port"
            )
        self.port = int(self._server.server_port)
        if wanted and self.port != wanted:
            logger.warning("Prometheus port %d is taken; using %d instead", wanted, self.port)
        self._thread = threading.Thread(target=self._server.serve_forever, name="prometheus", daemon=True)
        self._thread.start()
        return self.port

    def close(self) -> None:
        """Stop listening. The port is free again on return; answers under way are dropped. May be called twice."""
        if self._server is None:
            return
        assert self._thread is not None
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()
        self._server = self._thread = None


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 32

    def __init__(self, host: str, port: int, application: Application, tls: ssl.SSLContext | None):
        self.address_family = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0][0]
        self._tls = tls
        self._due = 0.0  # when the next answer may be given; up to a burst of them behind now
        # What was accepted -> the connection (with TLS another object), and when it must end. The oldest is first.
        self._open: dict[socket.socket, tuple[socket.socket, float]] = {}
        super().__init__((host, port), _Handler)
        self.set_app(application)

    def get_request(self) -> tuple[socket.socket, Any]:
        now = time.monotonic()
        self._due = max(self._due, now - BURST / RATE) + 1 / RATE
        time.sleep(max(self._due - now, 0.0))
        return super().get_request()

    def process_request(self, request: Any, client_address: Any) -> None:
        for oldest in list(self._open)[: max(len(self._open) + 1 - CONNECTIONS, 0)]:
            self._end(oldest)
        request.settimeout(DEADLINE)
        self._open[request] = request, time.monotonic() + DEADLINE
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._open.pop(request, None)

    def _end(self, request: socket.socket) -> None:
        connection, _ = self._open.pop(request, (request, 0.0))
        with contextlib.suppress(OSError):  # it may have gone in this moment
            connection.shutdown(socket.SHUT_RDWR)

    def finish_request(self, request: Any, client_address: Any) -> None:
        if self._tls is None:
            super().finish_request(request, client_address)
            return
        with self._tls.wrap_socket(request, server_side=True, do_handshake_on_connect=False) as secure:
            self._open[request] = secure, self._open[request][1]  # KeyError: ended in this moment, and it may
            secure.do_handshake()
            super().finish_request(secure, client_address)

    def service_actions(self) -> None:
        """Runs twice a second. A timeout alone would let a client live that sends a byte now and then."""
        now = time.monotonic()
        for request, (_, end) in list(self._open.items()):
            if now > end:
                self._end(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        logger.debug("A scrape by %s failed", client_address, exc_info=True)


class _Handler(WSGIRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        """Scrapes are no news."""


def _tls(certfile: str, keyfile: str) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_cert_chain(
            certfile, keyfile, password=lambda: b""
        )  # an empty one: never ask on the terminal
    except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"prometheus.certfile and keyfile must be a PEM certificate and its key without a passphrase, got {certfile} "
            f"and {keyfile} ({reason}): name such files"
        ) from error
    return context


def _only_from_here(host: str) -> bool:
    return host == "localhost" or host.startswith("127.") or host == "::1"


def _credentials(path: str) -> bytes:
    try:
        line = Path(path).read_bytes().strip()
    except OSError as error:
        raise UserError(
            f"prometheus.basic_auth_file must be a readable file, got {path} ({error.strerror}): write NAME:PASSWORD to it"
        ) from error
    name, colon, password = line.partition(b":")
    if not (name and colon and password) or b"\n" in line:
        raise UserError(
            f"prometheus.basic_auth_file must hold one line NAME:PASSWORD, and {path} does not: write it anew"
        )
    return line


def _locked(application: Application, credentials: bytes) -> Application:
    """`application` for those who send the credentials by HTTP basic authentication (RFC 7617); 401 for others."""

    def ask(environ: dict[str, Any], start_response: Callable[..., Any]) -> Any:
        scheme, _, sent = environ.get("HTTP_AUTHORIZATION", "").partition(" ")
        try:
            given = base64.b64decode(sent.strip(), validate=True)
        except (binascii.Error, ValueError):
            given = b""
        if scheme.lower() == "basic" and hmac.compare_digest(given, credentials):
            return application(environ, start_response)
        start_response("401 Unauthorized", [("WWW-Authenticate", 'Basic realm="titan_fp8"')])
        return [b""]

    return ask
