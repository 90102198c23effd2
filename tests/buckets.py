"""Servers that speak S3's and Google's protocols on 127.0.0.1, for tests of buckets."""

import contextlib
import dataclasses
import http.client
import http.server
import json
import logging
import re
import socketserver
import threading
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from echovlm_jax.storage import bucket as buckets

S3_ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "testing",
    "AWS_SECRET_ACCESS_KEY": "testing",
    "AWS_REGION": "us-east-1",
}


@dataclasses.dataclass
class Request:
    """What a client asked for: of `name`, an object or "", the bytes [start, stop) or all."""

    method: str
    name: str
    query: dict[str, list[str]]
    start: int
    stop: int | None


class Server:
    """moto's server with one bucket, and what stands before it.

    Attributes:
      address: of the server.
      seen: all requests, in order.
      answer: told of each request; the status of an answer in the server's place, or None.
    """

    def __init__(self, app: Any, bucket: str) -> None:
        self.address, self.seen = "", list[Request]()
        self.answer: Callable[[Request], int | None] = lambda request: None
        self._app, self._root = app, f"/{bucket}"

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Any:
        path = environ["PATH_INFO"].encode("latin-1").decode()
        span = re.fullmatch(r"bytes=(\d+)-(\d*)", environ.get("HTTP_RANGE", ""))
        request = Request(
            environ["REQUEST_METHOD"],
            path.removeprefix(self._root).removeprefix("/"),
            urllib.parse.parse_qs(environ["QUERY_STRING"]),
            int(span[1]) if span else 0,
            int(span[2]) + 1 if span and span[2] else None,
        )
        self.seen.append(request)
        if (status := self.answer(request)) is None:
            return self._app(environ, start_response)
        start_response(f"{status} No", [("content-type", "application/xml")])
        code = {403: "AccessDenied", 503: "SlowDown"}.get(status, "Other")
        return [f"<Error><Code>{code}</Code><Message>no</Message></Error>".encode()]


@contextlib.contextmanager
def s3_server(bucket: str = "bucket") -> Iterator[Server]:
    """A server with one bucket, which the environment names."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # a line a request
    inner = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    inner.start()
    assert inner._server is not None
    server = inner._server.app = Server(inner._server.app, bucket)
    host, port = inner.get_host_and_port()
    server.address = f"http://{host}:{port}"
    try:
        with pytest.MonkeyPatch.context() as patch:
            for name, value in (S3_ENVIRONMENT | {"AWS_ENDPOINT_URL": server.address}).items():
                patch.setenv(name, value)
            buckets._open.cache_clear()
            made = urllib.request.Request(f"{server.address}/{bucket}", method="PUT")
            urllib.request.urlopen(made).close()
            yield server
    finally:
        buckets._open.cache_clear()
        inner.stop()


@contextlib.contextmanager
def gcs_server(bucket: str = "bucket") -> Iterator["_Front"]:
    """gcp-storage-emulator with one bucket, and what its answers lack: the header with an object's
    generation, and refusals where that is another than asked for. Where it `refuses`, all is
    refused, as Google's does it."""
    from gcp_storage_emulator.server import create_server

    emulator = create_server("127.0.0.1", 0, in_memory=True, default_bucket=bucket)
    emulator.start()
    port = emulator._api._httpd.server_address[1]  # 0 asked for any
    front = _Front(("127.0.0.1", 0), _Proxy)
    front.port = port
    thread = threading.Thread(target=front.serve_forever, daemon=True)
    thread.start()
    try:
        front.address = f"http://127.0.0.1:{front.server_address[1]}"
        yield front
    finally:
        front.shutdown()
        front.server_close()
        emulator.stop()


class _Front(socketserver.ThreadingMixIn, http.server.HTTPServer):
    port: int
    address: str
    refuses = False
    daemon_threads = True

    def __init__(self, *args: object) -> None:
        super().__init__(*args)  # type: ignore[arg-type]
        self.generations: dict[str, int] = {}
        self.last = 1000
        self.lock = threading.Lock()


class _Proxy(http.server.BaseHTTPRequestHandler):
    """Hands requests on, one at a time, and keeps the objects' generations."""

    protocol_version = "HTTP/1.1"
    server: _Front

    def log_message(self, *_: object) -> None:
        pass

    def _handle(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length", 0)))
        with self.server.lock:
            status, headers, content = self._answer(body)
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_POST = do_PUT = do_DELETE = _handle

    def _answer(self, body: bytes) -> tuple[int, dict[str, str], bytes]:
        if self.server.refuses:
            return 403, {}, b'{"error": {"code": 403, "message": "no access"}}'
        name = self._object()
        generation = self.server.generations.get(name, 0)
        wanted = re.search(r"ifGenerationMatch=(\d+)", self.path)
        if wanted and int(wanted[1]) != generation:
            return 412, {}, b"{}"
        other = re.search(r"ifGenerationNotMatch=(\d+)", self.path)
        if other and int(other[1]) == generation and generation:
            return 304, {}, b""
        connection = http.client.HTTPConnection("127.0.0.1", self.server.port)
        headers = {k: v for k, v in self.headers.items() if k.lower() not in ("host",)}
        connection.request(self.command, self.path, body, headers)
        answer = connection.getresponse()
        content = answer.read()
        connection.close()
        if answer.status < 300 and self.command == "POST" and "/upload/" in self.path:
            self.server.last += 1
            generation = self.server.generations[name] = self.server.last
            content = json.dumps(json.loads(content) | {"generation": str(generation)}).encode()
        elif answer.status < 300 and self.command == "DELETE":
            self.server.generations.pop(name, None)
        if answer.status < 300 and self.command == "GET" and not name:
            content = self._listed(content)
        kept = {"content-type": answer.getheader("content-type") or "application/octet-stream"}
        if generation and answer.status < 300:
            kept["x-goog-generation"] = str(generation)
        if content_range := answer.getheader("content-range"):
            kept["content-range"] = content_range
        return answer.status, kept, content

    def _listed(self, content: bytes) -> bytes:
        """A list without what is before startOffset and from endOffset on."""
        asked = urllib.parse.parse_qs(urllib.parse.urlparse(self.path).query)
        first, end = asked.get("startOffset", [""])[0], asked.get("endOffset", [""])[0]
        found = json.loads(content)
        found["items"] = [
            item
            for item in found.get("items", [])
            if item["name"] >= first and (not end or item["name"] < end)
        ]
        return json.dumps(found).encode()

    def _object(self) -> str:
        found = re.search(r"[?&]name=([^&]*)", self.path) or re.search(r"/o/([^?]*)", self.path)
        return urllib.parse.unquote(found[1]) if found else ""
