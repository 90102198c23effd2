"""Servers that speak S3's and Google's protocols on 127.0.0.1, for tests of buckets."""

import contextlib
import http.client
import http.server
import json
import re
import socketserver
import threading
import urllib.parse
import urllib.request
from collections.abc import Iterator

S3_ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "testing",
    "AWS_SECRET_ACCESS_KEY": "testing",
    "AWS_REGION": "us-east-1",
}


@contextlib.contextmanager
def s3_server(bucket: str = "bucket") -> Iterator[str]:
    """moto's server with one bucket; yields its address."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        address = f"http://{host}:{port}"
        urllib.request.urlopen(urllib.request.Request(f"{address}/{bucket}", method="PUT")).close()
        yield address
    finally:
        server.stop()


@contextlib.contextmanager
def gcs_server(bucket: str = "bucket") -> Iterator[str]:
    """gcp-storage-emulator with one bucket, and what its answers lack: the header with an object's
    generation, and refusals where that is another than asked for. Yields the address."""
    from gcp_storage_emulator.server import create_server

    emulator = create_server("127.0.0.1", 0, in_memory=True, default_bucket=bucket)
    emulator.start()
    port = emulator._api._httpd.server_address[1]  # 0 asked for any
    front = _Front(("127.0.0.1", 0), _Proxy)
    front.port = port
    thread = threading.Thread(target=front.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{front.server_address[1]}"
    finally:
        front.shutdown()
        front.server_close()
        emulator.stop()


class _Front(socketserver.ThreadingMixIn, http.server.HTTPServer):
    port: int
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
